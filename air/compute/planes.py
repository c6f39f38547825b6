"""The memory layouts that the CPU kernels share: padded image planes and planar tables of Gaussians.

An image is a float32 array (3, height + 2·PAD_ROWS, stride) whose first 64-byte line starts a row; pixel (row,
column) of the image is element (row + PAD_ROWS, column + PAD_COLUMNS), and everything around it stays zero. The
margins let convolutions and vectors run over the border without a test.

A table of N Gaussians is a float32 array (fields, padded N): one row per field, the number of columns rounded up to
whole vectors, so that one vector holds the same field of LANES neighbouring Gaussians.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

PAD_ROWS = 9
PAD_COLUMNS = 16
BAND_ROWS = 64
"""Images are cut between threads at multiples of this many rows, where every kernel starts afresh anyway."""

GROUP = 16
"""Gaussians in the table are padded to a multiple of this, for 8 and for 16 lanes alike."""


def aligned_zeros(*shape: int) -> FloatArray:
    """A float32 array of zeros whose first element starts a 64-byte cache line."""
    size = int(np.prod(shape))
    buffer = np.zeros(size + GROUP, np.float32)
    start = (-buffer.ctypes.data // 4) % GROUP
    return buffer[start : start + size].reshape(shape)


def image_planes(height: int, width: int) -> FloatArray:
    """Zeroed planes for an image of this size."""
    lines = -(-(width + 2 * PAD_COLUMNS) // GROUP)
    # With an odd number of cache lines to a row, the pixels of a column spread over all sets of the cache.
    stride = (lines | 1) * GROUP
    return aligned_zeros(3, height + 2 * PAD_ROWS, stride)


def pixels(planes: FloatArray, height: int, width: int) -> FloatArray:
    """The image inside its planes: a view of shape (3, height, width)."""
    return planes[:, PAD_ROWS : PAD_ROWS + height, PAD_COLUMNS : PAD_COLUMNS + width]


def table(fields: int, count: int) -> FloatArray:
    """A zeroed table of `count` Gaussians."""
    return aligned_zeros(fields, max(-(-count // GROUP), 1) * GROUP)
