"""BT.601: red, green and blue <-> luma Y and the differences Cr and Cb, which range over -½ to ½.

    Y = 0.299 R + 0.587 G + 0.114 B        R = Y + 1.402 Cr
    Cr = (R - Y) / 1.402                   B = Y + 1.772 Cb
    Cb = (B - Y) / 1.772                   G = Y - 0.714136286201022 Cr - 0.344136286201022 Cb

docs/format.md specifies these decimal numbers, so that all decoders agree bit for bit.
"""

from __future__ import annotations

import numpy as np

LUMA_OF_RED, LUMA_OF_GREEN, LUMA_OF_BLUE = 0.299, 0.587, 0.114
"""Y of pure red, green and blue."""

RED_BY_CR, BLUE_BY_CB = 1.402, 1.772
GREEN_BY_CR, GREEN_BY_CB = -0.714136286201022, -0.344136286201022
"""What a unit of Cr or Cb adds to red, blue and green."""

TO_RGB = np.array([[1, RED_BY_CR, 0], [1, GREEN_BY_CR, GREEN_BY_CB], [1, 0, BLUE_BY_CB]])
"""The matrix from (Y, Cr, Cb) to (R, G, B), float64."""
