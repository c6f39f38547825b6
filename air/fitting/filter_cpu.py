"""The matched filter of `air.fitting.residual` and the search for its peaks in compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from air.compute.compile import LANES, KernelSet, kernel
from air.compute.planes import FloatArray
from air.compute.simd import any_positive, fma, lane_numbers, load, maximum, splat, store, where_ge


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


@kernel
def find_peaks(colours, height, width, row_length, energy, places):
    """The squared length of every pixel's colour, and the places of its peaks; returns how many there are.

    A peak is above zero and at least as large as the eight pixels around it. Rows of the three planes of colours are
    whole vectors, `row_length` long. `energy` is zero and has one vector more on either side of a row, and one row more
    above and below. `places` takes the peaks' places among the pixels, in order.
    """
    stride = row_length + 2 * LANES
    plane = height * row_length
    for row in range(height):
        start = row * row_length
        out = (row + 1) * stride + LANES
        for column in range(0, row_length, LANES):
            red = load(colours, start + column)
            green = load(colours, plane + start + column)
            blue = load(colours, 2 * plane + start + column)
            length = fma(blue, blue, fma(green, green, red * red))
            # The filter spreads the image beyond its border, where no Gaussian may be.
            store(energy, out + column, where_ge(np.float32(width - 1 - column), lane_numbers(), length, splat(0.0)))
    found = 0
    for row in range(height):
        start = (row + 1) * stride + LANES
        for column in range(0, row_length, LANES):
            i = start + column
            middle = load(energy, i)
            largest = maximum(load(energy, i - 1), load(energy, i + 1))
            for other in (i - stride, i + stride):
                largest = maximum(largest, maximum(load(energy, other - 1), load(energy, other + 1)))
                largest = maximum(largest, load(energy, other))
            if any_positive(where_ge(middle, largest, middle, splat(0.0))):
                for j in range(i, i + LANES):
                    value = energy[j]
                    if (
                        value > 0
                        and value >= energy[j - 1]
                        and value >= energy[j + 1]
                        and value >= energy[j - stride]
                        and value >= energy[j - stride - 1]
                        and value >= energy[j - stride + 1]
                        and value >= energy[j + stride]
                        and value >= energy[j + stride - 1]
                        and value >= energy[j + stride + 1]
                    ):
                        places[found] = row * width + j - start
                        found += 1
    return found


def largest_peaks(colours: FloatArray, count: int) -> NDArray[np.int64]:
    """Places among the pixels of the `count` largest peaks of the squared length of colours (3, height, width).

    The largest comes first, and of equal ones the first in the image. Where there are fewer peaks, the other pixels
    that are not zero follow in the same order.
    """
    _, height, width = colours.shape
    padded = _whole_vectors(colours)
    row_length = padded.shape[2]
    energy = np.zeros((height + 2, row_length + 2 * LANES), np.float32)
    places = np.empty(height * width, np.int64)
    found = find_peaks(padded, height, width, row_length, energy.reshape(-1), places)
    inside = energy[1:-1, LANES : LANES + width]
    peaks = places[:found]
    chosen = _largest(inside[peaks // width, peaks % width], peaks, count)
    if len(chosen) == count:
        return chosen
    rest = inside.flatten()
    rest[peaks] = 0
    others = np.flatnonzero(rest)
    return np.concatenate([chosen, _largest(rest[others], others, count - len(chosen))])


def _largest(values: FloatArray, places: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The places of the `count` largest values, in falling order, and of equal values in the order that they have."""
    if count < len(values):
        threshold = np.partition(values, len(values) - count)[len(values) - count] if count else np.inf
        chosen = np.flatnonzero(values >= threshold)
        if len(chosen) > count:
            equal = np.flatnonzero(values == threshold)
            chosen = np.setdiff1d(chosen, equal[count - len(chosen) :], assume_unique=True)
        values, places = values[chosen], places[chosen]
    return places[np.argsort(-values, kind="stable")]


def _whole_vectors(image: FloatArray) -> FloatArray:
    """The image with zeros at the ends of its rows, so that they are whole vectors."""
    width = image.shape[2]
    whole = -(-width // LANES) * LANES
    return np.ascontiguousarray(image) if width == whole else np.pad(image, ((0, 0), (0, 0), (0, whole - width)))


def filter_symmetrically(image: FloatArray, taps: Sequence[float]) -> FloatArray:
    """Convolution of every channel along both axes with taps[|distance|], zeros beyond the border."""
    _, height, width = image.shape
    # Zeros fill the last vector of a row: they add nothing to the pixels at the row's end.
    padded = _whole_vectors(image)
    whole = padded.shape[2]
    out = np.empty_like(padded)
    scratch = np.zeros(whole + 2 * (len(taps) - 1), np.float32)
    filter_rows_and_columns(padded, height, whole, np.array(taps, np.float32), scratch, out)
    return out if width == whole else np.ascontiguousarray(out[:, :, :width])


def _use_each() -> None:
    largest_peaks(filter_symmetrically(np.zeros((3, 1, 1), np.float32), [1.0]), 0)


KERNELS = KernelSet((filter_rows_and_columns, find_peaks), _use_each, seconds=2)
"""The kernels of the matched filter."""
