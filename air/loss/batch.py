"""The loss of every image of a batch, for training networks: one autograd node, a thread per image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from air.compute.backends import has_cpu_kernels
from air.compute.threads import Workers
from air.loss.reference import loss as torch_loss


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
        if has_cpu_kernels(targets):
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
