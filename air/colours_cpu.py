"""The linear map from colours to an image, and its transpose, in the compiled kernels. For `air.colours`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from air.gaussians import Gaussians
from air.render.cpu import Raster, half_turns
from air.render.cpu_kernels import BLUE, HALF_TURNS, RED
from air.render.planes import image_planes, pixels
from air.render.threads import Workers


class ColourMap:
    """Gaussians whose shapes stay, drawn with one set of colours after another.

    Pictures are padded planes (`air.render.planes`) as float32 tensors, zero around the image.

    Args:
        shapes: float32; their colours are not used.
        image: What they are to come near, (3, height, width).
        workers: CPU threads.
    """

    def __init__(self, shapes: Gaussians, image: Tensor, workers: Workers) -> None:
        _, height, width = image.shape
        self._count = len(shapes)
        self._raster = Raster(self._count, height, width, workers)
        rows = torch.cat([shapes.xy, shapes.scale, half_turns(shapes.angle).float()[:, None]], dim=1)
        self._image = image
        self._size = (height, width)
        self._drawn = image_planes(height, width)
        self._raster.parameters[: HALF_TURNS + 1, : self._count] = rows.T.numpy()

    def miss(self, colour: Tensor) -> Tensor:
        """The image without what colours (N, 3) draw."""
        planes, wanted = image_planes(*self._size), image_planes(*self._size)
        pixels(wanted, *self._size)[:] = self._image.numpy()
        self._raster.parameters[RED : BLUE + 1, : self._count] = -colour.T.numpy()
        self._raster.draw(planes, wanted)
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
