"""The matched filter of `air.fitting.residual` and the search for its peaks in compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from air.compute.compile import LANES, KernelSet, inline, kernel
from air.compute.planes import FloatArray
from air.compute.simd import aligned_scratch, fma, lane_numbers, lane_sum, load, maximum, splat, store, where_ge


@inline
def _filter_row(image, height, row_length, channel, row, taps, scratch, out, start):
    """One row of `filter_rows_and_columns`, into `out` from `start` on."""
    radius = len(taps) - 1
    margin = (len(scratch) - row_length) // 2
    first = (channel * height + row) * row_length
    for column in range(0, row_length, LANES):
        total = load(image, first + column) * taps[0]
        for distance in range(1, radius + 1):
            if row >= distance:
                total = fma(load(image, first + column - distance * row_length), splat(taps[distance]), total)
            if row + distance < height:
                total = fma(load(image, first + column + distance * row_length), splat(taps[distance]), total)
        store(scratch, margin + column, total)
    for column in range(0, row_length, LANES):
        total = load(scratch, margin + column) * taps[0]
        for distance in range(1, radius + 1):
            left = load(scratch, margin + column - distance)
            right = load(scratch, margin + column + distance)
            total = fma(left + right, splat(taps[distance]), total)
        store(out, start + column, total)


@kernel
def filter_rows_and_columns(image, height, width, taps, scratch, out):
    """Convolution along both axes with taps[|distance|], of three planes whose rows are whole vectors.

    `scratch` is one row with zeros on either side, at least as many as the taps reach.
    """
    for channel in range(3):
        for row in range(height):
            _filter_row(image, height, width, channel, row, taps, scratch, out, (channel * height + row) * width)


@kernel
def find_peaks(image, height, width, taps, scratch, take_peaks, places, found):
    """Filters as `filter_rows_and_columns`; writes the pixels that are peaks, or those that are not, and counts them.

    A peak is a pixel whose filtered colour's squared length is above zero and at least as large as at the eight pixels
    around it. Other pixels are those that are above zero and no peaks. `places` takes their numbers, row-major, and
    `found` rows of the squared length and the three colours.

    Three rows are held at a time, so that no image is written. `width` counts the pixels of a row that are inside; the
    rows of `image` are whole vectors.
    """
    row_length = image.shape[2]
    colour_rows = aligned_scratch(9 * row_length)
    stride = row_length + 2 * LANES  # with zeros on either side
    lengths = aligned_scratch(3 * stride)
    largest = aligned_scratch(row_length)
    count = 0
    for row in range(height + 1):
        ring = row % 3
        for column in range(0, row_length, LANES):
            store(lengths, ring * stride + LANES + column, splat(np.float32(0)))
        if row < height:
            for channel in range(3):
                start = (3 * ring + channel) * row_length
                _filter_row(image, height, row_length, channel, row, taps, scratch, colour_rows, start)
            for column in range(0, row_length, LANES):
                start = 3 * ring * row_length + column
                red = load(colour_rows, start)
                green = load(colour_rows, start + row_length)
                blue = load(colour_rows, start + 2 * row_length)
                length = fma(blue, blue, fma(green, green, red * red))
                # The filter spreads the image beyond its border.
                inside = where_ge(np.float32(width - 1 - column), lane_numbers(), length, np.float32(0))
                store(lengths, ring * stride + LANES + column, inside)
        if row == 0:
            continue
        ring = (row - 1) % 3
        here = ring * stride + LANES
        above = (row + 1) % 3 * stride + LANES
        below = row % 3 * stride + LANES
        for column in range(0, row_length, LANES):
            most = maximum(load(lengths, here + column - 1), load(lengths, here + column + 1))
            for start in (above + column, below + column):
                most = maximum(most, maximum(load(lengths, start - 1), load(lengths, start + 1)))
                most = maximum(most, load(lengths, start))
            store(largest, column, most)
        for column in range(width):
            length = lengths[here + column]
            if length > 0 and (length >= largest[column]) == take_peaks:
                places[count] = (row - 1) * width + column
                found[count, 0] = length
                for channel in range(3):
                    found[count, 1 + channel] = colour_rows[(3 * ring + channel) * row_length + column]
                count += 1
    return count


@inline
def _structure_tensor_near_border(image, height, width, x, y, window, tensors, k):
    """Row k of `structure_tensors`, at pixel (x, y)."""
    reach = len(window) - 1
    xx = np.float32(0)
    xy = np.float32(0)
    yy = np.float32(0)
    for row in range(max(y - reach, 1), min(y + reach, height - 2) + 1):
        for column in range(max(x - reach, 1), min(x + reach, width - 2) + 1):
            weight = window[abs(row - y)] * window[abs(column - x)] * np.float32(0.25)
            for channel in range(3):
                along_x = image[channel, row, column + 1] - image[channel, row, column - 1]
                along_y = image[channel, row + 1, column] - image[channel, row - 1, column]
                xx += weight * along_x * along_x
                xy += weight * along_x * along_y
                yy += weight * along_y * along_y
    tensors[k, 0] = xx
    tensors[k, 1] = xy
    tensors[k, 2] = yy


@kernel
def structure_tensors(image, height, width, places, window, tensors):
    """The structure tensors (xx, xy, yy) of an image around some of its pixels, as rows of `tensors`.

    It is the mean over the window of the products of the central differences along x and y, added up over the channels.
    `window` has the weights by distance along one axis. Pixels on the image's border, and beyond it, count as without
    differences. Rows of `image` are whole vectors; `width` counts the pixels of a row that are inside.
    """
    row_length = image.shape[2]
    reach = len(window) - 1
    weights = aligned_scratch(3 * LANES)  # a pixel's weight by its distance to the right of the middle, from -LANES on
    for distance in range(reach + 1):
        weights[LANES - distance] = window[distance]
        weights[LANES + distance] = window[distance]
    for k in range(len(places)):
        x = places[k] % width
        y = places[k] // width
        if min(x, y, width - 1 - x, height - 1 - y) <= reach:
            _structure_tensor_near_border(image, height, width, x, y, window, tensors, k)
            continue
        # One vector has the window's row; near the right border it begins further left.
        first = min(x - reach, row_length - LANES)
        xx = splat(np.float32(0))
        xy = splat(np.float32(0))
        yy = splat(np.float32(0))
        for row in range(y - reach, y + reach + 1):
            weight = window[abs(row - y)]
            for channel in range(3):
                i = (channel * height + row) * row_length + first
                along_x = load(image, i + 1) - load(image, i - 1)
                along_y = load(image, i + row_length) - load(image, i - row_length)
                weighted = along_x * weight
                xx = fma(weighted, along_x, xx)
                xy = fma(weighted, along_y, xy)
                yy = fma(along_y * weight, along_y, yy)
        across = load(weights, LANES + first - x) * np.float32(0.25)
        tensors[k, 0] = lane_sum(xx * across)
        tensors[k, 1] = lane_sum(xy * across)
        tensors[k, 2] = lane_sum(yy * across)


def largest_peaks(
    image: FloatArray, taps: Sequence[float], window: Sequence[float], count: int
) -> tuple[NDArray[np.int64], FloatArray, FloatArray]:
    """The `count` largest peaks of an image (3, height, width) filtered as by `filter_symmetrically`.

    A peak is one of the squared length of a pixel's colour. The largest comes first, and of equal ones the first in the
    image. Where there are fewer peaks, other pixels that are not zero follow in the same order.

    Returns:
        Places among the pixels (n,), filtered colours (n, 3), and `structure_tensors` of the unfiltered image (n, 3).
    """
    _, height, width = image.shape
    padded, scratch = _whole_vectors(image, taps)
    places = np.empty(height * width, np.int64)
    found = np.empty((height * width, 4), np.float32)
    chosen_places, chosen_colours = [], []
    for take_peaks in (True, False):
        total = find_peaks(padded, height, width, np.array(taps, np.float32), scratch, take_peaks, places, found)
        chosen = _largest(found[:total, 0], count)
        chosen_places.append(places[chosen])
        chosen_colours.append(found[chosen, 1:])
        count -= len(chosen)
        if not count:
            break
    chosen = np.concatenate(chosen_places)
    tensors = np.empty((len(chosen), 3), np.float32)
    structure_tensors(padded, height, width, chosen, np.array(window, np.float32), tensors)
    return chosen, np.concatenate(chosen_colours), tensors


def _largest(values: FloatArray, count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest values, in falling order; equal values stay in order."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    if not count:
        return np.empty(0, np.int64)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    chosen = np.flatnonzero(values >= threshold)
    chosen = chosen[np.argsort(-values[chosen], kind="stable")]
    return chosen[:count]


def _whole_vectors(image: FloatArray, taps: Sequence[float]) -> tuple[FloatArray, FloatArray]:
    """The image with zeros at the ends of its rows, so that they are whole vectors, and a row for the kernels' use."""
    width = image.shape[2]
    whole = -(-width // LANES) * LANES
    # Zeros add nothing to the pixels at a row's end.
    padded = image if width == whole else np.pad(image, ((0, 0), (0, 0), (0, whole - width)))
    return padded, np.zeros(whole + 2 * (len(taps) - 1), np.float32)


def filter_symmetrically(image: FloatArray, taps: Sequence[float]) -> FloatArray:
    """Convolution of every channel along both axes with taps[|distance|], zeros beyond the border."""
    _, height, width = image.shape
    padded, scratch = _whole_vectors(image, taps)
    out = np.empty_like(padded)
    filter_rows_and_columns(padded, height, padded.shape[2], np.array(taps, np.float32), scratch, out)
    return out if out.shape[2] == width else np.ascontiguousarray(out[:, :, :width])


def _use_each() -> None:
    image = np.zeros((3, 1, 1), np.float32)
    filter_symmetrically(image, [1.0])
    largest_peaks(image, [1.0], [1.0], 1)


KERNELS = KernelSet((filter_rows_and_columns, find_peaks, structure_tensors), _use_each, seconds=3)
"""The kernels of the matched filter."""
