"""The workers that train together, and the sums that they form: of gradients and of figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_BUCKET = 16_000_000
"""Numbers that are summed over the workers at once, at most, unless a single tensor has more."""


class Group:
    """The workers that train together. A group of several needs torch.distributed to be initialised.

    Attributes:
        rank: Number of this worker, from 0.
        size: Number of workers.
        device: The device that this worker computes on.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.size = size
        self.device = device or torch.device("cpu")

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replaces every tensor by its sum over the workers."""
        if self.size == 1 or not tensors:
            return
        bucket: list[Tensor] = []
        for tensor in tensors:
            if bucket and sum(map(Tensor.numel, bucket)) + tensor.numel() > _BUCKET:
                self._reduce_bucket(bucket)
                bucket = []
            bucket.append(tensor)
        self._reduce_bucket(bucket)

    @staticmethod
    def _reduce_bucket(bucket: Sequence[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def all_gather(self, value: list[str]) -> list[str]:
        """The lists of all workers, joined in the order of their ranks."""
        if self.size == 1:
            return value
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, value)
        return [entry for part in gathered for entry in part]
