"""The linear map from colours to an image, and its transpose, in the compiled kernels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from air.compute.planes import image_planes, pixels
from air.compute.threads import Workers
from air.gaussians import Gaussians
from air.rendering.cpu import Raster
from air.rendering.parameters import BLUE, RED


class ColourMap:
    """Draws Gaussians of fixed shapes with one set of colours after another.

    Pictures are padded planes (`air.compute.planes`) as float32 tensors, zero around the image.

    Args:
        shapes: float32; their colours are not used.
        image: The image to approximate, (3, height, width).
        workers: CPU threads.
    """

    def __init__(self, shapes: Gaussians, image: Tensor, workers: Workers) -> None:
        _, height, width = image.shape
        self._count = len(shapes)
        self._raster = Raster.of(shapes, height, width, workers)
        self._image = image
        self._size = (height, width)
        self._drawn = image_planes(height, width)

    def miss(self, colour: Tensor) -> Tensor:
        """The image minus the picture of colours (N, 3)."""
        planes = image_planes(*self._size)
        pixels(self._drawn, *self._size)[:] = self._image.numpy()
        self._raster.parameters[RED : BLUE + 1, : self._count] = -colour.T.numpy()
        self._raster.draw(planes, self._drawn)
        return torch.from_numpy(planes)

    def draw(self, colour: Tensor) -> Tensor:
        """The picture of colours (N, 3), valid until the next call."""
        self._raster.parameters[RED : BLUE + 1, : self._count] = colour.T.numpy()
        self._raster.draw(self._drawn)
        return torch.from_numpy(self._drawn)

    def gather(self, picture: Tensor) -> Tensor:
        """The sum of picture times weight for every Gaussian and channel, shape (N, 3). Call after `draw`."""
        self._raster.gather(picture.numpy())
        return torch.from_numpy(np.ascontiguousarray(self._raster.gradient[RED : BLUE + 1, : self._count].T))
