"""How the optimiser steps: Adam's constants and the learning rate of every raw number at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from air.gaussians import RAW_CHANNELS

GROUPS = {"offset": slice(0, 2), "scale": slice(2, 4), "angle": slice(4, 5), "colour": slice(5, 8)}
"""Columns of raw Gaussians that share a learning rate."""


@dataclass(frozen=True)
class OptimizeConfig:
    """How to optimise. The defaults and what else was tried are in docs/optimizer.md.

    Attributes:
        steps: Number of Adam updates, at least 0.
        offset_learning_rate: Adam's learning rate of the raw offsets.
        scale_learning_rate: The same, of the raw scales.
        angle_learning_rate: The same, of the raw angle.
        colour_learning_rate: The same, of the raw colours.
        constant_fraction: Share of the steps, 0 to 1, at these rates; then they fall linearly.
        final_fraction: The rates that the fall heads for, as a share of the first.
        beta1, beta2, eps: Adam's constants.
        opposed_fraction: Share, 0 to 1, that is kept of an update against the present gradient, number by number: there
            momentum has overshot. 1 is plain Adam, 0 the cautious Adam of arXiv 2411.16085 without its rescaling.
    """

    steps: int = 50
    offset_learning_rate: float = 0.1
    scale_learning_rate: float = 0.3
    angle_learning_rate: float = 0.15
    colour_learning_rate: float = 0.04
    constant_fraction: float = 0.75
    final_fraction: float = 0.1
    beta1: float = 0.8
    beta2: float = 0.95
    eps: float = 1e-8
    opposed_fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, got {self.steps}")
        for name in (
            "offset_learning_rate",
            "scale_learning_rate",
            "angle_learning_rate",
            "colour_learning_rate",
            "eps",
        ):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        for name in ("constant_fraction", "final_fraction", "opposed_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")

    @staticmethod
    def refinement(steps: int) -> OptimizeConfig:
        """For a start that is good already, a prediction: lower rates, the fewer steps the lower, and no overshooting.

        The rates that suit a plain grid throw a prediction back by several decibels before they improve it;
        docs/optimizer.md has both. A fifth of them is best for 10 steps, two fifths for 50: that is 0.06 √steps.

        Args:
            steps: Updates, at least 0.
        """
        share = min(1.0, 0.06 * math.sqrt(max(1, steps)))
        return replace(OptimizeConfig(steps=steps).scaled(share), opposed_fraction=0.0)

    def scaled(self, factor: float) -> OptimizeConfig:
        """The same with all learning rates multiplied."""
        rates = {name: getattr(self, name) * factor for name in (f"{group}_learning_rate" for group in GROUPS)}
        return replace(self, **rates)

    def learning_rates(self, step: int) -> NDArray[np.float64]:
        """Learning rate of each of the 8 raw columns for update number `step`, counted from 0."""
        done = step / self.steps
        falling = (1 - done) / (1 - self.constant_fraction) if self.constant_fraction < 1 else 1.0
        share = self.final_fraction + (1 - self.final_fraction) * min(1.0, falling)
        rates = np.empty(RAW_CHANNELS)
        for name, columns in GROUPS.items():
            rates[columns] = share * getattr(self, f"{name}_learning_rate")
        return rates
