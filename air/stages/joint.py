"""Joint optimisation of all stages, after the stage loop (`air.stages.loop`): the targets of `air distill`.

The loop optimises a stage while the others rest, so a stage repairs what earlier ones drew and cannot count on later
ones. Here the Gaussians of all stages move together, and each keeps its stage and its anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from air.optimization.config import OptimizeConfig
from air.optimization.problem import Problem
from air.rendering.render import render
from air.stages.loop import Canvas, StageResult, optimize_of


def optimize_jointly(
    images: Sequence[Tensor],
    stages: Sequence[Sequence[StageResult]],
    patch_size: int,
    config: OptimizeConfig,
    *,
    canvas: Canvas = "target",
    backend: str = "auto",
    threads: int = 1,
) -> list[list[StageResult]]:
    """Optimises the Gaussians of all stages of each image together, against the image.

    Args:
        images: Each of shape (3, H, W), float32 in [0, 1], all on one device.
        stages: The stages of each image, from `run_stages_batch`.
        patch_size: The predictor's, in pixels.
        config: Steps and rates; the start is good already, as `air.optimization.settings.refinement` expects.
        canvas: The start: the Gaussians that the loop drew its canvases from, as predicted or as optimised.
        backend: As for `air.optimization.optimize.optimize`.
        threads: CPU threads at most.

    Returns:
        The stages with other targets: the Gaussians that the joint steps reached, or those that they started from if
        the loss of the picture of all stages became higher. The second of a stage's `loss` and of its `psnr` are of the
        picture that the targets of this stage and of all earlier ones draw together.

    Raises:
        InvalidGaussiansError: A Gaussian is not finite.
        NonFiniteLossError: The loss became NaN or infinite. Its `image` is the index of the image.

    Example:
        >>> from air.optimization.settings import refinement
        >>> from air.predictor.base import GridPredictor
        >>> from air.stages.loop import run_stages
        >>> image = torch.linspace(0, 1, 28).square().expand(3, 14, 28).contiguous()
        >>> stages = list(run_stages(image, GridPredictor(7), [OptimizeConfig(steps=0)] * 2, canvas="predicted"))
        >>> (joint,) = optimize_jointly([image], [stages], 7, refinement(20), canvas="predicted")
        >>> joint[-1].psnr[1] > joint[-1].psnr[0]
        True
    """
    filled = [number for number, of_image in enumerate(stages) if of_image]
    problems = [_all_of(stages[number], images[number], canvas) for number in filled]
    optimized = optimize_of(problems, filled, patch_size, config, backend, threads)
    moved = [list(of_image) for of_image in stages]
    for number, problem, result in zip(filled, problems, optimized, strict=True):
        parts = result.unless_worse(problem.raw).raw.split([len(stage) for stage in stages[number]])
        moved[number] = [replace(stage, target=raw) for stage, raw in zip(stages[number], parts, strict=True)]
    return _judged(images, moved, patch_size, backend, threads)


def _all_of(stages: Sequence[StageResult], image: Tensor, canvas: Canvas) -> Problem:
    raw = torch.cat([stage.raw(canvas) for stage in stages])
    return Problem(raw, torch.cat([stage.anchor for stage in stages]), image)


def _judged(
    images: Sequence[Tensor], stages: Sequence[list[StageResult]], patch_size: int, backend: str, threads: int
) -> list[list[StageResult]]:
    """The stages with loss and PSNR of the pictures that their targets draw, one stage on top of the other."""
    judged: list[list[StageResult]] = [[] for _ in images]
    drawn = [torch.zeros_like(image) for image in images]
    for stage in range(max((len(of_image) for of_image in stages), default=0)):
        numbers = [number for number, of_image in enumerate(stages) if stage < len(of_image)]
        problems = [
            Problem(stages[number][stage].target, stages[number][stage].anchor, images[number], drawn[number])
            for number in numbers
        ]
        seen = optimize_of(problems, numbers, patch_size, OptimizeConfig(steps=0), backend, threads)
        for number, result in zip(numbers, seen, strict=True):
            added = stages[number][stage]
            loss, psnr = float(result.trajectory.loss[0]), float(result.trajectory.psnr[0])
            judged[number].append(replace(added, loss=(added.loss[0], loss), psnr=(added.psnr[0], psnr)))
            if stage + 1 < len(stages[number]):
                _, height, width = images[number].shape
                gaussians = added.gaussians("target", patch_size)
                drawn[number] = drawn[number] + render(gaussians, height, width, backend=backend, threads=threads)
    return judged
