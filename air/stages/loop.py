"""Stage control and the stage loop (method.md section 3), shared by distilling, encoding and training.

Each stage looks at what the Gaussians so far leave over and adds one Gaussian to every patch that is still bad. Earlier
ones are frozen, so they enter a stage only as their render, the canvas. Images may go through the stages together,
which is what fills a GPU; each comes out as if it had gone alone.
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
from air.gaussians import Gaussians, activate
from air.optimization.optimize import OptimizeConfig, optimize_batch
from air.optimization.problem import OptimizeResult, Problem, Trajectory
from air.predictor.base import Predictor
from air.rendering.render import render
from air.stages.control import StageControl, bad_patches, largest_errors, patch_errors


@dataclass(frozen=True)
class StageResult:
    """What one stage added to an image. Its tensors are where the image is.

    Attributes:
        stage: From 0.
        patch: Row-major patch indices of its Gaussians, shape (N,), int64, ascending.
        anchor: Their anchors in pixels, shape (N, 2).
        predicted: Raw Gaussians as predicted, shape (N, 8).
        target: Raw Gaussians as optimised, shape (N, 8); the predicted ones where the steps left the loss higher.
        steps: Optimisation steps taken.
        loss: 0.7 L1 + 0.3 (1 - SSIM) of all Gaussians so far, with this stage's as predicted and with `target`.
        psnr: The same in dB.
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
        """The same on another device."""
        names = ("patch", "anchor", "predicted", "target")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def run_stages(
    image: Tensor,
    predictor: Predictor,
    optimization: Sequence[OptimizeConfig],
    *,
    control: StageControl | None = None,
    canvas: Literal["target", "predicted"] = "target",
    budget: int | None = None,
    judge: bool = True,
    backend: str = "auto",
    threads: int = 1,
) -> Iterator[StageResult]:
    """Predicts and optimises stage after stage; ends early when no patch is bad any more.

    Args:
        image: Shape (3, H, W), float32 in [0, 1].
        predictor: Asked once per stage.
        optimization: One per stage; their number is the number of stages. Zero steps leave a stage as predicted.
        control: Which patches get a Gaussian.
        canvas: What the next stage builds on. The paper trains with `predicted`, the canvas that its network will meet;
            `target` gives the best picture, and is right where no network is to be matched.
        budget: Most Gaussians of an image, all stages together: where they do not suffice for all bad patches, those
            with the largest squared error get them. No limit if not given.
        judge: Whether stages without steps are held against the image. If not, their loss and PSNR are not numbers,
            which saves a tenth of the time of predicting.
        backend: As for `air.optimization.optimize.optimize`.
        threads: CPU threads at most.

    Yields:
        One result per stage that added Gaussians.

    Raises:
        InvalidGaussiansError: What was predicted, or optimised, is not finite.
        NonFiniteLossError: From the optimiser.
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
    canvas: Literal["target", "predicted"] = "target",
    budget: int | None = None,
    judge: bool = True,
    backend: str = "auto",
    threads: int = 1,
) -> list[list[StageResult]]:
    """What `run_stages` gives for each of several images, optimised together
    (`air.optimization.optimize.optimize_batch`).

    On the CPU an image's results do not depend on the others, bit for bit. On CUDA the last bits differ from run to run
    anyway (docs/cuda.md).

    Args:
        images: Each of shape (3, H, W), float32 in [0, 1], of any size; all on one device.
        predictor: As for `run_stages`, like all that follow.
        optimization: One per stage.
        control: Which patches get a Gaussian.
        canvas: What the next stage builds on.
        budget: Most Gaussians of each image.
        judge: Whether stages without steps are held against their images.
        backend: As for `air.optimization.optimize.optimize`.
        threads: CPU threads at most.

    Returns:
        For every image its results, one per stage that added Gaussians.

    Raises:
        InvalidGaussiansError: As `run_stages`.
        NonFiniteLossError: As `run_stages`; its `image` says which of the images it was. The others are lost with it:
            run them again without that one.
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
    canvas: Literal["target", "predicted"],
    budget: int | None,
    judge: bool,
    backend: str,
    threads: int,
) -> Iterator[dict[int, StageResult]]:
    """After each stage, what it added to each image that still had a bad patch, by the image's place in `images`."""
    if budget is not None and budget < 1:
        raise ValueError(f"budget must be at least 1 Gaussian, got {budget}")
    patch_size = predictor.patch_size
    left = [budget] * len(images)
    backgrounds = [torch.zeros_like(image) for image in images]
    going = list(range(len(images)))
    for stage, config in enumerate(optimization):
        patches: dict[int, Tensor] = {}
        problems: dict[int, Problem] = {}
        for number in going:
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
            raw, anchor = predictor.predict(image, background, active, stage)
            patches[number] = patch
            problems[number] = Problem(raw[patch].contiguous(), anchor[patch].contiguous(), image, background)
        going = list(problems)
        if not going:
            return
        if judge or config.steps:
            try:
                optimized = optimize_batch(
                    list(problems.values()), patch_size, config, backend=backend, threads=threads
                )
            except NonFiniteLossError as error:
                error.image = going[error.image]
                raise
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
                gaussians = activate(getattr(result, canvas), result.anchor, patch_size)
                _, height, width = images[number].shape
                drawn = render(gaussians, height, width, backend=backend, threads=threads)
                backgrounds[number] = backgrounds[number] + drawn


def _unjudged(problem: Problem, patch_size: int) -> OptimizeResult:
    """A prediction as it is.

    Raises:
        InvalidGaussiansError: It is not finite.
    """
    activate(problem.raw, problem.anchor, patch_size).validate()
    unknown = np.array([math.nan])
    return OptimizeResult(problem.raw, Trajectory(unknown, unknown))


def all_gaussians(stages: Sequence[StageResult], patch_size: int, which: Literal["target", "predicted"]) -> Gaussians:
    """The Gaussians of all stages as one table, in order of stage and patch."""
    return Gaussians.concatenate([activate(getattr(stage, which), stage.anchor, patch_size) for stage in stages])


def stage_kernels() -> KernelSet:
    """What predicting and optimising in stages runs on the CPU."""
    from air.fitting.fit import fit_kernels
    from air.predictor.compact.network import compact_kernels
    from air.stages import patches_cpu

    return fit_kernels() + patches_cpu.KERNELS + compact_kernels()
