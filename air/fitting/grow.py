"""Growth of a fit: Gaussians are added where the residual is largest, and all of them are optimised together.

Call it through `air.fitting.fit.fit`. docs/optimizer.md has the search for the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from air.fitting.grid import grid_initialization
from air.fitting.residual import residual_peaks
from air.gaussians import activate, anchors, grid_shape
from air.optimization.config import OptimizeConfig
from air.optimization.optimize import optimize
from air.optimization.problem import Moments, StepCallback, Trajectory
from air.rendering.render import render

OPTIMIZATION = OptimizeConfig(
    offset_learning_rate=0.04,
    scale_learning_rate=0.2,
    angle_learning_rate=0.1,
    colour_learning_rate=0.025,
    beta1=0.85,
    opposed_fraction=0.0,
)
"""Learning rates and schedule of every phase.

Adam's moments survive growth, so these rates are lower than those of a plain grid. No number moves against its
gradient, since plain Adam overshoots where new Gaussians appear beside old ones.
"""

_BAND_ROWS = 8  # Gaussians are sorted into bands of this many rows, then by x, so that drawing stays in the cache


@dataclass(frozen=True)
class GrowthConfig:
    """Settings of growth.

    Attributes:
        start_fraction: Fraction of the budget that the grid at the start takes; the patch size follows from it.
        growths: Number of times that Gaussians are added, the same number of Gaussians each time.
        growth_fraction: Fraction of the steps before the last growth; the remaining steps refine all Gaussians.
    """

    start_fraction: float = 0.27
    growths: int = 4
    growth_fraction: float = 0.42

    def __post_init__(self) -> None:
        for name in ("start_fraction", "growth_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if self.growths < 0:
            raise ValueError(f"growths must be at least 0, got {self.growths}")

    def phases(self, steps: int) -> list[int]:
        """The steps of each phase: there is a phase before every growth, and one after the last."""
        if not self.growths:
            return [steps]
        before = min(round(steps * self.growth_fraction / self.growths), steps // self.growths)
        return [*[before] * self.growths, steps - before * self.growths]


def grow(
    target: Tensor,
    num_gaussians: int,
    steps: int,
    patch_size: int,
    growth: GrowthConfig,
    optimization: OptimizeConfig | None,
    backend: str,
    threads: int,
    on_step: StepCallback | None,
) -> tuple[Tensor, Tensor, Trajectory]:
    """Raw Gaussians (N, 8), their anchors (N, 2) in pixels, and the trajectory of a fit within a budget.

    Args:
        target: The image, shape (3, height, width), values in [0, 1].
        num_gaussians: The budget.
        steps: Adam updates of all phases together.
        patch_size: Pixels between the anchors of the grid at the start.
        growth: Settings of growth.
        optimization: Learning rates and schedule; `OPTIMIZATION` if not given.
        backend: As for `air.optimization.optimize.optimize`.
        threads: As for `air.optimization.optimize.optimize`.
        on_step: As for `air.optimization.optimize.optimize`; it counts the updates of all phases.
    """
    _, height, width = target.shape
    anchor = anchors(height, width, patch_size, target.dtype).to(target.device)
    raw = grid_initialization(target, patch_size)
    trajectories: list[Trajectory] = []
    phases = growth.phases(steps)
    moments = Moments.fresh(raw)
    done = 0
    for phase, count in enumerate(phases):
        if phase:
            canvas = render(activate(raw, anchor, patch_size), height, width, backend=backend, threads=threads)
            growths_left = len(phases) - phase
            addition = -(-(num_gaussians - len(raw)) // growths_left)
            raw, anchor, moments = _add(raw, anchor, moments, target - canvas, patch_size, addition)

        adam = replace(optimization or OPTIMIZATION, steps=count)
        report = on_step and _counting_from(done, on_step)
        result = optimize(
            raw, anchor, target, patch_size, adam, moments=moments, backend=backend, threads=threads, on_step=report
        )
        assert result.moments is not None
        raw, moments = result.raw, result.moments
        trajectories.append(result.trajectory)
        done += count
    return raw, anchor, _joined(trajectories)


def _counting_from(done: int, on_step: StepCallback) -> StepCallback:
    """`on_step` for a phase that begins after `done` updates."""
    return lambda step, loss, psnr: on_step(done + step, loss, psnr)


def largest_grid(height: int, width: int, most: int) -> int:
    """The smallest patch size whose grid has at most `most` patches."""
    patch_size = max(1, int((height * width / most) ** 0.5))
    while np.prod(grid_shape(height, width, patch_size)) > most:
        patch_size += 1
    return patch_size


def _add(
    raw: Tensor, anchor: Tensor, moments: Moments, residual: Tensor, patch_size: int, count: int
) -> tuple[Tensor, Tensor, Moments]:
    """The Gaussians and up to `count` more, which had no update yet, placed where the residual is largest."""
    new_raw, new_anchor = residual_peaks(residual, patch_size, count)
    raw, anchor = torch.cat([raw, new_raw]), torch.cat([anchor, new_anchor])
    moments = Moments.concatenate([moments, Moments.fresh(new_raw)])
    band = torch.floor(anchor[:, 1] / _BAND_ROWS)
    order = torch.argsort(band * residual.shape[2] + anchor[:, 0], stable=True)
    return raw[order].contiguous(), anchor[order].contiguous(), moments[order]


def _joined(parts: list[Trajectory]) -> Trajectory:
    """One trajectory. The first entry of a phase has the new Gaussians and replaces the last of the phase before."""
    loss = np.concatenate([*(part.loss[:-1] for part in parts[:-1]), parts[-1].loss])
    psnr = np.concatenate([*(part.psnr[:-1] for part in parts[:-1]), parts[-1].psnr])
    return Trajectory(loss, psnr)
