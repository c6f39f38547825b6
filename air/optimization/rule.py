"""Update rules: how a gradient and its history move a raw Gaussian.

An update rule returns moves in units of the scheduled learning rates. There are two:

- `Adam`, in closed form; with `opposed_fraction` below 1 it is cautious.
- `LearnedRule`: a network with shared weights that sees one Gaussian, its gradient and Adam's moments. It mixes, number
  by number, the cautious momentum, the normalised gradient and the Gauss-Newton step of a lone Gaussian.

Both read the same moments, so a fit may change from one to the other after any step. This module is the definition in
plain torch; `air.optimization.cpu` and `air.optimization.cuda` hold the compiled forms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from air.gaussians import ANGLE, COLOUR, MIN_RAW_SCALE, OFFSET, RAW_CHANNELS, SCALE
from air.loss.reference import L1_WEIGHT

OWN_FEATURES = 42
"""Features of a single Gaussian: five for each raw number, and ten of its shape, colour and age."""

SHARED_FEATURES = 10
"""Features that all Gaussians share: where the fit stands in its schedule, and how good the picture is."""

HIDDEN = 16
"""Width of the two hidden layers."""

DIRECTIONS = 3
"""Directions that the rule mixes: cautious momentum, normalised gradient, Gauss-Newton step."""

MAX_MOVE = 5.0
"""Largest move of the learned rule, in learning rates."""

MAX_GAIN = 4.0
"""Largest factor of the learned rule on the cautious momentum; the least is 0."""

RIDGE = 0.02
"""Times the Gaussian's area, this is added to every curvature."""

FREE_MOVE = 0.3
"""Factor on the network's output that moves a number along no direction."""

NEWTON_BOUND = 3.0
"""The largest Gauss-Newton step in learning rates, which longer steps approach."""


MAX_NEWTON = 1e6
"""Longer Gauss-Newton steps, in learning rates, count as this one, so that none is infinite."""

MIN_SLOPE = 1e-6
"""Smaller derivatives of a centre by its raw number count as this one where they divide."""


@dataclass(frozen=True)
class Progress:
    """Where a fit stands at one update.

    Attributes:
        step: Updates done since the last growth, from 0.
        steps: Updates between the last growth and the next, at least 1.
        earlier: Updates before the last growth.
        later: Updates after the next growth.
        rms_error: Root of the mean squared error of the picture clamped to [0, 1].
    """

    step: int
    steps: int
    earlier: int
    later: int
    rms_error: float

    def features(self, patch_size: float) -> NDArray[np.float64]:
        """The features that all Gaussians share, shape (10,)."""
        left = self.steps - self.step
        total = self.earlier + self.steps + self.later
        return np.array(
            [
                self.step / self.steps,
                0.5 * math.log(left),
                1 / left,
                0.5 * math.log(left + self.later),
                0.5 * math.log1p(self.step),
                1 / (1 + self.step),
                1.0 if self.later else 0.0,
                0.5 * math.log(max(self.rms_error, 1e-6)) + 1.5,
                0.5 * math.log(total) - 1.5,
                patch_size / (patch_size + 8),
            ]
        )


@dataclass(frozen=True, eq=False)
class State:
    """What a rule sees of the free Gaussians at one update. Tensors of Gaussians have shape (N, 8).

    Attributes:
        raw: Raw numbers before the update.
        gradient: The loss's gradient by raw numbers.
        mean, square: Adam's moments with this gradient in them, their bias towards zero corrected.
        age: Updates of each Gaussian before this one, shape (N,).
        learning_rates: The rates before annealing, shape (8,).
        patch_size: The activations' range in pixels.
        num_values: Values of the picture: 3 · height · width.
        progress: Where the fit stands.
        eps: Added to the root of `square`.
    """

    raw: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    age: Tensor
    learning_rates: Tensor
    patch_size: float
    num_values: int
    progress: Progress
    eps: float

    @cached_property
    def root(self) -> Tensor:
        """Root of the mean square of the gradients, which momentum and gradient are divided by."""
        return self.square.sqrt() + self.eps

    @cached_property
    def momentum(self) -> Tensor:
        """Adam's direction."""
        return -self.mean / self.root

    @cached_property
    def description(self) -> Description:
        """What `describe` gives."""
        return describe(self)


