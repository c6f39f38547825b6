"""Inputs and outputs of the optimiser: problems, trajectories, results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from air.errors import NonFiniteLossError
from air.gaussians import is_finite
from air.metrics import psnr_of

StepCallback = Callable[[int, float, float], None]
"""Called with (number of updates done, loss, PSNR in dB)."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Loss and PSNR over the steps. Entry k is the state after k updates, so there are steps + 1 entries.

    Attributes:
        loss: 0.7 L1 + 0.3 (1 - SSIM), float64.
        psnr: Peak signal-to-noise ratio in dB of the image clamped to [0, 1], float64.
    """

    loss: NDArray[np.float64]
    psnr: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Moments:
    """Adam's moments of raw Gaussians, with which an optimisation goes on where another one ended.

    Attributes:
        mean: Running mean of the gradients, shape (N, 8), its bias towards zero not corrected.
        square: Running mean of their squares, the same.
        age: Updates that each Gaussian has had, int32, shape (N,): the bias follows from it.
    """

    mean: Tensor
    square: Tensor
    age: Tensor

    def checked(self, raw: Tensor) -> Moments:
        """A copy in the precision of raw Gaussians (N, 8), without a gradient.

        Raises:
            ValueError: The moments are not those of N Gaussians on the same device, or a number is not finite or an age
                is negative.
        """
        expected = (raw.shape, raw.shape, raw.shape[:1])
        shapes = tuple(part.shape for part in (self.mean, self.square, self.age))
        devices = {part.device for part in (self.mean, self.square, self.age)}
        if shapes != expected or devices != {raw.device}:
            raise ValueError(
                f"moments must be those of the {len(raw)} free Gaussians on {raw.device}, got mean, square and age of "
                f"shapes {', '.join(str(tuple(shape)) for shape in shapes)} on {', '.join(map(str, devices))}"
            )
        if not (is_finite(self.mean) and is_finite(self.square) and bool((self.age >= 0).all())):
            raise ValueError("moments must be finite, and ages not negative")
        mean, square = (part.detach().to(raw.dtype, copy=True) for part in (self.mean, self.square))
        return Moments(mean, square, self.age.to(torch.int32, copy=True))

    @staticmethod
    def fresh(raw: Tensor) -> Moments:
        """Those of raw Gaussians (N, 8) that had no update."""
        age = torch.zeros(len(raw), dtype=torch.int32, device=raw.device)
        return Moments(torch.zeros_like(raw), torch.zeros_like(raw), age)

    def __getitem__(self, chosen: Tensor | slice) -> Moments:
        """Those of some of the Gaussians."""
        if isinstance(chosen, Tensor) and chosen.dtype == torch.int64:
            # Torch's general indexing takes three times as long.
            return Moments(*(part.index_select(0, chosen) for part in (self.mean, self.square, self.age)))
        return Moments(self.mean[chosen], self.square[chosen], self.age[chosen])

    @staticmethod
    def concatenate(parts: Sequence[Moments]) -> Moments:
        """Those of several sets of Gaussians, in order."""
        return Moments(*(torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "square", "age")))


@dataclass(frozen=True, eq=False)
class OptimizeResult:
    """The result of an optimisation.

    Attributes:
        raw: Raw Gaussians (N, 8) after the last update; frozen ones are unchanged.
        trajectory: Loss and PSNR after every update.
        moments: Adam's moments of the free Gaussians after the last update; None if there was no optimisation.
    """

    raw: Tensor
    trajectory: Trajectory
    moments: Moments | None = None

    def unless_worse(self, start: Tensor) -> OptimizeResult:
        """This result, or the start if the last loss is above the first.

        Adam's first steps have full size however good the start is, so a few steps can make a good prediction worse.

        Args:
            start: The raw Gaussians that the optimisation started from, shape (N, 8).

        Returns:
            If the start is kept, its trajectory has one entry.
        """
        loss, psnr = self.trajectory.loss, self.trajectory.psnr
        return OptimizeResult(start, Trajectory(loss[:1], psnr[:1])) if loss[-1] > loss[0] else self


class Problem(NamedTuple):
    """One image of a batch; the fields are arguments of `air.optimization.optimize.optimize`."""

    raw: Tensor
    anchor: Tensor
    target: Tensor
    canvas: Tensor | None = None
    moments: Moments | None = None


@dataclass(eq=False)
class Reuse:
    """What optimisations of one target, one after another, have in common: the first makes it, the others use it.

    Attributes:
        target: The target, once there was an optimisation.
        buffers: The backend's own; None before the first optimisation, and with backends that have none.
        picture: The picture (3, height, width) after the last update, which the next optimisation overwrites; None if
            the backend has no such buffer.
    """

    target: Tensor | None = None
    buffers: Any = None
    picture: Tensor | None = None


@dataclass
class Recorder:
    """Collects a trajectory; raises NonFiniteLossError for a loss that is NaN or infinite.

    Attributes:
        on_step: Called for every entry.
        length: Entries of the trajectory; later ones are left out. None: all are kept.
    """

    on_step: StepCallback | None
    length: int | None = None
    loss: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)

    def add(self, loss: float, squared_error: float) -> None:
        step = len(self.loss)
        if not np.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss is {loss} after {step} updates; "
                + ("check that image and canvas are finite" if step == 0 else "lower the learning rates")
            )
        if not self.wants(step):
            return
        self.loss.append(loss)
        self.psnr.append(psnr_of(squared_error))
        if self.on_step is not None:
            self.on_step(step, loss, self.psnr[-1])

    def wants(self, step: int) -> bool:
        """Whether the trajectory has an entry of the state after so many updates."""
        return self.length is None or step < self.length

    def trajectory(self) -> Trajectory:
        return Trajectory(np.array(self.loss), np.array(self.psnr))


@contextmanager
def naming_image(image: int) -> Iterator[None]:
    """Sets the `image` of a NonFiniteLossError that is raised within to this index in the batch."""
    try:
        yield
    except NonFiniteLossError as error:
        error.image = image
        raise
