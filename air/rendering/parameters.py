"""What the compiled backends hold of a Gaussian: eight float32 parameters, in this order, and their bounds."""

from __future__ import annotations

import math

from torch import Tensor

# An angle is held in half turns, -½ to ½: θ and θ + π are the same Gaussian.
X, Y, SCALE_1, SCALE_2, HALF_TURNS, RED, GREEN, BLUE = range(8)
PARAMETERS = 8

OFF_IMAGE = -1e6
"""Where Gaussians that only fill a place in a table are centred, in pixels, so that they touch no pixel."""

SMALLEST_SCALE, LARGEST_SCALE = 1e-6, 1e8
"""Kernels move scales into this range, in pixels: there even the fourth power of a scale is a normal float32."""


def half_turns(angle: Tensor) -> Tensor:
    """Angles in radians as half turns within ±½, float64, which keeps large angles exact; shape as given."""
    turns = angle.double() / math.pi
    return turns - turns.round()
