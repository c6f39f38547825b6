"""Threads for the CPU kernels, which release Python's global lock while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import torch

from air.compute.planes import BAND_ROWS, GROUP


def _ranges(size: int, parts: int, multiple: int) -> list[tuple[int, int]]:
    """At most `parts` ranges that cover 0 .. size - 1, cut at multiples of `multiple`."""
    blocks = -(-size // multiple)
    cuts = [blocks * part // parts * multiple for part in range(parts)] + [size]
    return [(first, end) for first, end in pairwise(cuts) if first < end]


def bands(height: int, parts: int) -> list[tuple[int, int]]:
    """At most `parts` ranges of rows (first, end)."""
    return _ranges(height, parts, BAND_ROWS)


def groups(padded_count: int, parts: int) -> list[tuple[int, int]]:
    """At most `parts` ranges of whole groups of Gaussians (first, end)."""
    return _ranges(padded_count, parts, GROUP)


@contextmanager
def limit_torch(threads: int) -> Iterator[None]:
    """Within, torch computes with `threads` threads on the CPU; afterwards with as many as before.

    Torch rounds some sums and matrix products differently with another number of threads.

    Raises:
        ValueError: `threads` is below one.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Workers:
    """Up to `count` threads that run a function over a list of arguments; the caller's thread is one of them.

    Raises:
        ValueError: `count` is below one.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"threads must be at least 1, got {count}")
        self.count = count
        self._pool = ThreadPoolExecutor(count - 1) if count > 1 else None

    def run(self, function: Callable[..., None], tasks: Iterable[tuple[int, ...]]) -> None:
        """Calls function(*task) for every task and waits; the caller's thread does a part of the tasks."""
        tasks = list(tasks)
        if self._pool is None or len(tasks) < 2:
            for task in tasks:
                function(*task)
            return
        # Tasks are of about equal size, so they are dealt out like cards; the caller's thread takes the first hand.
        hands = [tasks[k :: self.count] for k in range(self.count)]

        def play(hand: list[tuple[int, ...]]) -> None:
            for task in hand:
                function(*task)

        others = [self._pool.submit(play, hand) for hand in hands[1:] if hand]
        play(hands[0])
        for other in others:
            other.result()

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
