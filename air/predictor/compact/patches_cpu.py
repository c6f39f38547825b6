"""The pixels of every patch side by side, in a compiled kernel."""

from __future__ import annotations

import numpy as np

from air.compute.compile import LANES, KernelSet, kernel
from air.compute.planes import FloatArray
from air.compute.simd import load, store


@kernel
def gather_pixels(image, row_stride, channel_stride, height, width, patch_size, end, out):
    """Writes the pixels of every patch as a row: channel, then row, then column.

    `image` starts with the first pixel and may be read up to the offset `end`. Pixels are copied LANES at a time. The
    next copy overwrites the surplus, so `out`, flat, has LANES floats more than the pixels take.
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

    `image` is (3, height, width). A view is read without a copy if the pixels of a row are contiguous.
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


def _use_each() -> None:
    patch_pixels(np.zeros((3, 1, 1), np.float32), 1)


KERNELS = KernelSet((gather_pixels,), _use_each, seconds=1)
"""The kernel that gathers patches."""
