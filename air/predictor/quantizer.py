"""The quantiser that a network learns, a module that `PredictorNetwork` contains (method.md section 6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from air.codec.uniform import (
    ANGLE,
    CHANNELS,
    DEFAULT_BITS,
    UniformQuantizer,
    check_bits,
    last_levels,
    nearest_levels,
    unwind,
)
from air.gaussians import COLUMN_GROUPS, MIN_RAW_SCALE, OFFSET, SCALE

# The authors' estimates at p = 7, with DEFAULT_BITS: steps before softplus, and lows. The order of CHANNELS is
# that of the columns of raw Gaussians.
_STEP_LOGITS = (-3.0427, -3.0022, -2.9553, -3.2385, -3.3192, -5.3675, -4.0653, -4.4090)
_LOWS = (-6.7962, -6.0476, 0.4933, 0.5032, 1.0155, -0.2550, -0.0688, -0.1273)
_ESTIMATED_AT = 7

_MIN_SCALE_LOW = MIN_RAW_SCALE / 2
"""The least low of a scale, pixels. Predicted scales are at least twice as large; scales in a file are positive."""

_DISTORTION_WEIGHT = 0.01


class ImageAdaptiveQuantizer(nn.Module):
    """The learned quantiser: steps and lows per channel, moved by a linear map of the image's global feature.

    - step = softplus(a + δ1), low = b + δ2, (δ1, δ2) = ½ tanh(Linear(feature)). a and b are learned and start at the
      authors' estimates.
    - The estimates hold at p = 7. Offsets span ±p and scales 0.5 to p + 0.5, so both are quantised in units of
      p / 7: the levels stay at the same fractions of the range.
    - With other bits than the default the levels span the same range.
    - Gradients pass straight through the rounding. A value takes its gradient unless it lies beyond the first or last
      level; the step takes one through the rounding error; the low takes one from values beyond the ends.
    - Half a turn changes no Gaussian, so angles are quantised around a circle of half a turn.

    The linear map starts at zero and has one row per number: x's δ1, x's δ2, y's δ1, and so on through CHANNELS.

    Args:
        feature_size: Length of the global feature; 0 for a quantiser that does not adapt.
        patch_size: Pixels between anchors.
        bits: Bits per channel.
    """

    def __init__(self, feature_size: int, patch_size: int, bits: Sequence[int] = DEFAULT_BITS) -> None:
        super().__init__()
        check_bits(bits)
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
        unit[OFFSET] = unit[SCALE] = self.patch_size / _ESTIMATED_AT
        origin[SCALE] = MIN_RAW_SCALE
        low = (low - origin) * unit + origin
        scale_low = low[..., SCALE].clamp(min=_MIN_SCALE_LOW)
        return step * unit, torch.cat([low[..., OFFSET], scale_low, low[..., SCALE.stop :]], dim=-1)

    def forward(
        self, values: Tensor, feature: Tensor | None = None, image: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Quantised values with straight-through gradients, and the distortion loss.

        Args:
            values: As from `channel_values`, shape (N, 8).
            feature: Global features, shape (feature_size,) for one image or (B, feature_size).
            image: The index in the batch of the image that each Gaussian belongs to, shape (N,), int64.

        Returns:
            Values (N, 8); and 0.01 times the mean absolute error of each group of channels, summed over the groups.
            The angle's error is counted around the circle.
        """
        step, low = self.steps_and_lows(feature)
        if image is not None:
            step, low = step[image], low[image]
        last = last_levels(self.bits).to(values)
        unwound = unwind(values.detach(), low.detach(), step.detach(), last)
        level = nearest_levels(unwound, low.detach(), step.detach(), last)
        # Half turns are added as a constant: they move the angle and leave its gradient.
        target = values + (unwound - values.detach())
        position = (target - low) / step
        inside = torch.minimum(position, last)
        bounded_below = torch.arange(len(CHANNELS), device=values.device) != ANGLE
        inside = torch.where(bounded_below, inside.clamp(min=0), inside)
        quantised = low + step * (inside + (level - inside).detach())
        error = (quantised - target).abs()
        groups = [error[:, columns].mean() for columns in COLUMN_GROUPS.values()]
        loss = _DISTORTION_WEIGHT * torch.stack(groups).sum() if len(values) else values.sum()
        return quantised, loss

    @torch.no_grad()
    def table(self, feature: Tensor | None = None) -> UniformQuantizer:
        """The quantiser of one image in whole numbers, for a file."""
        step, low = self.steps_and_lows(feature)
        if step.ndim != 1:
            raise ValueError(f"a table holds for one image: give one feature, got {step.shape[0]}")
        return UniformQuantizer.rounded(self.bits, low.tolist(), step.tolist())

    def symbols(self, values: Tensor, feature: Tensor | None = None) -> NDArray[np.int32]:
        """The symbols that a file stores for these values of one image, shape (N, 8).

        `table(feature).values` turns them back into values.
        """
        return self.table(feature).symbols(values)
