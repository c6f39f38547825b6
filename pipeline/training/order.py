"""The global order of samples: the step number is the whole state."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from pydantic import Field

from pipeline.config import Config
from pipeline.identity import seed_of


class FeedConfig(Config):
    """In which order samples come."""

    seed: int = Field(0, ge=0, lt=2**63, description="seed of the order, of crops, of augmentation and of new weights")
    batch: int = Field(16, ge=1, le=65536, description="views in a batch, over all workers")
    window: int = Field(8, ge=1, le=4096, description="blocks (row groups, shards) whose samples are mixed at a time")


class Place(NamedTuple):
    """Where a sample of the stream lies: in which epoch it comes, in which block, in which row of it."""

    epoch: int
    block: int
    row: int


class GlobalOrder:
    """The stream of samples.

    Args:
        counts: Samples of every block.
        config: Seed, batch size, window.
    """

    def __init__(self, counts: Sequence[int], config: FeedConfig) -> None:
        self._counts = np.asarray(counts, np.int64)
        self._config = config
        self.samples_per_epoch = int(self._counts.sum())
        self._epoch = lru_cache(maxsize=2)(self._arrange)
        self._window = lru_cache(maxsize=4)(self._permute)

    def batch(self, step: int) -> list[Place]:
        """All places of a global batch; an epoch's last partial batch is filled up from the next epoch."""
        first = step * self._config.batch
        return [self.place(index) for index in range(first, first + self._config.batch)]

    def place(self, index: int) -> Place:
        """Where sample `index` of the endless stream lies."""
        epoch, position = divmod(index, self.samples_per_epoch)
        _, ends = self._epoch(epoch)
        window = bisect_right(ends, position)
        begin = ends[window - 1] if window else 0
        blocks, rows = self._window(epoch, window)
        return Place(epoch, int(blocks[position - begin]), int(rows[position - begin]))

    def _arrange(self, epoch: int) -> tuple[list[np.ndarray], list[int]]:
        """The windows of an epoch, each an array of blocks, and the position where each ends."""
        blocks = _generator(self._config.seed, "blocks", epoch).permutation(len(self._counts))
        windows = np.split(blocks, range(self._config.window, len(blocks), self._config.window))
        return windows, list(accumulate(int(self._counts[window].sum()) for window in windows))

    def _permute(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Block and row of every position of a window."""
        members = self._epoch(epoch)[0][window]
        blocks = np.repeat(members, self._counts[members])
        rows = np.concatenate([np.arange(int(self._counts[block])) for block in members])
        mixed = _generator(self._config.seed, "window", epoch, window).permutation(len(blocks))
        return blocks[mixed], rows[mixed]


def rank_slice(batch: int, rank: int, size: int) -> slice:
    """What of a global batch is a rank's: contiguous, and within one sample as much as any other's."""
    return slice(batch * rank // size, batch * (rank + 1) // size)


def _generator(*parts: str | int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed_of(*parts)))