class UpdateRule(Protocol):
    """Moves raw Gaussians by what a state holds."""

    def move(self, state: State) -> Tensor:
        """Moves (N, 8) in units of the scheduled learning rates."""
        ...


@dataclass(frozen=True)
class Adam:
    """Adam in closed form. Only `opposed_fraction` of a move against the present gradient is made."""

    opposed_fraction: float = 1.0

    def move(self, state: State) -> Tensor:
        """As `UpdateRule.move`."""
        return torch.where(state.mean * state.gradient < 0, self.opposed_fraction, 1.0) * state.momentum


class LearnedRule(nn.Module):
    """A network of 1,664 numbers, the same for every Gaussian: 52 features, two hidden layers of 16, 32 coefficients.

    With the last layer at zero, as in a new rule, it is the cautious Adam (`Adam(0)`).

    Attributes:
        beta1, beta2: The constants of the moments that the rule was trained with.
    """

    def __init__(self, beta1: float = 0.85, beta2: float = 0.95) -> None:
        super().__init__()
        self.beta1, self.beta2 = beta1, beta2
        self.first = nn.Linear(OWN_FEATURES + SHARED_FEATURES, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.last = nn.Linear(HIDDEN, (DIRECTIONS + 1) * RAW_CHANNELS)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Moves (N, 8) from features (N, 52)."""
        hidden = torch.relu(self.second(torch.relu(self.first(features))))
        gain, by_gradient, by_newton, free = self.last(hidden).unflatten(1, (DIRECTIONS + 1, RAW_CHANNELS)).unbind(1)
        cautious, gradient, newton = directions_of(features)
        move = (1 + gain).clamp(0, MAX_GAIN) * cautious + by_gradient * gradient + by_newton * newton + FREE_MOVE * free
        return move.clamp(-MAX_MOVE, MAX_MOVE)

    def move(self, state: State) -> Tensor:
        """As `UpdateRule.move`."""
        features = state.description.features
        return self(features.to(self.first.weight)).to(features)


def directions_of(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The directions that the learned rule mixes, each (N, 8): cautious momentum, gradient, Gauss-Newton step.

    They are among the features (N, 52), but for the cautious momentum: it is zero where momentum opposes the gradient.
    """
    momentum, gradient, newton = features[:, : DIRECTIONS * RAW_CHANNELS].split(RAW_CHANNELS, dim=1)
    return torch.where(momentum * gradient > 0, momentum, 0), gradient, newton


class Description(NamedTuple):
    """Raw Gaussians at one update.

    Attributes:
        features: What the learned rule sees, shape (N, 52).
        curvature: Of half the squared error by each raw number, as that of a lone Gaussian, shape (N, 8).
    """

    features: Tensor
    curvature: Tensor


def describe(state: State) -> Description:
    """The features of raw Gaussians at one update, and their curvatures.

    The features of a Gaussian are, in this order:

    - 0 to 7: Adam's momentum, number by number; 8 to 15: the gradient over the root of its mean square; 16 to 23: the
      Gauss-Newton step, bounded; 24 to 31: how many of its pixels pull in one direction (the root of the mean square
      over the root of the curvature, bounded).
    - 32, 33: the offset in patches; 34, 35: the scales, as s / (s + 4); 36 to 38: the colour; 39: its energy, bounded;
      40: 4 / (4 + age); 41: how stretched it is, bounded.
    - 42 to 51: what all Gaussians share (`Progress.features`).
    """
    gradient = -state.gradient / state.root
    offset, scale, turn, colour = _activated(state)
    stretch = scale[:, :1] / scale[:, 1:] - scale[:, 1:] / scale[:, :1]
    curvature, steps = _lone_gaussian(state, scale, turn, colour, stretch)
    newton = (steps / state.learning_rates).clamp(-MAX_NEWTON, MAX_NEWTON)
    newton = newton / (1 + newton.abs() / NEWTON_BOUND)
    coherence = (state.num_values / L1_WEIGHT) * state.root * curvature.rsqrt()
    energy = colour.square().sum(1, keepdim=True)
    age = state.age[:, None].to(state.raw.dtype)
    shared = torch.from_numpy(state.progress.features(state.patch_size)).to(state.raw)
    features = torch.cat(
        [
            state.momentum,
            gradient,
            newton,
            2 * coherence / (2 + coherence),
            offset,
            scale / (scale + 4),
            colour,
            energy / (energy + 0.05),
            4 / (4 + age),
            stretch / (1 + stretch.abs()),
            shared.expand(len(age), -1),
        ],
        dim=1,
    )
    return Description(features, curvature)


def _activated(state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offset in patches (N, 2), scales in pixels (N, 2), the angle's σ (N, 1) and colour (N, 3)."""
    raw = state.raw
    scale = state.patch_size * torch.sigmoid(raw[:, SCALE]) + MIN_RAW_SCALE
    return torch.tanh(raw[:, OFFSET]), scale, torch.sigmoid(raw[:, ANGLE : ANGLE + 1]), torch.tanh(raw[:, COLOUR])


def _lone_gaussian(state: State, scale: Tensor, turn: Tensor, colour: Tensor, stretch: Tensor) -> tuple[Tensor, Tensor]:
    """Curvatures (N, 8) of half the squared error by raw numbers, and Gauss-Newton steps (N, 8) in raw numbers.

    They are those of a Gaussian that no other overlaps. Its squared error has, by the centre, the curvature
    E/2 Σ⁻¹ with the energy E = π s₁ s₂ |colour|²; the two coordinates of the centre are solved for together. The
    gradient of the loss is about that of the L1 term. Where errors are as large as their root mean square, it becomes
    the gradient of half the squared error by the factor rms · num_values / 0.7.
    """
    patch_size, raw = state.patch_size, state.raw
    slope = torch.cat(
        [
            4 * patch_size * _bell(2 * raw[:, OFFSET]),
            patch_size * _bell(raw[:, SCALE]),
            2 * math.pi * _bell(raw[:, ANGLE : ANGLE + 1]),
            4 * _bell(2 * raw[:, COLOUR]),
        ],
        dim=1,
    )
    angle = 2 * math.pi * turn
    cos, sin = torch.cos(angle), torch.sin(angle)
    variance_1, variance_2 = scale.square().split(1, dim=1)
    area = math.pi * scale.prod(1, keepdim=True)
    energy = area * colour.square().sum(1, keepdim=True)
    least = RIDGE * area
    bend = torch.cat(
        [
            energy / 2 * (cos * cos / variance_1 + sin * sin / variance_2),
            energy / 2 * (sin * sin / variance_1 + cos * cos / variance_2),
            0.75 * energy / scale.square(),
            energy / 4 * stretch.square(),
            area.expand(-1, 3),
        ],
        dim=1,
    )
    curvature = bend * slope.square() + least
    pull = state.gradient * (-state.progress.rms_error * state.num_values / L1_WEIGHT)
    reach = slope[:, OFFSET].clamp_min(MIN_SLOPE)
    by_x, by_y = (pull[:, OFFSET] / reach).split(1, dim=1)
    covariance_xx = cos * cos * variance_1 + sin * sin * variance_2
    covariance_xy = cos * sin * (variance_1 - variance_2)
    covariance_yy = sin * sin * variance_1 + cos * cos * variance_2
    moved = torch.cat([covariance_xx * by_x + covariance_xy * by_y, covariance_xy * by_x + covariance_yy * by_y], 1)
    centre = moved * 2 / (energy + least) / reach
    return curvature, torch.cat([centre, pull[:, SCALE.start :] / curvature[:, SCALE.start :]], dim=1)


def _bell(raw: Tensor) -> Tensor:
    """σ(raw) (1 - σ(raw)), which neither cancels nor overflows."""
    e = torch.exp(-raw.abs())
    return e / (1 + e).square()
