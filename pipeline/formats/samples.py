"""Pixels on their way from a file's samples to sRGB: what the readers of the formats hand on.

This module must not know any format or colour space.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

_GRAY_MODES = ("1", "L", "LA", "La")

# The nearest 8-bit sample of each 16-bit sample: 65535 gives 255, and the error is at most half a level.
_EIGHT_BITS = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)


class Pixels(NamedTuple):
    """Decoded pixels in the file's colour space.

    Attributes:
        colour: A Pillow image of mode L, RGB or CMYK; or an array, (H, W) gray or (H, W, 3) RGB, uint8 or uint16.
        alpha: A Pillow image of mode L; None if nothing is transparent.
    """

    colour: Image.Image | np.ndarray
    alpha: Image.Image | None


def to_eight_bits(samples: np.ndarray) -> np.ndarray:
    """The nearest 8-bit samples of uint16 samples of any shape; uint8 samples as they are."""
    return samples if samples.dtype == np.uint8 else _EIGHT_BITS[samples]


def gray_or_rgb(image: Image.Image) -> Pixels:
    """The pixels of a loaded Pillow image that has 8 bits or fewer a sample."""
    colour, alpha = image, None
    if image.mode == "La":  # Pillow converts it to this mode alone
        image = image.convert("LA")
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        alpha = colour.getchannel("A")
    if image.mode in _GRAY_MODES:
        return Pixels(colour.getchannel("R") if alpha else colour.convert("L"), alpha)
    return Pixels(colour if colour.mode in ("RGB", "CMYK") else colour.convert("RGB"), alpha)
