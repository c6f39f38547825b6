"""The least that a step on the CPU can cost: what the method must compute and move, over what this machine reaches.

**Counted** is what the method needs, not what our kernels do. An operation is one fused multiply-add, addition,
multiplication, comparison or selection of float32 numbers, each of which takes a vector unit's slot once. A division
or a root counts as 4 (an estimate and a Newton step), an exponential as 10 (reduction, polynomial, scaling). Not
counted: lanes that stand outside a support, addresses, branches, horizontal sums within a vector, waiting.

- *activate*, per Gaussian: eight squashed numbers of 16 operations, 2 to reduce the angle; 40 bytes read, 32 written.
- *draw*, per pixel inside a support: 2 for the recurrence of the weight, 3 to add a colour; 12 bytes of the image
  read and written in the nearest cache. Per column of a support: distance, exponent and the two exponentials that
  start the recurrence. Per Gaussian: its geometry. The image is written once.
- *loss*, per pixel and channel: 3 convolutions before and 3 after the formula, along columns and rows, with 11
  symmetric taps each (5 additions, 6 products); 2 products before, 28 operations for SSIM and its three derivatives,
  13 for L1, the gradient and the sums. Image, target and the target's two moments are read once, the gradient is
  written once.
- *gather*, per pixel inside a support: 2 for the recurrence, 3 for the sums per channel, 3 for the product of colour
  and gradient, 4 for the moments; 12 bytes read in the nearest cache. Per column: as to draw, and 14 for moments. Per
  Gaussian: the chain rule to its parameters. The gradient image is read once.
- *update* by Adam, per raw number: 4 for the derivative of its activation, 16 for the update; number and moments read
  and written.

**Reached** are three speeds, measured with small kernels of the same vectors on as many threads, the best of many
runs of a few milliseconds: multiply-adds in registers; bytes between registers and the nearest cache; and bytes
streamed through buffers as large as those of the step. The two in bytes are the better of reading, and of reading and
writing back.

A part's floor is the largest of its three quotients, a step's the sum over parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
from workload import Size, Support

from air.compute.compile import LANES
from air.compute.planes import FloatArray, aligned_zeros
from air.compute.simd import fma, load, splat, store
from air.compute.threads import Workers

_DIVISION, _EXPONENTIAL = 4, 10
_SQUASH = _EXPONENTIAL + 1 + _DIVISION + 1
_COLUMN_START = 2 + 4 + 2 + 2 * _EXPONENTIAL
_COLUMN_MOMENTS = 14
_GEOMETRY = 60
_CHAIN = 60
_BLUR = 11
_LOSS = 2 + 3 * 2 * _BLUR + 28 + 3 * 2 * _BLUR + 13
_SLOPE = 4
_UPDATE = 8 + 2 * _DIVISION
_FLOAT = 4

_NEAR_FLOATS = 4096
"""Numbers of a buffer that stays in the nearest cache: 16 KiB."""


@dataclass(frozen=True)
class Need:
    """Operations, bytes between registers and the nearest cache, and bytes to and from the buffers of the step."""

    operations: float
    near_bytes: float
    far_bytes: float


def count_needs(size: Size, support: Support) -> dict[str, Need]:
    """What each part of a step needs; see the module's docstring."""
    values = 3 * size.height * size.width
    gaussians = size.gaussians
    numbers = 8 * gaussians
    pixels, columns = support.pixels, support.columns
    table = numbers * _FLOAT
    return {
        "activate": Need(numbers * _SQUASH + 2 * gaussians, 0, 2 * table + 2 * gaussians * _FLOAT),
        "draw": Need(
            5 * pixels + _COLUMN_START * columns + _GEOMETRY * gaussians, 6 * _FLOAT * pixels, table + values * _FLOAT
        ),
        "loss": Need(_LOSS * values, 0, 5 * _FLOAT * values),
        "gather": Need(
            12 * pixels + (_COLUMN_START + _COLUMN_MOMENTS) * columns + _CHAIN * gaussians,
            3 * _FLOAT * pixels,
            table + values * _FLOAT,
        ),
        "update": Need((_SLOPE + _UPDATE) * numbers, 0, 6 * table),
    }


@dataclass(frozen=True)
class Speeds:
    """What this machine reaches: operations a second, and bytes a second in the nearest cache and far from it."""

    operations: float
    near: float
    far: float

    def seconds(self, need: Need) -> float:
        return max(need.operations / self.operations, need.near_bytes / self.near, need.far_bytes / self.far)


