"""The stage loop (method.md section 3), which distilling, encoding, evaluation and training use.

Each stage compares the image with the canvas, the render of all Gaussians so far, and adds one Gaussian to every patch
that is still bad. Gaussians of earlier stages are frozen, so a stage sees only their render. Several images may go
through the stages together to fill a GPU; the results are those of each image alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from air.compute.compile import KernelSet
from air.errors import NonFiniteLossError
from air.gaussians import RAW_CHANNELS, Gaussians, activate
from air.optimization.config import OptimizeConfig
from air.optimization.optimize import optimize_batch
from air.optimization.problem import OptimizeResult, Problem, Trajectory
from air.predictor.base import Predictor
from air.rendering.render import render
from air.stages.control import StageControl, bad_patches, largest_errors, patch_errors

Canvas = Literal["target", "predicted"]
"""Which Gaussians of a stage: as optimised, or as predicted."""


@dataclass(frozen=True)
class StageResult:
    """The Gaussians that one stage added to an image. Tensors are on the image's device.

    Attributes:
        stage: From 0.
        patch: Row-major patch indices of its Gaussians, shape (N,), int64, ascending.
        anchor: Their anchors in pixels, shape (N, 2).
        predicted: Raw Gaussians as predicted, shape (N, 8).
        target: Raw Gaussians as optimised, shape (N, 8). The predicted ones if the steps made the loss higher.
        steps: Optimisation steps taken.
        loss: 0.7 L1 + 0.3 (1 - SSIM) of all Gaussians so far: with `predicted` in this stage, and with `target`.
        psnr: PSNR in dB of the same two pictures.
    """

    stage: int
    patch: Tensor
    anchor: Tensor
    predicted: Tensor
    target: Tensor
    steps: int
    loss: tuple[float, float]
    psnr: tuple[float, float]

    def __len__(self) -> int:
        return self.patch.shape[0]

    def to(self, device: torch.device | str) -> StageResult:
        """The same result with its tensors on another device."""
        return replace(
            self,
            patch=self.patch.to(device),
            anchor=self.anchor.to(device),
            predicted=self.predicted.to(device),
            target=self.target.to(device),
        )

    def raw(self, canvas: Canvas) -> Tensor:
        """Raw Gaussians (N, 8): `target` or `predicted`."""
        return self.target if canvas == "target" else self.predicted

    def gaussians(self, canvas: Canvas, patch_size: int) -> Gaussians:
        """The Gaussians that `raw` gives at the anchors; `patch_size` is the predictor's, in pixels."""
        return activate(self.raw(canvas), self.anchor, patch_size)


def run_stages(
    image: Tensor,
    predictor: Predictor,
    optimization: Sequence[OptimizeConfig],
    *,
    control: StageControl | None = None,
    canvas: Canvas = "target",
    budget: int | None = None,
    judge: bool = True,
    backend: str = "auto",
    threads: int = 1,
) -> Iterator[StageResult]:
    """Predicts and optimises stage after stage. Ends early if no patch is bad any more.

    To predict without optimising, use `air.stages.predict.predict`.

    Args:
        image: Shape (3, H, W), float32 in [0, 1].
        predictor: Predicts every stage.
        optimization: Settings of each stage, so their number is the number of stages. A stage with zero steps stays as
            predicted.
        control: The bounds that decide which patches get a Gaussian.
        canvas: The Gaussians that the canvas of the next stage is drawn from. "predicted" gives the canvas that a
            network will meet, and the paper trains with it. "target" gives the best picture.
        budget: Largest number of Gaussians of an image, all stages together. If it does not suffice for all bad patches
            of a stage, the patches with the largest squared error get a Gaussian. No limit if not given.
        judge: Whether loss and PSNR of stages without steps are computed. If not, they are NaN, which saves a tenth of
            the time of predicting.
        backend: As for `air.optimization.optimize.optimize`.
        threads: CPU threads at most, those of the predictor included.

    Yields:
        One result per stage that added Gaussians.

    Raises:
        InvalidGaussiansError: A predicted or optimised number is not finite.
        NonFiniteLossError: The loss of a stage became NaN or infinite.
        ValueError: The budget is below 1.

    Example:
        >>> from air.predictor.load import load_predictor
        >>> image = torch.linspace(0, 1, 28).expand(3, 14, 28)
        >>> stages = list(run_stages(image, load_predictor("grid"), [OptimizeConfig(steps=5)] * 2))
        >>> [stage.stage for stage in stages], len(stages[0])
        ([0, 1], 8)
    """
    control = control or StageControl()
    for added in _each_stage([image], predictor, optimization, control, canvas, budget, judge, backend, threads):
        yield added[0]


