"""Rendering of a batch of images of one size, for training networks: one autograd node, a thread per image.

In float32 on the CPU the compiled kernels draw; elsewhere `air.render` draws one image after another. This module knows
nothing of networks or stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from air.compute.backends import has_cpu_kernels
from air.compute.threads import Workers
from air.gaussians import RAW_CHANNELS, Gaussians
from air.rendering.parameters import half_turns
from air.rendering.render import render


def render_batch(gaussians: Gaussians, counts: Sequence[int], height: int, width: int, workers: Workers) -> Tensor:
    """Images (B, 3, height, width), each the plain sum of its run of Gaussians; differentiable.

    Args:
        gaussians: The Gaussians of all images, one image after another.
        counts: The number of Gaussians of each image, B numbers; may be 0.
        height: Rows.
        width: Columns.
        workers: CPU threads.

    Raises:
        InvalidGaussiansError: A number is not finite or a scale is not positive.
        ValueError: The counts do not add up to the Gaussians.
    """
    if sum(counts) != len(gaussians):
        raise ValueError(
            f"the counts of {len(counts)} images add up to {sum(counts)}, but there are {len(gaussians)} Gaussians"
        )
    if has_cpu_kernels(gaussians.xy):
        gaussians.validate()
        columns = (gaussians.xy, gaussians.scale, gaussians.angle, gaussians.colour)
        drawn = _RenderBatch.apply(*columns, tuple(counts), height, width, workers)
        assert isinstance(drawn, Tensor)
        return drawn
    ends = list(accumulate(counts))
    parts = [gaussians[end - count : end] for end, count in zip(ends, counts, strict=True)]
    return torch.stack([render(part, height, width, threads=workers.count) for part in parts])


class _RenderBatch(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        xy: Tensor,
        scale: Tensor,
        angle: Tensor,
        colour: Tensor,
        counts: tuple[int, ...],
        height: int,
        width: int,
        workers: Workers,
    ) -> Tensor:
        from air.compute.planes import image_planes, pixels
        from air.rendering.cpu import Raster

        rows = torch.cat([xy, scale, half_turns(angle)[:, None], colour], dim=1).float().numpy()
        images = np.zeros((len(counts), 3, height, width), np.float32)
        rasters: list[Any] = [None] * len(counts)

        def draw(index: int, first: int, end: int) -> None:
            raster = Raster(end - first, height, width, Workers(1))
            raster.parameters[:, : end - first] = rows[first:end].T
            planes = image_planes(height, width)
            raster.draw(planes)
            images[index] = pixels(planes, height, width)
            rasters[index] = raster

        ctx.tasks = _runs(counts)
        ctx.rasters = rasters
        ctx.workers = workers
        ctx.count = len(rows)
        workers.run(draw, ctx.tasks)
        return torch.from_numpy(images)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from air.compute.planes import image_planes, pixels

        table = np.zeros((ctx.count, RAW_CHANNELS), np.float32)
        slopes = gradient.contiguous().numpy()

        def gather(index: int, first: int, end: int) -> None:
            raster = ctx.rasters[index]
            planes = image_planes(raster.height, raster.width)
            pixels(planes, raster.height, raster.width)[:] = slopes[index]
            raster.gather(planes)
            table[first:end] = raster.gradient[:, : end - first].T

        ctx.workers.run(gather, ctx.tasks)
        rows = torch.from_numpy(table)
        return rows[:, 0:2], rows[:, 2:4], rows[:, 4], rows[:, 5:8], None, None, None, None


def _runs(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """(image, first, end) of every image that has Gaussians."""
    ends = list(accumulate(counts))
    return [(index, ends[index] - count, ends[index]) for index, count in enumerate(counts) if count]
