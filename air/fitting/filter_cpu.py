"""The matched filter of `air.fitting.residual` in a compiled kernel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from air.compute.compile import LANES, KernelSet, kernel
from air.compute.planes import FloatArray
from air.compute.simd import fma, load, splat, store


@kernel
def filter_rows_and_columns(image, height, width, taps, scratch, out):
    """Convolution along both axes with taps[|distance|], of three planes whose rows are whole vectors.

    `scratch` is one row with zeros on either side, at least as many as the taps reach.
    """
    radius = len(taps) - 1
    margin = (len(scratch) - width) // 2
    for channel in range(3):
        for row in range(height):
            start = (channel * height + row) * width
            for column in range(0, width, LANES):
                total = load(image, start + column) * taps[0]
                for distance in range(1, radius + 1):
                    if row >= distance:
                        total = fma(load(image, start + column - distance * width), splat(taps[distance]), total)
                    if row + distance < height:
                        total = fma(load(image, start + column + distance * width), splat(taps[distance]), total)
                store(scratch, margin + column, total)
            for column in range(0, width, LANES):
                total = load(scratch, margin + column) * taps[0]
                for distance in range(1, radius + 1):
                    left = load(scratch, margin + column - distance)
                    right = load(scratch, margin + column + distance)
                    total = fma(left + right, splat(taps[distance]), total)
                store(out, start + column, total)


def filter_symmetrically(image: FloatArray, taps: Sequence[float]) -> FloatArray:
    """Convolution of every channel along both axes with taps[|distance|], zeros beyond the border."""
    _, height, width = image.shape
    whole = -(-width // LANES) * LANES
    # Zeros fill the last vector of a row: they add nothing to the pixels at the row's end.
    padded = image if width == whole else np.pad(image, ((0, 0), (0, 0), (0, whole - width)))
    out = np.empty_like(padded)
    scratch = np.zeros(whole + 2 * (len(taps) - 1), np.float32)
    filter_rows_and_columns(padded, height, whole, np.array(taps, np.float32), scratch, out)
    return out if width == whole else np.ascontiguousarray(out[:, :, :width])


def _use_each() -> None:
    filter_symmetrically(np.zeros((3, 1, 1), np.float32), [1.0])


KERNELS = KernelSet((filter_rows_and_columns,), _use_each, seconds=1)
"""The kernel of the matched filter."""
