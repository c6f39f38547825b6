"""Uniform quantisers of Gaussians, one step per channel (method.md section 6).

A `UniformQuantizer` is whole numbers, which a file can hold and from which every machine computes the same float32
values. `fit_uniform_quantizer` takes the ranges from the Gaussians. `air.predictor.quantizer.ImageAdaptiveQuantizer` is
the learned one: steps and lows follow from a network's global feature of the image.

    quantizer = fit_uniform_quantizer(channel_values(gaussians, anchor))
    symbols = quantizer.symbols(channel_values(gaussians, anchor))
    restored = gaussians_from_channels(quantizer.values(symbols), anchor)

This module knows nothing of files or entropy coding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from air.codec.colour import BLUE_BY_CB, LUMA_OF_BLUE, LUMA_OF_GREEN, LUMA_OF_RED, RED_BY_CR
from air.gaussians import Gaussians

CHANNELS = ("x", "y", "scale_1", "scale_2", "angle", "luma", "red_difference", "blue_difference")
"""The numbers that are quantised: offset from the anchor and scales in pixels, angle in radians, BT.601 Y, Cr, Cb."""

ANGLE = CHANNELS.index("angle")

DEFAULT_BITS = (8, 8, 7, 7, 7, 8, 4, 4)
MAX_BITS = 16

FIXED_POINT = 1 << 20
"""Steps and lows are whole multiples of 1/FIXED_POINT, so that files and machines agree on them."""


def channel_values(gaussians: Gaussians, anchor: Tensor) -> Tensor:
    """The numbers that are quantised, shape (N, 8) as CHANNELS, differentiable. `anchor` is (N, 2) in pixels."""
    red, green, blue = gaussians.colour.unbind(dim=1)
    luma = LUMA_OF_RED * red + LUMA_OF_GREEN * green + LUMA_OF_BLUE * blue
    colour = torch.stack([luma, (red - luma) / RED_BY_CR, (blue - luma) / BLUE_BY_CB], dim=1)
    return torch.cat([gaussians.xy - anchor, gaussians.scale, gaussians.angle[:, None], colour], dim=1)


def gaussians_from_channels(values: Tensor, anchor: Tensor) -> Gaussians:
    """The inverse of `channel_values`."""
    luma, red_difference, blue_difference = values[:, 5:8].unbind(dim=1)
    red = luma + RED_BY_CR * red_difference
    blue = luma + BLUE_BY_CB * blue_difference
    green = (luma - LUMA_OF_RED * red - LUMA_OF_BLUE * blue) / LUMA_OF_GREEN
    colour = torch.stack([red, green, blue], dim=1)
    return Gaussians(anchor + values[:, 0:2], values[:, 2:4], values[:, ANGLE], colour)


def check_bits(bits: Sequence[int]) -> None:
    """Raises ValueError unless there is a whole number from 1 to MAX_BITS for each channel."""
    if len(bits) != len(CHANNELS) or not all(isinstance(b, int) and 1 <= b <= MAX_BITS for b in bits):
        raise ValueError(f"bits must be {len(CHANNELS)} whole numbers from 1 to {MAX_BITS}, got {tuple(bits)}")


@dataclass(frozen=True)
class UniformQuantizer:
    """Levels low + k · step, k = 0 .. 2^bits - 1, for each of CHANNELS. The angle's levels repeat after half a turn.

    Attributes:
        bits: Per channel, 1 to 16.
        low: Per channel, in units of 1/FIXED_POINT.
        step: Per channel, in units of 1/FIXED_POINT, at least 1.
    """

    bits: tuple[int, ...]
    low: tuple[int, ...]
    step: tuple[int, ...]

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if len(self.low) != len(CHANNELS) or len(self.step) != len(CHANNELS) or min(self.step) < 1:
            raise ValueError(f"a quantiser needs {len(CHANNELS)} lows and positive steps, got {self.low}, {self.step}")

    @staticmethod
    def rounded(bits: Sequence[int], low: Sequence[float], step: Sequence[float]) -> UniformQuantizer:
        """From real lows and steps, rounded to the nearest multiple of 1/FIXED_POINT."""
        return UniformQuantizer(
            tuple(bits),
            tuple(round(value * FIXED_POINT) for value in low),
            tuple(max(1, round(value * FIXED_POINT)) for value in step),
        )

    def symbols(self, values: Tensor) -> NDArray[np.int32]:
        """The nearest level of each value, shape (N, 8), int32. Values beyond the ends get the end."""
        low = torch.tensor(self.low, dtype=torch.float64) / FIXED_POINT
        step = torch.tensor(self.step, dtype=torch.float64) / FIXED_POINT
        last = last_levels(self.bits)
        unwound = unwind(values.detach().cpu().double(), low, step, last)
        return nearest_levels(unwound, low, step, last).numpy().astype(np.int32)

    def values(self, symbols: NDArray[np.integer], dtype: torch.dtype = torch.float32) -> Tensor:
        """The levels themselves, shape (N, 8): whole numbers below 2^53 over a power of two, so exact as float64."""
        low, step = np.array(self.low, np.int64), np.array(self.step, np.int64)
        exact = (low + symbols.astype(np.int64) * step).astype(np.float64) / FIXED_POINT
        return torch.from_numpy(exact).to(dtype)


def last_levels(bits: Sequence[int]) -> Tensor:
    """The number of each channel's last level, float64 (8,)."""
    return torch.tensor([2**b - 1 for b in bits], dtype=torch.float64)


def unwind(values: Tensor, low: Tensor, step: Tensor, last: Tensor) -> Tensor:
    """The values, with angles moved by whole half turns so that plain rounding finds the nearest level on the circle.

    That is between low and low + π, or just below low if the first level is nearer from there than the last one.
    """
    low, step = low[..., ANGLE], step[..., ANGLE]
    above = torch.remainder(values[:, ANGLE] - low, math.pi)
    nearest = step * torch.minimum((above / step).round(), last[ANGLE])
    wraps = math.pi - above < (above - nearest).abs()
    unwound = values.clone()
    unwound[:, ANGLE] = low + above - torch.where(wraps, math.pi, 0.0)
    return unwound


def nearest_levels(values: Tensor, low: Tensor, step: Tensor, last: Tensor) -> Tensor:
    """round(clip((v - low) / step, 0, last)) of unwound values."""
    return torch.minimum(((values - low) / step).clamp(min=0), last).round()


def fit_uniform_quantizer(values: Tensor, bits: Sequence[int] = DEFAULT_BITS) -> UniformQuantizer:
    """The quantiser whose levels span exactly what these values span; the angle's span half a turn.

    Args:
        values: As from `channel_values`, shape (N, 8). With N = 0 the range of each channel is 0 to 0.
        bits: Per channel.

    Raises:
        ValueError: The bits are not eight whole numbers from 1 to MAX_BITS, or a value is not finite.
    """
    check_bits(bits)
    exact = values.detach().cpu().double()
    if not bool(torch.isfinite(exact).all()):
        raise ValueError("values to quantise must be finite")
    if not len(exact):
        exact = torch.zeros(1, len(CHANNELS), dtype=torch.float64)
    low, high = exact.amin(dim=0), exact.amax(dim=0)
    step = (high - low) / last_levels(bits)
    low[ANGLE], step[ANGLE] = 0, math.pi / 2 ** bits[ANGLE]
    return UniformQuantizer.rounded(bits, low.tolist(), step.tolist())
