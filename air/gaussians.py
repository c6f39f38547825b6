"""The Gaussians table and its anchored raw form (method.md sections 1 and 2).

The renderer draws a table: centres, scales, angles and colours in pixels and radians. Predictors and the optimiser
work on the raw form: 8 unbounded numbers per Gaussian, relative to the anchor of an image patch. This module converts
between the two and knows nothing of rendering, losses or images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from air.errors import InvalidGaussiansError
from air.vector_math import settle

settle()  # before any thread of torch computes with Gaussians

RAW_CHANNELS = 8
"""Raw numbers per Gaussian: offset x, y; scale 1, 2; angle; red, green, blue."""

OFFSET, SCALE, ANGLE, COLOUR = slice(0, 2), slice(2, 4), 4, slice(5, 8)
"""Columns of raw Gaussians."""

CENTRE = OFFSET
"""Where tables of drawn parameters, otherwise ordered as raw Gaussians, have x and y in pixels."""

COLUMN_GROUPS = {"offset": OFFSET, "scale": SCALE, "angle": slice(ANGLE, ANGLE + 1), "colour": COLOUR}
"""Columns of raw Gaussians by kind."""

SUPPORT_CUTOFF = 1 / 255
"""Smaller weights count as zero: the support is the ellipse dᵀ Σ⁻¹ d <= 2 ln 255."""

MIN_RAW_SCALE = 0.5
"""Pixels added to every activated scale: the least scale that a raw Gaussian can have."""

# Variance, in square pixels, of the box that one pixel averages over. See `Gaussians.rescaled`.
_PIXEL_VARIANCE = 1 / 12


@dataclass(frozen=True, eq=False)
class Gaussians:
    """N two-dimensional Gaussians whose plain sum is an image.

    Attributes:
        xy: Centres in pixels, shape (N, 2). Pixel column j, row i sits at (j, i); a centre may leave the image.
        scale: Standard deviations along the two axes in pixels, shape (N, 2), positive.
        angle: Rotation of the first axis in radians, x right and y down, shape (N,).
        colour: Signed red, green and blue amplitudes, shape (N, 3); 1 is white.

    Example:
        >>> one = Gaussians(torch.tensor([[3.0, 2.0]]), torch.ones(1, 2), torch.zeros(1), torch.ones(1, 3))
        >>> len(one)
        1
    """

    xy: Tensor
    scale: Tensor
    angle: Tensor
    colour: Tensor

    def __post_init__(self) -> None:
        count = self.xy.shape[0] if self.xy.ndim else -1
        for name, expected in (("xy", (count, 2)), ("scale", (count, 2)), ("angle", (count,)), ("colour", (count, 3))):
            shape = tuple(getattr(self, name).shape)
            if shape != expected:
                raise InvalidGaussiansError(f"Gaussians.{name} has shape {shape}, expected {expected} (N = {count})")

    def __len__(self) -> int:
        return self.xy.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Gaussians:
        """The Gaussians at `index`: a slice, a boolean mask of shape (N,) or a tensor of indices."""
        return Gaussians(self.xy[index], self.scale[index], self.angle[index], self.colour[index])

    @staticmethod
    def empty(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Gaussians:
        """A table of zero Gaussians, which draws black."""
        shapes = ((0, 2), (0, 2), (0,), (0, 3))
        return Gaussians(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))

    @staticmethod
    def concatenate(parts: Sequence[Gaussians]) -> Gaussians:
        """All Gaussians of `parts`, in order; an empty table if there are no parts."""
        if not parts:
            return Gaussians.empty()
        return Gaussians(
            torch.cat([part.xy for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat([part.angle for part in parts]),
            torch.cat([part.colour for part in parts]),
        )

    def to(self, target: torch.dtype | torch.device | str) -> Gaussians:
        """The same Gaussians with another dtype or on another device."""
        return Gaussians(*(tensor.to(target) for tensor in (self.xy, self.scale, self.angle, self.colour)))

    def detach(self) -> Gaussians:
        """The same values without their autograd history."""
        return Gaussians(self.xy.detach(), self.scale.detach(), self.angle.detach(), self.colour.detach())

    def validate(self) -> None:
        """Raises:
        InvalidGaussiansError: A number is not finite, or a scale is not positive. The message names the first.
        """
        for name in ("xy", "scale", "angle", "colour"):
            numbers = getattr(self, name).detach()
            if not is_finite(numbers):
                finite = torch.isfinite(numbers)
                bad = ~(finite if finite.ndim == 1 else finite.all(dim=1))
                first = int(bad.nonzero()[0])
                value = getattr(self, name)[first].tolist()
                raise InvalidGaussiansError(
                    f"Gaussian {first} has a non-finite {name}: {value} ({int(bad.sum())} of {len(self)} are bad)"
                )
        if len(self) and float(self.scale.detach().min()) <= 0:
            flat = (self.scale <= 0).any(dim=1)
            first = int(flat.nonzero()[0])
            raise InvalidGaussiansError(
                f"Gaussian {first} has a scale that is not positive: {self.scale[first].tolist()} pixels"
            )

    def conic(self) -> Tensor:
        """The inverse covariances Σ⁻¹ = [[a, b], [b, c]] as rows (a, b, c), shape (N, 3), differentiable."""
        cos, sin = torch.cos(self.angle), torch.sin(self.angle)
        precision_1, precision_2 = (1 / self.scale.square()).unbind(dim=1)
        return torch.stack(
            [
                cos * cos * precision_1 + sin * sin * precision_2,
                cos * sin * (precision_1 - precision_2),
                sin * sin * precision_1 + cos * cos * precision_2,
            ],
            dim=1,
        )

    def rescaled(self, factor: float) -> Gaussians:
        """The same picture `factor` times as large, to be rendered at round(factor · size).

        Pixels are areas: pixel j covers [j - ½, j + ½], so x becomes (x + ½)·factor - ½. A factor below 1 also blurs
        each Gaussian and keeps its integral. The variance added is that of the new pixel minus that of an old pixel,
        which the fit has already averaged over. Without the blur, details below a pixel would alias.

        Raises:
            ValueError: The factor is not a positive number.
        """
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"a rescaling factor must be a positive number, got {factor}")
        blur = max(0.0, (1 - factor * factor) * _PIXEL_VARIANCE)
        plain = self.scale * factor
        blurred = torch.sqrt(plain.square() + blur)
        amplitude = (plain / blurred).prod(dim=1, keepdim=True)
        return Gaussians((self.xy + 0.5) * factor - 0.5, blurred, self.angle, self.colour * amplitude)


def is_finite(numbers: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    # A finite sum has finite terms only, and takes less time than looking at each.
    return math.isfinite(float(numbers.detach().sum())) or bool(torch.isfinite(numbers).all())


def grid_shape(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches that cover an image; the border may cut off the last ones."""
    return math.ceil(height / patch_size), math.ceil(width / patch_size)


