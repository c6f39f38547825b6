"""Fitting one image with a budget of Gaussians: a coarse grid that grows where the picture is still bad.

    result = grow(image, num_gaussians=28_000, steps=100)

Unlike in the stage loop (`air.stages.loop`), nothing is frozen: after every growth all Gaussians are optimised
together. It is worth several decibels at the same number of Gaussians and the same time, and is what to use when the
Gaussians themselves are wanted and not the training targets of a staged network. docs/optimizer.md has the search.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from air.fitting.grid import grid_initialization
from air.fitting.residual import residual_peaks
from air.gaussians import Gaussians, activate, anchors, grid_shape
from air.optimization.optimize import OptimizeConfig, StepCallback, Trajectory, check_counts, optimize, place_image
from air.rendering.render import render

_BAND_ROWS = 8  # Gaussians are kept in reading order of bands this high, so that drawing stays in the cache


@dataclass(frozen=True)
class GrowthConfig:
    """How a fit grows.

    Attributes:
        start_share: Share of the budget in the grid of the start; the patch size follows from it.
        growths: How often Gaussians are added, the same number each time.
        growth_share: Share of the steps before the last growth; the rest refines all of them.
        optimization: Rates and schedule of every phase; its `steps` are not used. Unlike elsewhere, nothing moves
            against its gradient: new Gaussians beside old ones make plain Adam overshoot.
    """

    start_share: float = 0.42
    growths: int = 3
    growth_share: float = 0.42
    optimization: OptimizeConfig = field(default_factory=lambda: OptimizeConfig(opposed_share=0.0))

    def __post_init__(self) -> None:
        for name in ("start_share", "growth_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if self.growths < 0:
            raise ValueError(f"growths must be at least 0, got {self.growths}")

    def phases(self, steps: int) -> list[int]:
        """The steps of each phase: one before every growth, and the last one."""
        before = [round(steps * self.growth_share / self.growths)] * self.growths if self.growths else []
        return [*before, max(0, steps - sum(before))]


@dataclass(frozen=True, eq=False)
class GrowthResult:
    """One image fitted with a budget.

    Attributes:
        gaussians: What to render.
        raw: Their raw form, shape (N, 8).
        anchor: The anchor of each, shape (N, 2), pixels; several may share one.
        patch_size: The range of the raw form, pixels.
        trajectory: Loss and PSNR after every step; where the fit grew, with the new Gaussians.
        seconds: Wall time, compilation excluded.
        height: Of the image, pixels.
        width: Of the image, pixels.
    """

    gaussians: Gaussians
    raw: Tensor
    anchor: Tensor
    patch_size: int
    trajectory: Trajectory
    seconds: float
    height: int
    width: int


def grow(
    image: Any,
    num_gaussians: int,
    steps: int = 100,
    *,
    config: GrowthConfig | None = None,
    backend: str = "auto",
    device: str = "auto",
    threads: int = 1,
    on_step: StepCallback | None = None,
) -> GrowthResult:
    """Fits at most `num_gaussians` Gaussians to one image in `steps` steps of Adam.

    - Start from a plain grid with a part of the budget.
    - Optimise; then add narrow Gaussians at the pixels where each takes most of the residual away; several times over.
    - Optimise all of them together with the steps that are left.

    Args:
        image: uint8 array (height, width, 3), a PIL image, or a tensor (3, height, width) with values in [0, 1].
        num_gaussians: The budget, at least 1. A picture that is met exactly takes less.
        steps: Adam updates in all.
        config: How it grows.
        backend: As for `air.optimization.optimize.optimize`.
        device: As for `air.optimization.optimize.fit`.
        threads: As for `air.optimization.optimize.optimize`.
        on_step: Called with the updates done, loss and PSNR in dB.

    Raises:
        ValueError: The image is none of these, or an option does not fit.
        NonFiniteLossError: The loss stopped being a number.
    """
    config = config or GrowthConfig()
    check_counts(num_gaussians=(num_gaussians, 1), steps=(steps, 0), threads=(threads, 1))
    target, home = place_image(image, device, backend)
    begin = time.perf_counter()
    _, height, width = target.shape
    patch_size = _patch_size(height, width, max(1, int(num_gaussians * config.start_share)))
    anchor = anchors(height, width, patch_size, target.dtype).to(target.device)
    raw = grid_initialization(target, patch_size)
    trajectories: list[Trajectory] = []
    phases = config.phases(steps)
    done = 0
    for phase, count in enumerate(phases):
        if phase:
            canvas = render(activate(raw, anchor, patch_size), height, width, backend=backend, threads=threads)
            growths_left = len(phases) - phase
            addition = -(-(num_gaussians - len(raw)) // growths_left)
            raw, anchor = _add(raw, anchor, target - canvas, patch_size, addition)

        adam = replace(config.optimization, steps=count)
        report = on_step and _counting_from(done, on_step)
        result = optimize(raw, anchor, target, patch_size, adam, backend=backend, threads=threads, on_step=report)
        raw = result.raw
        trajectories.append(result.trajectory)
        done += count
    return GrowthResult(
        gaussians=activate(raw, anchor, patch_size).to(home),
        raw=raw.to(home),
        anchor=anchor.to(home),
        patch_size=patch_size,
        trajectory=_joined(trajectories),
        seconds=time.perf_counter() - begin,
        height=height,
        width=width,
    )


def _counting_from(done: int, on_step: StepCallback) -> StepCallback:
    """For a phase that begins after `done` updates."""
    return lambda step, loss, psnr: on_step(done + step, loss, psnr)


def _patch_size(height: int, width: int, most: int) -> int:
    """The smallest patch size whose grid has at most `most` patches."""
    patch_size = max(1, int((height * width / most) ** 0.5))
    while np.prod(grid_shape(height, width, patch_size)) > most:
        patch_size += 1
    return patch_size


def _add(raw: Tensor, anchor: Tensor, residual: Tensor, patch_size: int, count: int) -> tuple[Tensor, Tensor]:
    """The Gaussians with up to `count` more, where the residual is largest."""
    new_raw, new_anchor = residual_peaks(residual, patch_size, count)
    raw, anchor = torch.cat([raw, new_raw]), torch.cat([anchor, new_anchor])
    band = torch.floor(anchor[:, 1] / _BAND_ROWS)
    order = torch.argsort(band * residual.shape[2] + anchor[:, 0], stable=True)
    return raw[order].contiguous(), anchor[order].contiguous()


def _joined(parts: list[Trajectory]) -> Trajectory:
    """One trajectory: the last entry of a phase gives way to the first of the next, which has the new Gaussians."""
    loss = np.concatenate([*(part.loss[:-1] for part in parts[:-1]), parts[-1].loss])
    psnr = np.concatenate([*(part.psnr[:-1] for part in parts[:-1]), parts[-1].psnr])
    return Trajectory(loss, psnr)
