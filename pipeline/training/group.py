"""A group of workers that add up gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_BUCKET = 16_000_000
"""Numbers that are summed over the workers at a time."""


class Group:
    """The workers that train together; by itself, a group of one. With more, torch.distributed is initialised.

    Attributes:
        rank: Of this worker.
        size: How many.
        device: What it computes on.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.size = size
        self.device = device or torch.device("cpu")

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces every tensor by its sum over the workers."""
        if self.size == 1 or not tensors:
            return
        bucket: list[Tensor] = []
        for tensor in tensors:
            if bucket and sum(map(Tensor.numel, bucket)) + tensor.numel() > _BUCKET:
                self._sum_bucket(bucket)
                bucket = []
            bucket.append(tensor)
        self._sum_bucket(bucket)

    @staticmethod
    def _sum_bucket(bucket: Sequence[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def gather(self, value: list[str]) -> list[str]:
        """The lists of all workers, one after another."""
        if self.size == 1:
            return value
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, value)
        return [entry for part in gathered for entry in part]
