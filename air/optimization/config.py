"""Settings of the optimiser: Adam's constants, and the learning rate of every raw number at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from air.gaussians import COLUMN_GROUPS, RAW_CHANNELS
from air.optimization.rule import Adam, LearnedRule, Progress, UpdateRule


@dataclass(frozen=True)
class OptimizeConfig:
    """Steps and learning rates. docs/optimizer.md compares the defaults with other values.

    Attributes:
        steps: Number of Adam updates, at least 0.
        offset_learning_rate: Adam's learning rate of the raw offsets.
        scale_learning_rate: Learning rate of the raw scales.
        angle_learning_rate: Learning rate of the raw angle.
        colour_learning_rate: Learning rate of the raw colours.
        constant_fraction: Fraction of the steps, 0 to 1, at these rates. In the rest, the rates fall linearly.
        final_fraction: The rates that the fall ends at, as a fraction of the first.
        beta1, beta2, eps: Adam's constants.
        opposed_fraction: Where an update goes against the present gradient, momentum has overshot, and only this
            fraction of the update, 0 to 1, is made. Each number is treated by itself. 1 is plain Adam; 0 is the
            cautious Adam of arXiv 2411.16085 without its rescaling.
        squared_fraction: Fraction, 0 to 1, of the L1 term's gradient that the gradient of the squared error takes the
            place of. Both have the same mean slope. The loss that is reported stays the same.
        learned: A learned rule that makes the updates in place of Adam; its betas must be beta1 and beta2.
        learned_steps: Number of updates, earlier ones included, after which Adam takes over from the learned rule.
        earlier_steps, later_steps: Updates that the fit makes before and after these; a learned rule plans with them.

    Example:
        >>> OptimizeConfig(steps=20).learning_rates(0)[2:4]
        array([0.3, 0.3])
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
    squared_fraction: float = 0.0
    learned: LearnedRule | None = None
    learned_steps: int | None = None
    earlier_steps: int = 0
    later_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "learned_steps", "earlier_steps", "later_steps"):
            count = getattr(self, name)
            if count is not None and count < 0:
                raise ValueError(f"{name} must be at least 0, got {count}")
        for name in (
            "offset_learning_rate",
            "scale_learning_rate",
            "angle_learning_rate",
            "colour_learning_rate",
            "eps",
        ):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        for name in ("constant_fraction", "final_fraction", "opposed_fraction", "squared_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= np.float32(getattr(self, name)) < 1:  # as kernels have it
                raise ValueError(f"{name} must be at least 0 and below 1 in float32, got {getattr(self, name)}")
        if self.learned is not None and (self.learned.beta1, self.learned.beta2) != (self.beta1, self.beta2):
            raise ValueError(
                f"the learned rule was trained with beta1 {self.learned.beta1} and beta2 {self.learned.beta2}; the "
                f"configuration has {self.beta1} and {self.beta2}"
            )

    def scaled(self, factor: float) -> OptimizeConfig:
        """The same settings with all learning rates multiplied by `factor`."""
        rates = {name: getattr(self, name) * factor for name in (f"{group}_learning_rate" for group in COLUMN_GROUPS)}
        return replace(self, **rates)

    def learning_rates(self, step: int) -> NDArray[np.float64]:
        """Learning rate of each of the 8 raw columns for update number `step`, counted from 0."""
        return self._annealing(step) * self.first_learning_rates()

    def rule(self, step: int) -> UpdateRule:
        """The rule of update number `step`, counted from 0."""
        learned = self.learned_at(step)
        return Adam(self.opposed_fraction) if learned is None else learned

    def learned_at(self, step: int) -> LearnedRule | None:
        """The learned rule, if it makes update number `step`."""
        ends = self.learned_steps is not None and self.earlier_steps + step >= self.learned_steps
        return None if ends else self.learned

    def progress(self, step: int, squared_error: float) -> Progress:
        """Where the fit stands at update number `step`, given the mean squared error of the clamped picture."""
        return Progress(step, self.steps, self.earlier_steps, self.later_steps, math.sqrt(squared_error))

    def first_learning_rates(self) -> NDArray[np.float64]:
        """Learning rate of each of the 8 raw columns before annealing."""
        rates = np.empty(RAW_CHANNELS)
        for name, columns in COLUMN_GROUPS.items():
            rates[columns] = getattr(self, f"{name}_learning_rate")
        return rates

    def _annealing(self, step: int) -> float:
        done = step / self.steps
        falling = (1 - done) / (1 - self.constant_fraction) if self.constant_fraction < 1 else 1.0
        return self.final_fraction + (1 - self.final_fraction) * min(1.0, falling)
