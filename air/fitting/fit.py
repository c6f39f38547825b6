"""Fitting one image without a network: from a plain grid, or within a budget of Gaussians that grows.

    result = fit(image, num_gaussians=20_000, steps=100)
    result = fit(image, patch_size=4, steps=100)

With a budget, all Gaussians are optimised together after every growth, whereas the stage loop (`air.stages.loop`)
freezes those of earlier stages. This gains several decibels at the same number of Gaussians and in the same time. Fit
with a budget to get the Gaussians of an image, and use the stage loop to make targets for a network that predicts in
stages. docs/optimizer.md has the search for the defaults.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from air.arguments import check_counts, image_tensor
from air.compute.backends import backend_for, choose_device
from air.compute.compile import KernelSet
from air.defaults import AUTO, FIT_STEPS, PIXELS_PER_GAUSSIAN
from air.fitting.grid import grid_initialization
from air.fitting.grow import GrowthConfig, Optimizer, grow, largest_grid
from air.fitting.pace import Pace, measure_pace
from air.gaussians import Gaussians, activate, anchors
from air.optimization.config import OptimizeConfig
from air.optimization.optimize import optimize
from air.optimization.problem import StepCallback, Trajectory
from air.optimization.rule import LearnedRule
from air.optimization.settings import fit_optimization


@dataclass(frozen=True, eq=False)
class FitResult:
    """One fitted image.

    Attributes:
        gaussians: The fitted Gaussians, for `air.render`.
        raw: Their raw form, shape (N, 8).
        anchor: The anchor of each, shape (N, 2), pixels; after growth several may share one.
        patch_size: Pixels between anchors, which is the range of the raw form.
        trajectory: Loss and PSNR after every step. Where the fit grows, the entry includes the new Gaussians.
        seconds: Wall time, compilation excluded.
        height: Height of the image, pixels.
        width: Width of the image, pixels.
    """

    gaussians: Gaussians
    raw: Tensor
    anchor: Tensor
    patch_size: int
    trajectory: Trajectory
    seconds: float
    height: int
    width: int


def fit(
    image: Any,
    steps: int | None = None,
    *,
    seconds: float | None = None,
    num_gaussians: int | None = None,
    patch_size: int | None = None,
    optimization: OptimizeConfig | None = None,
    growth: GrowthConfig | None = None,
    rule: str | LearnedRule = AUTO,
    backend: str = "auto",
    device: str = "auto",
    threads: int = 1,
    on_step: StepCallback | None = None,
) -> FitResult:
    """Fits Gaussians to one image, in a number of steps or of seconds.

    With a budget (`num_gaussians`):

    - Start from a plain grid with a part of the budget.
    - Optimise; then add narrow Gaussians at the pixels where each removes most of the residual; repeat.
    - Optimise all of them together with the remaining steps.

    With `patch_size`: start from the plain grid with one Gaussian per patch, ceil(height/p) · ceil(width/p) in all, and
    optimise these.

    Args:
        image: uint8 array (height, width, 3), a PIL image, or a tensor (3, height, width) with values in [0, 1].
        steps: Number of updates; 100 if neither this nor `seconds` is given.
        seconds: Time that the fit may take, in place of `steps`, for a fit with a budget. The number of steps
            follows from the machine's pace, which the first such call of a process measures in half a second. So the
            result depends on the machine, and a fit beside other work takes longer.
        num_gaussians: The budget, at least 1. The fit has fewer Gaussians if the residual becomes zero. If neither this
            nor `patch_size` is given, one for every `air.defaults.PIXELS_PER_GAUSSIAN` pixels.
        patch_size: Pixels between the anchors of a plain grid to which nothing is added. Not with `num_gaussians`.
        optimization: Learning rates and schedule; its `steps` are not used. By default `OptimizeConfig()` for a plain
            grid, and `air.optimization.settings.fit_optimization` with a budget.
        growth: How a fit within a budget grows.
        rule: What makes the updates of a fit with a budget: "auto", the shipped rule in short fits and Adam in long
            ones; "adam"; "shipped"; the path of a rule NAME.safetensors; or a rule. Not with `optimization`.
        backend: As for `air.optimization.optimize.optimize`.
        device: Where to compute: "cpu", "cuda", or "auto", which is "cuda" if there is a GPU and triton. An image
            tensor on a GPU stays there. The result is on the image's device, which for arrays is the CPU.
        threads: As for `air.optimization.optimize.optimize`.
        on_step: Called with the number of updates done, loss and PSNR in dB for every entry of the trajectory, and once
            more for the last one if Gaussians are added after it.

    Raises:
        ValueError: The image is of another kind, or an option does not fit.
        CheckpointError: There is no such rule.
        NonFiniteLossError: The loss became NaN or infinite.

    Example:
        >>> import torch
        >>> import air
        >>> image = torch.linspace(0, 1, 16).expand(3, 16, 16)
        >>> grid = air.fit(image, steps=20, patch_size=4)
        >>> len(grid.gaussians)
        16
        >>> bool(grid.trajectory.loss[-1] < grid.trajectory.loss[0])
        True
        >>> len(air.fit(image, steps=20, num_gaussians=30).gaussians) <= 30
        True
    """
    if num_gaussians is not None and patch_size is not None:
        raise ValueError("give num_gaussians or patch_size, not both: a grid's size follows from its patches")
    if growth is not None and patch_size is not None:
        raise ValueError("growth is for a fit with num_gaussians: a plain grid does not grow")
    if optimization is not None and rule != AUTO:
        raise ValueError("give optimization or rule, not both: optimization.learned is its rule")
    check_counts(threads=(threads, 1))
    target, home = _place(image, device, backend)
    _, height, width = target.shape
    if num_gaussians is None:
        num_gaussians = max(1, height * width // PIXELS_PER_GAUSSIAN)
    check_counts(num_gaussians=(num_gaussians, 1))
    if seconds is not None:
        if steps is not None or patch_size is not None:
            raise ValueError("give seconds with num_gaussians alone: steps follow from it, and a plain grid has none")
        if not 0 < seconds < math.inf:
            raise ValueError(f"seconds must be a positive number, got {seconds}")
        steps = _pace(backend, target.device.type, threads).steps(seconds, height * width, num_gaussians)
    steps = FIT_STEPS if steps is None else steps
    check_counts(steps=(steps, 0))
    begin = time.perf_counter()
    if patch_size is not None:
        check_counts(patch_size=(patch_size, 1))
        config = replace(optimization or OptimizeConfig(), steps=steps)
        anchor = anchors(height, width, patch_size, target.dtype).to(target.device)
        raw = grid_initialization(target, patch_size)
        result = optimize(raw, anchor, target, patch_size, config, backend=backend, threads=threads, on_step=on_step)
        raw, trajectory = result.raw, result.trajectory
    else:
        growth = growth or GrowthConfig()
        patch_size = largest_grid(height, width, max(1, int(num_gaussians * growth.start_fraction)))
        run = Optimizer(target, patch_size, backend, threads, on_step)
        config = optimization or fit_optimization(steps, rule)
        raw, anchor = grow(target, num_gaussians, steps, patch_size, growth, config, run, run.draw)
        trajectory = run.trajectory()
    gaussians = activate(raw, anchor, patch_size).to(home)
    seconds = time.perf_counter() - begin
    return FitResult(gaussians, raw.to(home), anchor.to(home), patch_size, trajectory, seconds, height, width)


@lru_cache(maxsize=8)
def _pace(backend: str, device: str, threads: int) -> Pace:
    """The pace of fits within a budget on this machine; measured once for a process."""

    def growing(picture: Tensor, budget: int, steps: int) -> None:
        fit(picture, steps, num_gaussians=budget, backend=backend, device=device, threads=threads)

    # The CPU time of this thread does not count waiting for a core that other work has.
    alone = device == "cpu" and threads == 1
    return measure_pace(growing, time.thread_time if alone else time.perf_counter)


def fit_kernels() -> KernelSet:
    """The kernels that a fit runs on the CPU."""
    from air.fitting import filter_cpu
    from air.optimization import cpu

    return cpu.KERNELS + filter_cpu.KERNELS


def _place(image: Any, device: str, backend: str) -> tuple[Tensor, torch.device]:
    """The image as a tensor on the device of the computation, and the device of the result. Compiles the kernels.

    Raises:
        ValueError: `image` is not an image.
        BackendUnavailableError: As `choose_device`.
    """
    target = image_tensor(image)
    home = target.device
    if home.type == "cpu" and target.dtype == torch.float32:
        target = target.to(choose_device(device, backend))
    if backend_for(target, backend) == "cpu":
        fit_kernels().compile()
    return target, home
