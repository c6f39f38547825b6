"""The compiled CPU renderer: buffers, threads and autograd around the kernels of `air.rendering.cpu_kernels`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from air.compute.planes import BAND_ROWS, PAD_ROWS, FloatArray, aligned_zeros, image_planes, pixels, table
from air.compute.threads import Workers, bands, groups
from air.gaussians import Gaussians
from air.rendering import cpu_kernels as kernels
from air.rendering.parameters import OFF_IMAGE, PARAMETERS, SCALE_1, SCALE_2, X, half_turns


class Raster:
    """Buffers to draw `count` Gaussians, again and again, into images of one size.

    Fill `parameters` (rows as named in `air.rendering.parameters`), then `draw`; `gather` uses what `draw` derived.

    Attributes:
        parameters: Table (8, padded count) of x, y, scales, angle in half turns within ±½, and colour.
        gradient: Table of the loss's gradient with respect to them, the angle's per radian; set by `gather`.
    """

    def __init__(self, count: int, height: int, width: int, workers: Workers) -> None:
        self.height, self.width = height, width
        self.workers = workers
        self.parameters = table(PARAMETERS, count)
        self.parameters[X] = OFF_IMAGE
        self.parameters[SCALE_1 : SCALE_2 + 1] = 1
        self.gradient = table(PARAMETERS, count)
        self._geometry = table(kernels.GEOMETRY, count)
        self._padded = self.parameters.shape[1]
        self._moments = aligned_zeros(self._padded, kernels.MOMENTS)
        # Bands that fit in a core's cache, even for one thread: each is filled and drawn before the next.
        self._bands = bands(height, height)
        # Several ranges to a thread, since some regions have larger Gaussians than others.
        self.ranges = groups(self._padded, workers.count if workers.count == 1 else 4 * workers.count)

    @staticmethod
    def of(gaussians: Gaussians, height: int, width: int, workers: Workers) -> Raster:
        """A raster whose parameters are those of float32 Gaussians on the CPU."""
        count = len(gaussians)
        raster = Raster(count, height, width, workers)
        columns = (gaussians.xy, gaussians.scale, half_turns(gaussians.angle)[:, None], gaussians.colour)
        row = 0
        for column in columns:
            raster.parameters[row : row + column.shape[1], :count] = column.T.numpy()
            row += column.shape[1]
        return raster

    def draw(self, planes: FloatArray, background: FloatArray | None = None) -> None:
        """Sets an image's planes to the Gaussians, added to a background if there is one."""
        self.workers.run(self._derive, self.ranges)

        def draw_band(first_row: int, end_row: int) -> None:
            rows = slice(PAD_ROWS + first_row, PAD_ROWS + end_row)
            planes[:, rows] = 0 if background is None else background[:, rows]
            self._add_band(planes, 0, first_row, end_row)

        self.workers.run(draw_band, self._bands)

    def draw_levels(self) -> NDArray[np.uint8]:
        """The image in 8 bits a channel, each rounded to the nearest level, shape (height, width, 3)."""
        self.workers.run(self._derive, self.ranges)
        levels = np.empty((self.height, self.width, 3), np.uint8)

        def draw_rows(first_row: int, end_row: int) -> None:
            # One band's planes stay in the core's cache, and the system has less memory to clear than for an image.
            planes = image_planes(BAND_ROWS, self.width)
            for top in range(first_row, end_row, BAND_ROWS):
                bottom = min(top + BAND_ROWS, end_row)
                planes[:] = 0
                self._add_band(planes, top, top, bottom)
                kernels.round_to_levels(planes, levels[top:bottom])

        self.workers.run(draw_rows, bands(self.height, self.workers.count))
        return levels

    def _add_band(self, planes: FloatArray, top: int, first_row: int, end_row: int) -> None:
        """Adds the Gaussians to the rows of a band, in planes that start with row `top` of the image."""
        kernels.sweep(
            self.parameters,
            self._geometry,
            planes,
            top,
            self._moments,
            self.width,
            0,
            self._padded,
            first_row,
            end_row,
            False,
        )

    def _derive(self, first: int, end: int) -> None:
        kernels.derive_geometry(self.parameters, self._geometry, first, end)

    def gather(self, planes: FloatArray) -> None:
        """Fills `gradient` from the image's gradient. Call after `draw`."""

        def gather_range(first: int, end: int) -> None:
            self.gather_range(planes, first, end)

        self.workers.run(gather_range, self.ranges)

    def gather_range(self, planes: FloatArray, first: int, end: int) -> None:
        """Fills `gradient` for Gaussians first .. end - 1, one of `ranges`, in the calling thread."""
        kernels.sweep(
            self.parameters,
            self._geometry,
            planes,
            0,
            self._moments,
            self.width,
            first,
            end,
            0,
            self.height,
            True,
        )
        kernels.chain_to_parameters(self.parameters, self._geometry, self._moments, self.gradient, first, end)


class _Render(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, xy: Tensor, scale: Tensor, angle: Tensor, colour: Tensor, height: int, width: int, threads: int
    ) -> Tensor:
        planes = image_planes(height, width)
        with Workers(threads) as workers:
            raster = Raster.of(Gaussians(xy, scale, angle, colour), height, width, workers)
            raster.draw(planes)
        ctx.raster = raster
        ctx.threads = threads
        ctx.count = xy.shape[0]
        return torch.from_numpy(pixels(planes, height, width).copy())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        raster: Raster = ctx.raster
        planes = image_planes(raster.height, raster.width)
        pixels(planes, raster.height, raster.width)[:] = gradient.numpy()
        with Workers(ctx.threads) as workers:
            raster.workers = workers
            raster.gather(planes)
        rows = torch.from_numpy(np.ascontiguousarray(raster.gradient[:, : ctx.count].T))
        return rows[:, 0:2], rows[:, 2:4], rows[:, 4], rows[:, 5:8], None, None, None


def render_cpu(gaussians: Gaussians, height: int, width: int, threads: int) -> Tensor:
    """The image of shape (3, height, width), float32; see `air.rendering.render.render`, which checks the arguments."""
    image = _Render.apply(gaussians.xy, gaussians.scale, gaussians.angle, gaussians.colour, height, width, threads)
    assert isinstance(image, Tensor)
    return image


def draw_levels(gaussians: Gaussians, height: int, width: int, threads: int) -> NDArray[np.uint8]:
    """The picture in 8 bits a channel, each rounded to the nearest level, shape (height, width, 3).

    Raises:
        InvalidGaussiansError: A number is not finite or a scale is not positive.
    """
    gaussians.validate()
    with Workers(threads) as workers, torch.no_grad():
        return Raster.of(gaussians.to("cpu").to(torch.float32), height, width, workers).draw_levels()
