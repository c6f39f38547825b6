"""Growth of a fit: Gaussians are added where the residual is largest, and all of them are optimised together.

Call it through `air.fitting.fit.fit`. docs/optimizer.md has the search for the defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from air.fitting.grid import grid_initialization
from air.fitting.residual import residual_peaks
from air.gaussians import activate, anchors, grid_shape
from air.optimization.config import OptimizeConfig
from air.optimization.optimize import optimize
from air.optimization.problem import Moments, Reuse, StepCallback, Trajectory
from air.rendering.render import render

_BAND_ROWS = 8  # Gaussians are sorted into bands of this many rows, then by x, so that drawing stays in the cache


@dataclass(frozen=True)
class GrowthConfig:
    """Settings of growth.

    Attributes:
        start_fraction: Fraction of the budget that the grid at the start takes; the patch size follows from it.
        growths: Number of times that Gaussians are added, the same number of Gaussians each time; the first time before
            the first step.
        growth_fraction: Fraction of the steps before the last growth; the remaining steps refine all Gaussians.
        first_raw_scale, last_raw_scale: Raw number of both scales of a round Gaussian of the first growth, and of the
            last; those of the growths between lie evenly between.
    """

    start_fraction: float = 0.27
    growths: int = 4
    growth_fraction: float = 0.42
    first_raw_scale: float = -2.75
    last_raw_scale: float = -3.5

    def __post_init__(self) -> None:
        for name in ("start_fraction", "growth_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        for name in ("first_raw_scale", "last_raw_scale"):
            if not np.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        if self.growths < 0:
            raise ValueError(f"growths must be at least 0, got {self.growths}")

    def raw_scale(self, growth: int) -> float:
        """The raw number of both scales of a round Gaussian of a growth, counted from 1."""
        part = (growth - 1) / max(1, self.growths - 1)
        return self.first_raw_scale + part * (self.last_raw_scale - self.first_raw_scale)

    def phases(self, steps: int) -> list[int]:
        """The steps of each phase: there is a phase before every growth, and one after the last."""
        if not self.growths:
            return [steps]
        between = self.growths - 1
        before = min(round(steps * self.growth_fraction / max(1, between)), steps // self.growths)
        return [0, *[before] * between, steps - before * between]


class Phase(Protocol):
    """Optimises the Gaussians between two growths."""

    def __call__(
        self, raw: Tensor, anchor: Tensor, moments: Moments, config: OptimizeConfig, kept: Tensor
    ) -> tuple[Tensor, Moments]:
        """The Gaussians and moments after the steps of `config`. `kept` is where those of the last phase lie now."""
        ...


def grow(
    target: Tensor,
    num_gaussians: int,
    steps: int,
    patch_size: int,
    growth: GrowthConfig,
    optimization: OptimizeConfig,
    run: Phase,
    draw: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Raw Gaussians (N, 8) of a fit within a budget, and their anchors (N, 2) in pixels.

    Args:
        target: The image, shape (3, height, width), values in [0, 1].
        num_gaussians: The budget.
        steps: Updates of all phases together.
        patch_size: Pixels between the anchors of the grid at the start.
        growth: Settings of growth.
        optimization: Learning rates, schedule and rule of every phase.
        run: Called for every phase, in order.
        draw: The picture (3, height, width) of raw Gaussians at their anchors.
    """
    _, height, width = target.shape
    anchor = anchors(height, width, patch_size, target.dtype).to(target.device)
    raw = grid_initialization(target, patch_size)
    phases = growth.phases(steps)
    moments = Moments.fresh(raw)
    kept = torch.arange(len(raw), device=raw.device)
    residual = torch.empty_like(target)
    done = 0
    for phase, count in enumerate(phases):
        if phase:
            torch.sub(target, draw(raw, anchor), out=residual)
            growths_left = len(phases) - phase
            addition = -(-(num_gaussians - len(raw)) // growths_left)
            new = residual_peaks(residual, patch_size, addition, raw_scale=growth.raw_scale(phase))
            raw, anchor, moments, place = _add(raw, anchor, moments, new, width)
            kept = place[kept]
        if count or phase == len(phases) - 1:
            config = replace(optimization, steps=count, earlier_steps=done, later_steps=steps - done - count)
            raw, moments = run(raw, anchor, moments, config, kept)
            kept = torch.arange(len(raw), device=raw.device)
            done += count
    return raw, anchor


class Optimizer:
    """The phase that `air.optimization.optimize.optimize` makes; it joins the trajectories of all phases.

    Args:
        target: The image.
        patch_size: Pixels between the anchors of the grid at the start.
        backend: As for `air.optimization.optimize.optimize`.
        threads: As for `air.optimization.optimize.optimize`.
        on_step: As for `air.optimization.optimize.optimize`; it counts the updates of all phases.
    """

    def __init__(
        self, target: Tensor, patch_size: int, backend: str, threads: int, on_step: StepCallback | None
    ) -> None:
        self._target, self._patch_size = target, patch_size
        self._backend, self._threads, self._on_step = backend, threads, on_step
        self._trajectories: list[Trajectory] = []
        self._steps: list[int] = []
        self._reuse = Reuse()
        self._last: Tensor | None = None

    def __call__(
        self, raw: Tensor, anchor: Tensor, moments: Moments, config: OptimizeConfig, kept: Tensor
    ) -> tuple[Tensor, Moments]:
        """As `Phase`."""
        result = optimize(
            raw,
            anchor,
            self._target,
            self._patch_size,
            config,
            moments=moments,
            backend=self._backend,
            threads=self._threads,
            on_step=self._on_step and _counting_from(config.earlier_steps, self._on_step),
            # After a phase come new Gaussians, and the next phase measures the state with them.
            measure_end=config.later_steps == 0,
            reuse=self._reuse,
        )
        assert result.moments is not None
        self._trajectories.append(result.trajectory)
        self._steps.append(config.steps)
        self._last = result.raw
        return result.raw, result.moments

    def draw(self, raw: Tensor, anchor: Tensor) -> Tensor:
        """The picture of raw Gaussians at their anchors."""
        if raw is self._last and self._reuse.picture is not None:
            return self._reuse.picture
        _, height, width = self._target.shape
        gaussians = activate(raw, anchor, self._patch_size)
        return render(gaussians, height, width, backend=self._backend, threads=self._threads)

    def trajectory(self) -> Trajectory:
        """That of all phases; where one ends and the next begins, the entry is that with the new Gaussians."""
        ends = [*self._steps[:-1], self._steps[-1] + 1]
        parts = [(part.loss[:end], part.psnr[:end]) for part, end in zip(self._trajectories, ends, strict=True)]
        loss, psnr = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Trajectory(loss, psnr)


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
    raw: Tensor, anchor: Tensor, moments: Moments, new: tuple[Tensor, Tensor], width: int
) -> tuple[Tensor, Tensor, Moments, Tensor]:
    """The Gaussians of an image of this width, and new ones at their anchors, which had no update yet, in order.

    The fourth tensor holds the place of each former Gaussian, and then of each new one, among all.
    """
    new_raw, new_anchor = new
    raw, anchor = torch.cat([raw, new_raw]), torch.cat([anchor, new_anchor])
    moments = Moments.concatenate([moments, Moments.fresh(new_raw)])
    band = torch.floor(anchor[:, 1] / _BAND_ROWS)
    key = band * width + anchor[:, 0]
    # Numpy's stable sort needs hardly any time for the former Gaussians, which are in order.
    order = torch.from_numpy(np.argsort(key.cpu().numpy(), kind="stable")).to(key.device)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return raw.index_select(0, order), anchor.index_select(0, order), moments[order], place
