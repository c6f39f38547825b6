"""What is optimised and what comes out: problems, trajectories, results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from air.errors import NonFiniteLossError
from air.metrics import psnr_of

StepCallback = Callable[[int, float, float], None]
"""Called with (number of updates done, loss, PSNR in dB)."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What every step reached: entry k is the state after k updates, so there are steps + 1 entries.

    Attributes:
        loss: 0.7 L1 + 0.3 (1 - SSIM), float64.
        psnr: Peak signal-to-noise ratio in dB of the image clamped to [0, 1], float64.
    """

    loss: NDArray[np.float64]
    psnr: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class OptimizeResult:
    """The optimised raw Gaussians (N, 8), frozen ones unchanged, and the way there."""

    raw: Tensor
    trajectory: Trajectory

    def unless_worse(self, start: Tensor) -> OptimizeResult:
        """This, or where its loss ended above the first: the Gaussians it started from, (N, 8), with no way at all.

        Adam's first steps are of full size however good the start is, so a few of them can spoil a good prediction.
        """
        loss, psnr = self.trajectory.loss, self.trajectory.psnr
        return OptimizeResult(start, Trajectory(loss[:1], psnr[:1])) if loss[-1] > loss[0] else self


class Problem(NamedTuple):
    """One image of a batch; see `optimize` for the fields."""

    raw: Tensor
    anchor: Tensor
    target: Tensor
    canvas: Tensor | None = None


@dataclass
class Recorder:
    """Collects a trajectory and refuses a loss that is not a number."""

    on_step: StepCallback | None
    loss: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)

    def add(self, loss: float, squared_error: float) -> None:
        step = len(self.loss)
        if not np.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss is {loss} after {step} updates; "
                + ("check that image and canvas are finite" if step == 0 else "lower the learning rates")
            )
        self.loss.append(loss)
        self.psnr.append(psnr_of(squared_error))
        if self.on_step is not None:
            self.on_step(step, loss, self.psnr[-1])

    def trajectory(self) -> Trajectory:
        return Trajectory(np.array(self.loss), np.array(self.psnr))
