"""Rendering and loss of a batch of images of one size, for training networks: one autograd node, a thread per image.

On the CPU in float32 both run in the compiled kernels; elsewhere image by image through `air.render` and
`air.loss.reference`, which are their definitions. This module knows nothing of networks or stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from air.compute.threads import Workers
from air.gaussians import RAW_CHANNELS, Gaussians
from air.loss.reference import loss as torch_loss
from air.rendering.render import render


def render_batch(gaussians: Gaussians, counts: Sequence[int], height: int, width: int, workers: Workers) -> Tensor:
    """Images (B, 3, height, width), the k-th the plain sum of the k-th run of Gaussians; differentiable.

    Args:
        gaussians: Those of all images, one image after another.
        counts: How many of them each image has, shape (B,); may be 0.
        height: Rows.
        width: Columns.
        workers: CPU threads.

    Raises:
        InvalidGaussiansError: A number is not finite or a scale is not positive.
        ValueError: The counts do not add up to the Gaussians.
    """
    if sum(counts) != len(gaussians):
        raise ValueError(f"{len(gaussians)} Gaussians cannot be {sum(counts)} in {len(counts)} images")
    if _is_compiled_for(gaussians.xy):
        gaussians.validate()
        columns = (gaussians.xy, gaussians.scale, gaussians.angle, gaussians.colour)
        drawn = _RenderBatch.apply(*columns, tuple(counts), height, width, workers)
        assert isinstance(drawn, Tensor)
        return drawn
    ends = list(accumulate(counts))
    parts = [gaussians[end - count : end] for end, count in zip(ends, counts, strict=True)]
    return torch.stack([render(part, height, width, threads=workers.count) for part in parts])


class BatchLoss:
    """0.7 L1 + 0.3 (1 - SSIM) of every image of a batch against its target, again and again.

    Args:
        targets: Shape (B, 3, H, W), values in [0, 1].
        workers: CPU threads.
    """

    def __init__(self, targets: Tensor, workers: Workers) -> None:
        self._targets = targets
        self._workers = workers
        self._fused: list[Any] | None = None
        if _is_compiled_for(targets):
            from air.loss.cpu import FusedLoss

            fused: list[Any] = [None] * len(targets)

            arrays = targets.numpy()

            def prepare(index: int) -> None:
                fused[index] = FusedLoss(arrays[index], Workers(1))

            workers.run(prepare, [(index,) for index in range(len(targets))])
            self._fused = fused

    def __call__(self, images: Tensor) -> Tensor:
        """The loss of each image, shape (B,), differentiable in the images (B, 3, H, W).

        Raises:
            ValueError: The images are not shaped as the targets.
        """
        if images.shape != self._targets.shape:
            raise ValueError(f"images {tuple(images.shape)} do not match targets {tuple(self._targets.shape)}")
        if self._fused is None:
            return torch.stack([torch_loss(*pair) for pair in zip(images, self._targets, strict=True)])
        losses = _FusedBatchLoss.apply(images, self._fused, self._workers)
        assert isinstance(losses, Tensor)
        return losses


def _is_compiled_for(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


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
        from air.rendering.cpu import Raster, half_turns

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


class _FusedBatchLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, fused: list[Any], workers: Workers) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        from air.compute.planes import image_planes, pixels

        _, _, height, width = images.shape
        drawn = images.numpy()
        losses = np.zeros(len(drawn), np.float32)
        slopes = np.empty(drawn.shape, np.float32)

        def evaluate(index: int) -> None:
            planes = image_planes(height, width)
            pixels(planes, height, width)[:] = drawn[index]
            losses[index] = fused[index].evaluate(planes).loss
            slopes[index] = pixels(fused[index].gradient, height, width)

        workers.run(evaluate, [(index,) for index in range(len(drawn))])
        ctx.save_for_backward(torch.from_numpy(slopes))
        return torch.from_numpy(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slopes,) = ctx.saved_tensors
        return slopes * gradient[:, None, None, None], None, None
