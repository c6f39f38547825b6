"""Training samples in one global order that no worker, restart or number of workers changes.

Samples lie in blocks: row groups of targets, or shards of images. Every epoch shuffles the blocks, groups them in
windows and permutes the samples of each window. That order is a pure function of (seed, epoch, block sizes), so it is
not stored. The stream of epochs is cut into global batches of constant size, and every rank takes its slice of each.
The step number is the whole state.

This module knows the sizes of blocks and nothing else of them; `pipeline.inputs.blocks` finds and reads them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from pydantic import Field

from pipeline.config import Config
from pipeline.identity import seed_of


class FeedConfig(Config):
    """The order of samples."""

    seed: int = Field(
        0, ge=0, lt=2**63, description="seed of the order, of crops, of augmentation and of fresh weights"
    )
    batch: int = Field(16, ge=1, le=65536, description="views in a batch, over all workers")
    window: int = Field(8, ge=1, le=4096, description="blocks (row groups, shards) whose samples are mixed at a time")


class Place(NamedTuple):
    """The place of a sample in the stream.

    Attributes:
        epoch: Number of the epoch.
        block: Number of the block that holds the sample.
        row: Number of the sample in its block.
    """

    epoch: int
    block: int
    row: int


class GlobalOrder:
    """The endless stream of samples, one epoch after another.

    Args:
        counts: Number of samples in each block.
        config: Seed, batch size, window.
    """

    def __init__(self, counts: Sequence[int], config: FeedConfig) -> None:
        self._counts = np.asarray(counts, np.int64)
        self._config = config
        self.samples_per_epoch = int(self._counts.sum())
        self._epoch = lru_cache(maxsize=2)(self._arrange)
        self._window = lru_cache(maxsize=4)(self._permute)

    def batch(self, step: int) -> list[Place]:
        """The places of a global batch; the next epoch fills up the last batch of an epoch."""
        first = step * self._config.batch
        return [self.place(index) for index in range(first, first + self._config.batch)]

    def parts(self, step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The places of a global batch as arrays of blocks and rows, window by window: `batch` for large batches."""
        index = step * self._config.batch
        end = index + self._config.batch
        while index < end:
            epoch, position = divmod(index, self.samples_per_epoch)
            window = bisect_right(ends := self._epoch(epoch)[1], position)
            begin = ends[window - 1] if window else 0
            blocks, rows = self._window(epoch, window)
            taken = slice(position - begin, min(position - begin + end - index, len(blocks)))
            yield blocks[taken], rows[taken]
            index += taken.stop - taken.start

    def place(self, index: int) -> Place:
        """The place of sample `index` of the stream."""
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
    """A rank's part of a global batch: contiguous; parts of different ranks differ by one sample at most."""
    return slice(batch * rank // size, batch * (rank + 1) // size)


def _generator(*parts: str | int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed_of(*parts)))