def run_stages_batch(
    images: Sequence[Tensor],
    predictor: Predictor,
    optimization: Sequence[OptimizeConfig],
    *,
    control: StageControl | None = None,
    canvas: Canvas = "target",
    budget: int | None = None,
    judge: bool = True,
    backend: str = "auto",
    threads: int = 1,
) -> list[list[StageResult]]:
    """Runs the stages of several images together, optimised by `air.optimization.optimize.optimize_batch`.

    On the CPU an image's results are the same bits with any other images beside it. On CUDA the last bits differ from
    run to run (docs/cuda.md).

    Args:
        images: Each of shape (3, H, W), float32 in [0, 1], of any size; all on one device.
        predictor: As for `run_stages`, like all further arguments.
        optimization: Settings of each stage.
        control: The bounds that decide which patches get a Gaussian.
        canvas: The Gaussians that the canvas of the next stage is drawn from.
        budget: Largest number of Gaussians of each image.
        judge: Whether loss and PSNR of stages without steps are computed.
        backend: As for `air.optimization.optimize.optimize`.
        threads: CPU threads at most.

    Returns:
        The results of every image, one per stage that added Gaussians.

    Raises:
        InvalidGaussiansError: As `run_stages`.
        NonFiniteLossError: As `run_stages`. Its `image` is the index of the image. The results of the other images are
            lost too: run them again without that image.
    """
    results: list[list[StageResult]] = [[] for _ in images]
    control = control or StageControl()
    for added in _each_stage(images, predictor, optimization, control, canvas, budget, judge, backend, threads):
        for number, result in added.items():
            results[number].append(result)
    return results


def _each_stage(
    images: Sequence[Tensor],
    predictor: Predictor,
    optimization: Sequence[OptimizeConfig],
    control: StageControl,
    canvas: Canvas,
    budget: int | None,
    judge: bool,
    backend: str,
    threads: int,
) -> Iterator[dict[int, StageResult]]:
    """Yields the results of each stage by index in `images`. Images without a bad patch have none."""
    if budget is not None and budget < 1:
        raise ValueError(f"budget must be at least 1 Gaussian, got {budget}")
    patch_size = predictor.patch_size
    left = [budget] * len(images)
    backgrounds = [torch.zeros_like(image) for image in images]
    unfinished = list(range(len(images)))
    for stage, config in enumerate(optimization):
        patches: dict[int, Tensor] = {}
        problems: dict[int, Problem] = {}
        for number in unfinished:
            image, background = images[number], backgrounds[number]
            mse, dssim = patch_errors(background, image, patch_size)
            active = bad_patches(mse, dssim, control)
            remaining = left[number]
            if remaining is not None:
                active = largest_errors(mse, active, remaining)
                left[number] = remaining - int(active.sum())
            patch = active.nonzero()[:, 0]
            if not len(patch):
                continue
            raw, anchor = predictor.predict(image, background, active, stage, threads)
            patches[number] = patch
            problems[number] = Problem(raw[patch].contiguous(), anchor[patch].contiguous(), image, background)
        unfinished = list(problems)
        if not unfinished:
            return
        if judge or config.steps:
            optimized = optimize_of(list(problems.values()), unfinished, patch_size, config, backend, threads)
        else:
            optimized = [_unjudged(problem, patch_size) for problem in problems.values()]
        added = {}
        for (number, problem), result in zip(problems.items(), optimized, strict=True):
            kept = result.unless_worse(problem.raw)
            trajectory = kept.trajectory
            added[number] = StageResult(
                stage=stage,
                patch=patches[number],
                anchor=problem.anchor,
                predicted=problem.raw,
                target=kept.raw,
                steps=config.steps,
                loss=(float(trajectory.loss[0]), float(trajectory.loss[-1])),
                psnr=(float(trajectory.psnr[0]), float(trajectory.psnr[-1])),
            )
        yield added
        if stage + 1 < len(optimization):
            for number, result in added.items():
                _, height, width = images[number].shape
                drawn = render(result.gaussians(canvas, patch_size), height, width, backend=backend, threads=threads)
                backgrounds[number] = backgrounds[number] + drawn


def optimize_of(
    problems: Sequence[Problem],
    numbers: Sequence[int],
    patch_size: int,
    config: OptimizeConfig,
    backend: str,
    threads: int,
) -> list[OptimizeResult]:
    """`air.optimization.optimize.optimize_batch` of some of several images, which have these numbers.

    Raises:
        NonFiniteLossError: As `optimize_batch`; its `image` is the image's number.
    """
    try:
        return optimize_batch(problems, patch_size, config, backend=backend, threads=threads)
    except NonFiniteLossError as error:
        error.image = numbers[error.image]
        raise


def _unjudged(problem: Problem, patch_size: int) -> OptimizeResult:
    """The prediction as a result whose loss and PSNR are NaN.

    Raises:
        InvalidGaussiansError: It is not finite.
    """
    activate(problem.raw, problem.anchor, patch_size).validate()
    unknown = np.array([math.nan])
    return OptimizeResult(problem.raw, Trajectory(unknown, unknown))


def all_gaussians(stages: Sequence[StageResult], patch_size: int, canvas: Canvas) -> Gaussians:
    """The Gaussians of all stages as one table, in order of stage and patch."""
    return Gaussians.concatenate([stage.gaussians(canvas, patch_size) for stage in stages])


def all_predicted(stages: Sequence[StageResult]) -> tuple[Tensor, Tensor]:
    """The predicted raw Gaussians (N, 8) of all stages, and their anchors (N, 2) in pixels."""
    raw = torch.cat([stage.predicted for stage in stages] or [torch.empty(0, RAW_CHANNELS)])
    return raw, torch.cat([stage.anchor for stage in stages] or [torch.empty(0, 2)])


def stage_kernels() -> KernelSet:
    """The kernels that predicting and optimising in stages runs on the CPU."""
    from air.fitting.fit import fit_kernels
    from air.predictor.compact.network import compact_kernels
    from air.stages import patches_cpu

    return fit_kernels() + patches_cpu.KERNELS + compact_kernels()
