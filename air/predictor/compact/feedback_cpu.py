"""`air.predictor.compact.feedback` in the compiled kernels, for one image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from air.compute.planes import FloatArray, image_planes, pixels
from air.compute.threads import Workers
from air.rendering.raw_cpu import RawRaster


class CompiledFeedback:
    """Draws proposals for one image, one after another, in buffers that all of them use.

    Args:
        missing: Image minus canvas, float32 (3, height, width).
        active: Patches whose Gaussians are drawn, boolean, shape (N,).
        anchor: Anchors of all patches, float32 (N, 2), in pixels.
        patch_size: Pixels.
        workers: CPU threads.

    Attributes:
        excess: Canvas plus the last proposal minus image, (3, height, width). A view.
    """

    def __init__(
        self, missing: FloatArray, active: NDArray[np.bool_], anchor: FloatArray, patch_size: int, workers: Workers
    ) -> None:
        _, height, width = missing.shape
        self._chosen = active.nonzero()[0]
        self._drawing = RawRaster(anchor[self._chosen], height, width, patch_size, workers)
        self._background = image_planes(height, width)
        np.negative(missing, out=pixels(self._background, height, width))
        # Gaussians drawn onto the negated residual give the gradient of half the squared error.
        self._slope = image_planes(height, width)
        self.excess = pixels(self._slope, height, width)

    def look(self, raw: FloatArray, ridge: float, steps: FloatArray) -> None:
        """Sets `excess`, and in `steps` (N, 8) the Gauss-Newton steps of the Gaussians that are drawn.

        `raw` holds the raw Gaussians of all patches, (N, 8).
        """
        drawing = self._drawing
        drawing.set_rows(raw[self._chosen])
        drawing.draw(self._slope, self._background)
        if drawing.count:
            steps[self._chosen] = drawing.newton_steps(self._slope, ridge)[:, : drawing.count].T
