"""Compiled kernels around the patches of an image: their errors, their pixels side by side, and a matched filter.

Patches that stick out are continued by the image's border. Images are float32 arrays (3, height, width).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from air.compute.planes import FloatArray
from air.compute.simd import LANES, fma, kernel, load, splat, store
from air.loss.reference import SSIM_C1, SSIM_C2


@kernel
def measure_patches(drawn, image, patch_size, c1, c2, mse, dssim):
    """Mean squared error and 1 - SSIM (method.md section 3) of all patches, row-major, into two float64 arrays.

    Sums are float64: a variance is the difference of large numbers.
    """
    channels, height, width = image.shape
    rows = -(-height // patch_size)
    columns = -(-width // patch_size)
    share = 1.0 / (patch_size * patch_size)
    for row in range(rows):
        for column in range(columns):
            squared = 0.0
            similar = 0.0
            for channel in range(channels):
                sum_x = 0.0
                sum_y = 0.0
                sum_xx = 0.0
                sum_yy = 0.0
                sum_xy = 0.0
                for i in range(row * patch_size, (row + 1) * patch_size):
                    inside = min(i, height - 1)
                    for j in range(column * patch_size, (column + 1) * patch_size):
                        x = np.float64(drawn[channel, inside, min(j, width - 1)])
                        y = np.float64(image[channel, inside, min(j, width - 1)])
                        sum_x += x
                        sum_y += y
                        sum_xx += x * x
                        sum_yy += y * y
                        sum_xy += x * y
                        squared += (x - y) * (x - y)
                mean_x = sum_x * share
                mean_y = sum_y * share
                spread = (sum_xx + sum_yy) * share - mean_x * mean_x - mean_y * mean_y
                covariance = sum_xy * share - mean_x * mean_y
                similar += ((2.0 * mean_x * mean_y + c1) * (2.0 * covariance + c2)) / (
                    (mean_x * mean_x + mean_y * mean_y + c1) * (spread + c2)
                )
            patch = row * columns + column
            mse[patch] = squared * share / channels
            dssim[patch] = 1.0 - similar / channels


def patch_errors(drawn: FloatArray, image: FloatArray, patch_size: int) -> tuple[NDArray[np.float64], ...]:
    """Mean squared error and 1 - SSIM of every patch of two images of shape (3, height, width), row-major.

    Raises:
        ValueError: The images are not of one size.
    """
    if drawn.shape != image.shape:
        raise ValueError(f"images {drawn.shape} and {image.shape} are not of one size")
    _, height, width = image.shape
    mse = np.empty(-(-height // patch_size) * -(-width // patch_size))
    dssim = np.empty_like(mse)
    measure_patches(drawn, image, patch_size, SSIM_C1, SSIM_C2, mse, dssim)
    return mse, dssim


@kernel
def gather_pixels(image, row_stride, channel_stride, height, width, patch_size, end, out):
    """Writes the pixels of every patch as a row: channel, then row, then column.

    `image` starts with the first pixel and may be read up to the offset `end`. Pixels are copied LANES at a time:
    what is too much is overwritten by the next, so `out`, flat, has LANES floats more than it needs.
    """
    channels = 3
    rows = -(-height // patch_size)
    columns = -(-width // patch_size)
    at = 0
    for row in range(rows):
        for column in range(columns):
            left = column * patch_size
            whole = left + patch_size <= width
            for channel in range(channels):
                for i in range(row * patch_size, (row + 1) * patch_size):
                    source = channel * channel_stride + min(i, height - 1) * row_stride
                    if whole and source + left + patch_size + LANES <= end:
                        for j in range(0, patch_size, LANES):
                            store(out, at + j, load(image, source + left + j))
                    else:
                        for j in range(patch_size):
                            out[at + j] = image[source + min(left + j, width - 1)]
                    at += patch_size


def patch_pixels(image: FloatArray, patch_size: int) -> FloatArray:
    """The pixels of every patch, shape (rows · columns, 3 · patch_size²), patches row-major.

    `image` is (3, height, width); a view whose pixels of a row lie together is read as it is.
    """
    if image.strides[2] != image.itemsize:
        image = np.ascontiguousarray(image)
    _, height, width = image.shape
    patches = -(-height // patch_size) * -(-width // patch_size)
    shape = (patches, 3 * patch_size * patch_size)
    channel_stride, row_stride, _ = (stride // image.itemsize for stride in image.strides)
    end = 2 * channel_stride + (height - 1) * row_stride + width
    flat = np.lib.stride_tricks.as_strided(image, (end,), (image.itemsize,))
    out = np.empty(shape[0] * shape[1] + LANES, np.float32)
    gather_pixels(flat, row_stride, channel_stride, height, width, patch_size, end, out)
    return out[: shape[0] * shape[1]].reshape(shape)


@kernel
def filter_rows_and_columns(image, height, width, taps, scratch, out):
    """Convolution along both axes with taps[|distance|], of three planes whose rows are whole vectors.

    `scratch` is such a row with zeros on either side, as many as the taps reach or more.
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
    # Zeros fill the last vector of a row, so that what it adds to the row's end is nothing.
    padded = image if width == whole else np.pad(image, ((0, 0), (0, 0), (0, whole - width)))
    out = np.empty_like(padded)
    scratch = np.zeros(whole + 2 * (len(taps) - 1), np.float32)
    filter_rows_and_columns(padded, height, whole, np.array(taps, np.float32), scratch, out)
    return out if width == whole else np.ascontiguousarray(out[:, :, :width])


ALL_KERNELS = (measure_patches, gather_pixels, filter_rows_and_columns)
"""Every kernel of this module."""


def use_each() -> None:
    """Uses each kernel once, so that it is compiled or loaded."""
    image = np.zeros((3, 1, 1), np.float32)
    patch_errors(image, image, 1)
    patch_pixels(image, 1)
    filter_symmetrically(image, [1.0])