_CHAINS = 12


@numba.njit(nogil=True)
def _multiply_add(out, rounds):
    """12 chains of multiply-adds: more than two units with a latency of four or five can keep in flight."""
    a = b = c = d = e = f = g = h = i = j = k = m = splat(out[0])
    scale, shift = splat(np.float32(0.999)), splat(np.float32(0.001))
    for _ in range(rounds):
        a = fma(a, scale, shift)
        b = fma(b, scale, shift)
        c = fma(c, scale, shift)
        d = fma(d, scale, shift)
        e = fma(e, scale, shift)
        f = fma(f, scale, shift)
        g = fma(g, scale, shift)
        h = fma(h, scale, shift)
        i = fma(i, scale, shift)
        j = fma(j, scale, shift)
        k = fma(k, scale, shift)
        m = fma(m, scale, shift)
    store(out, 0, a + b + c + d + e + f + g + h + i + j + k + m)


@numba.njit(nogil=True)
def _read(buffer, out, rounds):
    """Adds up a buffer whose size is a multiple of eight vectors."""
    a = b = c = d = e = f = g = h = splat(np.float32(0))
    for _ in range(rounds):
        for start in range(0, buffer.size, 8 * LANES):
            a = a + load(buffer, start)
            b = b + load(buffer, start + LANES)
            c = c + load(buffer, start + 2 * LANES)
            d = d + load(buffer, start + 3 * LANES)
            e = e + load(buffer, start + 4 * LANES)
            f = f + load(buffer, start + 5 * LANES)
            g = g + load(buffer, start + 6 * LANES)
            h = h + load(buffer, start + 7 * LANES)
    store(out, 0, a + b + c + d + e + f + g + h)


@numba.njit(nogil=True)
def _update(buffer, rounds):
    """Adds to every number of such a buffer, as drawing does."""
    one = splat(np.float32(1))
    for _ in range(rounds):
        for start in range(0, buffer.size, 4 * LANES):
            store(buffer, start, load(buffer, start) + one)
            store(buffer, start + LANES, load(buffer, start + LANES) + one)
            store(buffer, start + 2 * LANES, load(buffer, start + 2 * LANES) + one)
            store(buffer, start + 3 * LANES, load(buffer, start + 3 * LANES) + one)


class Speedometer:
    """Measures `Speeds` again and again and keeps each thread's best, since other work can only slow it down.

    Args:
        workers: The threads to measure with, all at once.
        size: Its buffers say how large `far` is: image, target, two moments, gradient, and four tables of Gaussians.
    """

    def __init__(self, workers: Workers, size: Size) -> None:
        self._workers = workers
        floats = 5 * 3 * size.height * size.width + 4 * 8 * size.gaussians
        share = floats // workers.count // (8 * LANES) * 8 * LANES
        self._near = [aligned_zeros(_NEAR_FLOATS) for _ in range(workers.count)]
        self._far = [aligned_zeros(share) for _ in range(workers.count)]
        self._outs = [aligned_zeros(LANES) for _ in range(workers.count)]
        self._best = np.zeros((3, workers.count))
        self._sample(0)  # compiles
        self._best[:] = 0

    def sample(self) -> None:
        """One measurement of a few milliseconds of each speed."""
        self._workers.run(self._sample, [(thread,) for thread in range(self._workers.count)])

    def _sample(self, thread: int) -> None:
        out = self._outs[thread]
        rounds = 400_000
        operations = rounds * _CHAINS * LANES / _seconds(lambda: _multiply_add(out, rounds))
        near = _bytes_per_second(self._near[thread], out, 20_000)
        far = _bytes_per_second(self._far[thread], out, 1)
        self._best[:, thread] = np.maximum(self._best[:, thread], (operations, near, far))

    def speeds(self) -> Speeds:
        """The best so far, of all threads together."""
        return Speeds(*self._best.sum(axis=1).tolist())


def _bytes_per_second(buffer: FloatArray, out: FloatArray, rounds: int) -> float:
    size = rounds * buffer.nbytes
    return max(
        size / _seconds(lambda: _read(buffer, out, rounds)), 2 * size / _seconds(lambda: _update(buffer, rounds))
    )


def _seconds(function: Callable[[], None]) -> float:
    """Of this thread's CPU time, so that it does not matter when the thread has to wait for a core."""
    start = time.thread_time()
    function()
    return time.thread_time() - start
