"""How fast this machine fits: the number of steps that a growing fit makes in given seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_SIDE = 256  # of the picture that is fitted, pixels
_FEW, _MANY = 512, 4096  # budgets of its Gaussians
_SHORT, _LONG = 8, 24  # steps
_REPEATS = 3

Fit = Callable[[torch.Tensor, int, int], None]
"""Fits a picture with a budget of Gaussians in a number of steps."""


@dataclass(frozen=True)
class Pace:
    """Seconds of a growing fit: start · pixels + steps · (pixel · pixels + gaussian · Gaussians).

    Attributes:
        start: Of the start and the growths, for each pixel.
        pixel: Of a step, for each pixel.
        gaussian: Of a step, for each Gaussian of the budget.
    """

    start: float
    pixel: float
    gaussian: float

    def seconds(self, steps: int, pixels: int, num_gaussians: int) -> float:
        """Seconds that a fit takes."""
        return self.start * pixels + steps * (self.pixel * pixels + self.gaussian * num_gaussians)

    def steps(self, seconds: float, pixels: int, num_gaussians: int) -> int:
        """The most steps that a fit makes in these seconds, at least 1."""
        of_a_step = self.pixel * pixels + self.gaussian * num_gaussians
        return max(1, int((seconds - self.start * pixels) / of_a_step))


def measure_pace(fit: Fit, clock: Callable[[], float] = time.perf_counter) -> Pace:
    """The pace of `fit`, from the fastest of a few fits of a small generated picture: about half a second.

    Args:
        fit: Fits a picture.
        clock: Tells the time in seconds.
    """
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(3, _SIDE, _SIDE, generator=generator)

    def seconds_of(budget: int, steps: int) -> float:
        fastest = float("inf")
        for _ in range(_REPEATS):
            begin = clock()
            fit(picture, budget, steps)
            fastest = min(fastest, clock() - begin)
        return fastest

    fit(picture, _FEW, 1)  # loads what the first fit of a process loads
    pixels = _SIDE * _SIDE
    short = seconds_of(_MANY, _SHORT)
    many = (seconds_of(_MANY, _LONG) - short) / (_LONG - _SHORT)
    few = (seconds_of(_FEW, _LONG) - seconds_of(_FEW, _SHORT)) / (_LONG - _SHORT)
    # Noise may make differences small or negative: a step costs something, and so does a Gaussian.
    many = max(many, 1e-6)
    gaussian = max((many - few) / (_MANY - _FEW), 0.01 * many / _MANY)
    pixel = max(many - gaussian * _MANY, 0.01 * many) / pixels
    return Pace(max(short - _SHORT * many, 0.0) / pixels, pixel, gaussian)
