"""Uniform quantisers of Gaussians, one step per channel (method.md section 6).

`ImageAdaptiveQuantizer` is the learned one: its steps and lows follow from a network's global feature of the image, and
gradients pass through it. `fit_uniform_quantizer` takes the ranges from the Gaussians themselves, for those that no
network predicted. Both come down to the same `UniformQuantizer`, whole numbers that a file can carry, from which every
machine computes the same float32 values.

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
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from air.gaussians import MIN_RAW_SCALE, Gaussians

CHANNELS = ("x", "y", "scale_1", "scale_2", "angle", "luma", "red_difference", "blue_difference")
"""What is quantised: offset from the anchor and scales in pixels, angle in radians, colour as BT.601 Y, Cr, Cb."""

CHANNEL_GROUPS = {"offset": slice(0, 2), "scale": slice(2, 4), "angle": slice(4, 5), "colour": slice(5, 8)}
"""Columns of channel values whose distortion is averaged together."""

ANGLE = CHANNELS.index("angle")

DEFAULT_BITS = (8, 8, 7, 7, 7, 8, 4, 4)
MOST_BITS = 16

FIXED_POINT = 1 << 20
"""Steps and lows are whole multiples of 1/FIXED_POINT, so that files and machines agree on them."""

# The authors' estimates at p = 7, with DEFAULT_BITS: steps before softplus, and lows.
_STEP_LOGITS = (-3.0427, -3.0022, -2.9553, -3.2385, -3.3192, -5.3675, -4.0653, -4.4090)
_LOWS = (-6.7962, -6.0476, 0.4933, 0.5032, 1.0155, -0.2550, -0.0688, -0.1273)
_ESTIMATED_AT = 7

_LEAST_SCALE_LOW = MIN_RAW_SCALE / 2
"""Pixels. No predicted scale lies below twice that, and no file may hold one that is not positive."""

_DISTORTION_WEIGHT = 0.01

# BT.601: Y = 0.299 R + 0.587 G + 0.114 B, Cr = (R - Y) / 1.402, Cb = (B - Y) / 1.772.
_RED, _GREEN, _BLUE = 0.299, 0.587, 0.114
_CR_RANGE, _CB_RANGE = 1.402, 1.772


def channel_values(gaussians: Gaussians, anchor: Tensor) -> Tensor:
    """The quantities that are quantised, shape (N, 8) as CHANNELS, differentiable. `anchor` is (N, 2) in pixels."""
    red, green, blue = gaussians.colour.unbind(dim=1)
    luma = _RED * red + _GREEN * green + _BLUE * blue
    colour = torch.stack([luma, (red - luma) / _CR_RANGE, (blue - luma) / _CB_RANGE], dim=1)
    return torch.cat([gaussians.xy - anchor, gaussians.scale, gaussians.angle[:, None], colour], dim=1)


def gaussians_from_channels(values: Tensor, anchor: Tensor) -> Gaussians:
    """The inverse of `channel_values`."""
    luma, red_difference, blue_difference = values[:, 5:8].unbind(dim=1)
    red = luma + _CR_RANGE * red_difference
    blue = luma + _CB_RANGE * blue_difference
    green = (luma - _RED * red - _BLUE * blue) / _GREEN
    colour = torch.stack([red, green, blue], dim=1)
    return Gaussians(anchor + values[:, 0:2], values[:, 2:4], values[:, ANGLE], colour)


def _check_bits(bits: Sequence[int]) -> None:
    if len(bits) != len(CHANNELS) or not all(isinstance(b, int) and 1 <= b <= MOST_BITS for b in bits):
        raise ValueError(f"bits must be {len(CHANNELS)} whole numbers from 1 to {MOST_BITS}, got {tuple(bits)}")


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
        _check_bits(self.bits)
        if len(self.low) != len(CHANNELS) or len(self.step) != len(CHANNELS) or min(self.step) < 1:
            raise ValueError(f"a quantiser needs {len(CHANNELS)} lows and positive steps, got {self.low}, {self.step}")

    @staticmethod
    def rounded(bits: Sequence[int], low: Sequence[float], step: Sequence[float]) -> UniformQuantizer:
        """From real lows and steps, taken to the next multiple of 1/FIXED_POINT."""
        return UniformQuantizer(
            tuple(bits),
            tuple(round(value * FIXED_POINT) for value in low),
            tuple(max(1, round(value * FIXED_POINT)) for value in step),
        )

    def symbols(self, values: Tensor) -> NDArray[np.int32]:
        """The nearest level of each value, shape (N, 8), int32. Values beyond the ends get the end."""
        low = torch.tensor(self.low, dtype=torch.float64) / FIXED_POINT
        step = torch.tensor(self.step, dtype=torch.float64) / FIXED_POINT
        last = _last_levels(self.bits)
        unwound = _unwound(values.detach().cpu().double(), low, step, last)
        return _levels(unwound, low, step, last).numpy().astype(np.int32)

    def values(self, symbols: NDArray[np.integer], dtype: torch.dtype = torch.float32) -> Tensor:
        """The levels themselves, shape (N, 8): whole numbers below 2^53 over a power of two, so exact as float64."""
        low, step = np.array(self.low, np.int64), np.array(self.step, np.int64)
        exact = (low + symbols.astype(np.int64) * step).astype(np.float64) / FIXED_POINT
        return torch.from_numpy(exact).to(dtype)


def _last_levels(bits: Sequence[int]) -> Tensor:
    return torch.tensor([2**b - 1 for b in bits], dtype=torch.float64)


def _unwound(values: Tensor, low: Tensor, step: Tensor, last: Tensor) -> Tensor:
    """The values, angles moved by whole half turns to where plain rounding finds the level nearest around the circle.

    That is between low and low + π, or just below low if the first level is nearer from there than the last one.
    """
    low, step = low[..., ANGLE], step[..., ANGLE]
    above = torch.remainder(values[:, ANGLE] - low, math.pi)
    nearest = step * torch.minimum((above / step).round(), last[ANGLE])
    wraps = math.pi - above < (above - nearest).abs()
    unwound = values.clone()
    unwound[:, ANGLE] = low + above - torch.where(wraps, math.pi, 0.0)
    return unwound


def _levels(values: Tensor, low: Tensor, step: Tensor, last: Tensor) -> Tensor:
    """round(clip((v - low) / step, 0, last)) of unwound values."""
    return torch.minimum(((values - low) / step).clamp(min=0), last).round()


def fit_uniform_quantizer(values: Tensor, bits: Sequence[int] = DEFAULT_BITS) -> UniformQuantizer:
    """The quantiser whose levels span exactly what these values span; the angle's span half a turn.

    Args:
        values: As from `channel_values`, shape (N, 8). None at all give a quantiser that no symbol needs.
        bits: Per channel.

    Raises:
        ValueError: The bits are none, or a value is not finite.
    """
    _check_bits(bits)
    exact = values.detach().cpu().double()
    if not bool(torch.isfinite(exact).all()):
        raise ValueError("values to quantise must be finite")
    if not len(exact):
        exact = torch.zeros(1, len(CHANNELS), dtype=torch.float64)
    low, high = exact.amin(dim=0), exact.amax(dim=0)
    step = (high - low) / _last_levels(bits)
    low[ANGLE], step[ANGLE] = 0, math.pi / 2 ** bits[ANGLE]
    return UniformQuantizer.rounded(bits, low.tolist(), step.tolist())


class ImageAdaptiveQuantizer(nn.Module):
    """The learned quantiser: steps and lows per channel, moved by a linear map of the image's global feature.

    - step = softplus(a + δ1), low = b + δ2, (δ1, δ2) = ½ tanh(Linear(feature)); a and b are learned, and start at the
      authors' estimates.
    - The estimates hold at p = 7. Offsets span ±p and scales 0.5 to p + 0.5, so both are quantised in units of
      p / 7, which keeps the levels at the same shares of the range.
    - With other bits than the default the levels span the same range.
    - Gradients pass straight through the rounding: to a value unless it is beyond the ends, to the step by the
      rounding error, and to the low where the value is beyond the ends.
    - An angle is the same half a turn on, and is quantised around the circle.

    The linear map starts at zero and has one row per number: x's δ1, x's δ2, y's δ1, and so on through CHANNELS.

    Args:
        feature_size: Length of the global feature; 0 for a quantiser that does not adapt.
        patch_size: Pixels between anchors.
        bits: Per channel.
    """

    def __init__(self, feature_size: int, patch_size: int, bits: Sequence[int] = DEFAULT_BITS) -> None:
        super().__init__()
        _check_bits(bits)
        self.bits = tuple(bits)
        self.patch_size = patch_size
        ratio = torch.tensor([(2**b - 1) / (2**other - 1) for b, other in zip(DEFAULT_BITS, bits, strict=True)])
        step = F.softplus(torch.tensor(_STEP_LOGITS, dtype=torch.float64)) * ratio
        self.step_logit = nn.Parameter(torch.log(torch.expm1(step)).float())
        self.low = nn.Parameter(torch.tensor(_LOWS))
        self.adapt = nn.Linear(feature_size, 2 * len(CHANNELS)) if feature_size else None
        if self.adapt is not None:
            nn.init.zeros_(self.adapt.weight)
            nn.init.zeros_(self.adapt.bias)

    def steps_and_lows(self, feature: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Steps and lows in pixels, radians and colour, each (B, 8) for features (B, feature_size), or (8,).

        Raises:
            ValueError: A quantiser that adapts was given no feature.
        """
        step_logit, low = self.step_logit, self.low
        if self.adapt is not None:
            if feature is None:
                raise ValueError("this quantiser adapts to the image: give the image's global feature")
            shift = 0.5 * torch.tanh(self.adapt(feature))
            step_logit, low = step_logit + shift[..., 0::2], low + shift[..., 1::2]
        step = F.softplus(step_logit)
        unit, origin = low.new_ones(len(CHANNELS)), low.new_zeros(len(CHANNELS))
        unit[0:4] = self.patch_size / _ESTIMATED_AT
        origin[2:4] = MIN_RAW_SCALE
        low = (low - origin) * unit + origin
        return step * unit, torch.cat([low[..., 0:2], low[..., 2:4].clamp(min=_LEAST_SCALE_LOW), low[..., 4:]], dim=-1)

    def forward(
        self, values: Tensor, feature: Tensor | None = None, image: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Quantised values with straight-through gradients, and the distortion loss.

        Args:
            values: As from `channel_values`, shape (N, 8).
            feature: Global features, shape (feature_size,) for one image or (B, feature_size).
            image: Which of the B images each Gaussian belongs to, shape (N,), int64.

        Returns:
            Values (N, 8); and 0.01 times the mean absolute error of each group of channels, summed over the groups.
            The angle's error is counted around the circle.
        """
        step, low = self.steps_and_lows(feature)
        if image is not None:
            step, low = step[image], low[image]
        last = _last_levels(self.bits).to(values)
        unwound = _unwound(values.detach(), low.detach(), step.detach(), last)
        level = _levels(unwound, low.detach(), step.detach(), last)
        # Half turns are added as a constant: they move the angle, not its gradient.
        target = values + (unwound - values.detach())
        position = (target - low) / step
        inside = torch.minimum(position, last)
        bounded_below = torch.arange(len(CHANNELS), device=values.device) != ANGLE
        inside = torch.where(bounded_below, inside.clamp(min=0), inside)
        quantised = low + step * (inside + (level - inside).detach())
        error = (quantised - target).abs()
        groups = [error[:, columns].mean() for columns in CHANNEL_GROUPS.values()]
        loss = _DISTORTION_WEIGHT * torch.stack(groups).sum() if len(values) else values.sum()
        return quantised, loss

    @torch.no_grad()
    def table(self, feature: Tensor | None = None) -> UniformQuantizer:
        """The quantiser of one image, as whole numbers for a file."""
        step, low = self.steps_and_lows(feature)
        if step.ndim != 1:
            raise ValueError(f"a table is of one image: give one feature, got {step.shape[0]}")
        return UniformQuantizer.rounded(self.bits, low.tolist(), step.tolist())

    def symbols(self, values: Tensor, feature: Tensor | None = None) -> NDArray[np.int32]:
        """What a file stores of these values of one image, shape (N, 8); `table(feature).values` undoes it."""
        return self.table(feature).symbols(values)