def anchors(height: int, width: int, patch_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Anchor (x, y) of every patch in row-major order, shape (rows · columns, 2), clamped into the image."""
    rows, columns = grid_shape(height, width, patch_size)
    x = anchor_coordinates(torch.arange(columns, dtype=dtype), width, patch_size)
    y = anchor_coordinates(torch.arange(rows, dtype=dtype), height, patch_size)
    return torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=1)


def anchor_coordinates(patches: Tensor, size: int, patch_size: int) -> Tensor:
    """The anchors' coordinates along an axis of `size` pixels, for patches with these numbers along it."""
    return (patches * patch_size + (patch_size - 1) / 2).clamp(max=size - 1)


def check_raw(raw: Tensor, anchor: Tensor, patch_size: int) -> None:
    """Checks that raw numbers at anchors are Gaussians that can be drawn.

    Raises:
        InvalidGaussiansError: As `activate`, and as `Gaussians.validate`.
    """
    _check_shapes(raw, anchor)
    # Finite raw numbers give finite Gaussians, within reach of their anchors.
    if not (math.isfinite(float(raw.detach().sum())) and math.isfinite(float(anchor.sum()))):
        activate(raw.detach(), anchor, patch_size).validate()


def activate(raw: Tensor, anchor: Tensor, patch_size: int) -> Gaussians:
    """Raw numbers (N, 8) at anchors (N, 2) as Gaussians, differentiable (method.md section 2).

    Raises:
        InvalidGaussiansError: The shapes do not fit.
    """
    _check_shapes(raw, anchor)
    # Torch's functions take ten times as long where numbers do not lie together.
    offset, scale, angle, colour = (raw[:, columns].contiguous() for columns in COLUMN_GROUPS.values())
    return Gaussians(
        xy=anchor + patch_size * torch.tanh(offset),
        scale=patch_size * torch.sigmoid(scale) + MIN_RAW_SCALE,
        angle=2 * math.pi * torch.sigmoid(angle)[:, 0],
        colour=torch.tanh(colour),
    )


def _check_shapes(raw: Tensor, anchor: Tensor) -> None:
    if raw.ndim != 2 or raw.shape[1] != RAW_CHANNELS or anchor.shape != (raw.shape[0], 2):
        raise InvalidGaussiansError(
            f"raw Gaussians must be (N, {RAW_CHANNELS}) with anchors (N, 2), got {tuple(raw.shape)} and "
            f"{tuple(anchor.shape)}"
        )


def deactivate(gaussians: Gaussians, anchor: Tensor, patch_size: int, margin: float = 1e-6) -> Tensor:
    """The raw numbers (N, 8) that `activate` turns into `gaussians`: its inverse.

    A value that no raw number reaches is moved into the range, to `margin` (a fraction of the range) from its end.
    Angles are taken modulo 2π.
    """
    low, high = -1 + margin, 1 - margin
    offset = torch.atanh(((gaussians.xy - anchor) / patch_size).clamp(low, high))
    scale = torch.logit((gaussians.scale - MIN_RAW_SCALE) / patch_size, eps=margin)
    angle = torch.logit(torch.remainder(gaussians.angle / (2 * math.pi), 1.0), eps=margin)
    colour = torch.atanh(gaussians.colour.clamp(low, high))
    return torch.cat([offset, scale, angle[:, None], colour], dim=1)
