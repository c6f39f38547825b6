"""Images of different sizes in one buffer, as the CUDA kernels read them.

A pixel is four floats, red, green, blue and an unused zero, so that one 16-byte access moves it whole. Around every
image lie zeros as far as the SSIM window reaches: rows above and below, columns to the left. The right margin of a row
is the left margin of the next. So convolutions need no test at the border: the zeros are their padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

_FLOATS = 4

# Kernels read global numbers only as tl.constexpr.
PIXEL = tl.constexpr(_FLOATS)
"""Floats of a pixel."""

MARGIN = 5
"""Pixels of margin, the reach of the SSIM window; `air.loss.cuda` checks that its window fits."""

TAIL = 256
"""Pixels behind the last image: a block of lanes that starts inside an image may read, never write, that far."""

ORIGIN, HEIGHT, WIDTH, STRIDE = (tl.constexpr(column) for column in range(4))
IMAGE_COLUMNS = tl.constexpr(4)
"""Columns of the table: the first pixel's place, rows, columns, pixels from row to row; all counted in pixels."""


class RaggedImages:
    """Where each image of a batch lies in a buffer.

    Args:
        sizes: (height, width) of every image.
        device: Where tables and buffers are.

    Attributes:
        table: int64 (images, 4): ORIGIN, HEIGHT, WIDTH, STRIDE.
        sizes: As given.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.sizes = tuple(sizes)
        self.device = device
        rows = []
        start = 0
        for height, width in self.sizes:
            stride = width + MARGIN
            rows.append((start + MARGIN * stride + MARGIN, height, width, stride))
            start += (height + 2 * MARGIN) * stride + MARGIN
        self._origins = [(origin, stride) for origin, _, _, stride in rows]
        self._pixels = start + TAIL
        self.table = torch.tensor(rows, dtype=torch.int64, device=device)

    def buffer(self, maps: int = 1) -> Tensor:
        """Zeros for `maps` values of every pixel and channel, float32 (maps, pixels, PIXEL)."""
        return torch.zeros(maps, self._pixels, _FLOATS, device=self.device)

    def image(self, buffer: Tensor, index: int) -> Tensor:
        """A view of shape (3, height, width) of one image of a buffer with one map."""
        height, width = self.sizes[index]
        origin, stride = self._origins[index]
        return buffer[0].as_strided((3, height, width), (1, stride * _FLOATS, _FLOATS), origin * _FLOATS)

    def pack(self, images: Sequence[Tensor]) -> Tensor:
        """A new buffer that holds images of shape (3, height, width)."""
        buffer = self.buffer()
        for index, image in enumerate(images):
            self.image(buffer, index).copy_(image)
        return buffer
