"""The losses of the training phases, for a batch of images of one size (method.md section 5).

Every phase has a function that returns one loss per image, so that each image has the same weight on any number of
workers. This module knows nothing of where images come from or how the network is updated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from air.codec.uniform import channel_values, gaussians_from_channels
from air.compute.threads import Workers
from air.gaussians import Gaussians, activate, anchors
from air.loss.batch import BatchLoss
from air.optimization.config import OptimizeConfig
from air.optimization.optimize import optimize, optimize_batch
from air.optimization.problem import Problem
from air.predictor.network import PredictorNetwork
from air.rendering.batch import render_batch
from air.stages.control import StageControl, active_patches
from pipeline.training.config import LossConfig
from pipeline.training.targets import StageTargets

_SMALLEST_MSE = 1e-5
"""Mean squared error of 50 dB, added before the logarithm: above that PSNR, the loss hardly falls any further."""

DISTILL_WEIGHT = 100.0
"""Weight of the smooth L1 between predicted and optimised raw numbers (method.md section 5)."""


class _DrawnStage(NamedTuple):
    """The input and the result of a stage, for a batch.

    Attributes:
        canvas: The image that earlier stages drew, shape (B, 3, H, W), without gradient.
        active: Which patches got a Gaussian, boolean, shape (B, patches).
        gaussians: The Gaussians of these patches, one image after another.
    """

    canvas: Tensor
    active: Tensor
    gaussians: Gaussians


@dataclass
class BatchLosses:
    """Losses of a batch.

    Attributes:
        loss: The loss of each image, shape (B,), with its autograd graph.
        squared_error: Mean squared error of the last stage's image, clamped to [0, 1], shape (B,); None in a phase that
            draws no image.
    """

    loss: Tensor
    squared_error: Tensor | None


def propose(
    network: PredictorNetwork,
    images: Tensor,
    canvas: Tensor,
    active: Tensor,
    stage: int,
    precision: str,
    threads: int,
) -> list[Tensor]:
    """A stage's proposals of raw Gaussians, each of shape (B, patches, 8), float32; the last one is the stage's result.

    Args:
        network: The network that proposes.
        images: Shape (B, 3, H, W).
        canvas: The image that earlier stages drew, of the same shape.
        active: Which patches get a Gaussian, boolean, shape (B, patches).
        stage: Number of the stage, from 0.
        precision: "float32" or "bfloat16", for computations inside the network.
        threads: CPU threads of the network.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        proposals = network.proposals(images, canvas.detach(), active, stage, threads)
    return [raw.float() for raw in proposals]


def active_batch(canvas: Tensor, images: Tensor, patch_size: int, control: StageControl) -> Tensor:
    """Which patches of each image are bad on the canvas, boolean, shape (B, patches)."""
    pairs = zip(canvas.detach(), images, strict=True)
    return torch.stack([active_patches(drawn, image, patch_size, control) for drawn, image in pairs])


def anchors_batch(network: PredictorNetwork, raw: Tensor, height: int, width: int) -> Tensor:
    """The anchors of raw Gaussians (B, patches, 8), shape (B, patches, 2): offsets count from there."""
    return torch.stack([network.anchors(own, height, width) for own in raw])


def activate_batch(network: PredictorNetwork, raw: Tensor, active: Tensor, height: int, width: int) -> Gaussians:
    """The Gaussians of the active patches of all images, one image after another."""
    return activate(raw[active], anchors_batch(network, raw, height, width)[active], network.patch_size)


def finetune_losses(
    network: PredictorNetwork,
    images: Tensor,
    stages: int,
    config: LossConfig,
    workers: Workers,
    precision: str = "float32",
) -> BatchLosses:
    """The losses of phase finetune: all stages jointly, with each stage's render compared with the image.

    A render is a plain sum of Gaussians. A stage's image is therefore the image of the stage before plus the render of
    the stage's own Gaussians, and its loss reaches every earlier stage without drawing anything twice. The network sees
    the canvas without gradient.

    Args:
        network: The network that is trained.
        images: Shape (B, 3, H, W), float32 in [0, 1].
        stages: Number of stages that take part.
        config: Weights of the loss, and stage control.
        workers: CPU threads for rendering and loss.
        precision: "float32" or "bfloat16", for computations inside the network.
    """
    judge = BatchLoss(images, workers)
    total, canvas, _ = _draw_stages(network, images, stages, judge, config, workers, precision)
    return BatchLosses(total, squared_errors(canvas, images))


def _draw_stages(
    network: PredictorNetwork,
    images: Tensor,
    stages: int,
    judge: BatchLoss,
    config: LossConfig,
    workers: Workers,
    precision: str,
) -> tuple[Tensor, Tensor, list[_DrawnStage]]:
    """The loss of all stages (B,), the image that they draw (B, 3, H, W), and the stages that added Gaussians."""
    _, _, height, width = images.shape
    control = config.control()
    canvas = torch.zeros_like(images)
    total = torch.zeros(len(images), device=images.device)
    added = []
    for stage in range(stages):
        active = active_batch(canvas, images, network.patch_size, control)
        drawn = [canvas]
        if bool(active.any()):
            proposals = propose(network, images, canvas, active, stage, precision, workers.count)
            per_image = active.sum(dim=1).tolist()
            tables = [activate_batch(network, raw, active, height, width) for raw in proposals]
            drawn = [canvas + render_batch(table, per_image, height, width, workers) for table in tables]
            added.append(_DrawnStage(canvas.detach(), active, tables[-1]))
        canvas = drawn[-1]
        losses = _judge(canvas, images, judge, config)
        for earlier in drawn[:-1]:
            losses = losses + config.proposal_weight * _judge(earlier, images, judge, config)
        total = total + config.stage_weights.at(stage) * losses
    return total, canvas, added


def quantize_losses(
    network: PredictorNetwork,
    images: Tensor,
    stages: int,
    config: LossConfig,
    workers: Workers,
    precision: str = "float32",
) -> BatchLosses:
    """The losses of phase quantize: those of finetune, plus loss and distortion of the quantised Gaussians.

    This is method.md section 6. The Gaussians of all stages are quantised together after the last stage, as in a file,
    so that no stage sees the quantisation.

    Args:
        network: The network that is trained; it has a quantiser.
        images: Shape (B, 3, H, W), float32 in [0, 1].
        stages: Number of stages that take part.
        config: Weights of the loss, and stage control.
        workers: CPU threads for rendering and loss.
        precision: "float32" or "bfloat16", for computations inside the network.

    Returns:
        The losses; the squared error is that of the quantised picture.
    """
    assert network.quantizer is not None
    _, _, height, width = images.shape
    judge = BatchLoss(images, workers)
    total, canvas, added = _draw_stages(network, images, stages, judge, config, workers, precision)
    if not added:
        return BatchLosses(total, squared_errors(canvas, images))
    patches = [stage.active.nonzero(as_tuple=True) for stage in added]
    image = torch.cat([index for index, _ in patches])
    # Files count offsets from plain anchors, even if the network has other anchors.
    plain = anchors(height, width, network.patch_size).to(images.device)
    anchor = torch.cat([plain[patch] for _, patch in patches])
    values = channel_values(Gaussians.concatenate([stage.gaussians for stage in added]), anchor)
    quantised, distortions = [], []
    for index, feature in enumerate(_features(network, images, added, precision)):
        own = image == index
        levels, distortion = network.quantizer(values[own], feature)
        quantised.append(gaussians_from_channels(levels, anchor[own]))
        distortions.append(distortion)
    drawn = render_batch(Gaussians.concatenate(quantised), [len(own) for own in quantised], height, width, workers)
    total = total + _judge(drawn, images, judge, config) + torch.stack(distortions)
    return BatchLosses(total, squared_errors(drawn, images))


def _features(network: PredictorNetwork, images: Tensor, added: Sequence[_DrawnStage], precision: str) -> Tensor:
    """The global feature of each image after the last stage that added to it, shape (B, feature size), float32."""
    last = torch.zeros(len(images), dtype=torch.long)
    for number, stage in enumerate(added):
        last[stage.active.any(dim=1).cpu()] = number
    places, features = [], []
    for number, stage in enumerate(added):
        chosen = (last == number).nonzero()[:, 0].to(images.device)
        if len(chosen):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                feature = network.global_feature(images[chosen], stage.canvas[chosen], number)
            places.append(chosen)
            features.append(feature.float())
    return torch.cat(features)[torch.cat(places).argsort()]


def distill_losses(raw: Tensor, target: Tensor, active: Tensor) -> Tensor:
    """100 · smooth L1 between sigmoid(raw) and sigmoid(target), the mean over an image's active Gaussians, shape (B,).

    Args:
        raw: Predicted raw numbers, shape (B, patches, 8).
        target: Optimised raw numbers, of the same shape.
        active: Boolean, shape (B, patches). The loss of an image without active patches is 0.
    """
    error = F.smooth_l1_loss(raw.sigmoid(), target.sigmoid(), reduction="none").mean(dim=2)
    return DISTILL_WEIGHT * (error * active).sum(dim=1) / active.sum(dim=1).clamp(min=1)


def _teach(proposals: Sequence[Tensor], target: Tensor, active: Tensor, config: LossConfig) -> Tensor:
    """The distillation loss of a stage's result, plus the weighted losses of the proposals before it, shape (B,)."""
    *earlier, last = (distill_losses(raw, target, active) for raw in proposals)
    return last + config.proposal_weight * sum(earlier, torch.zeros_like(last))


def offline_pod_losses(
    network: PredictorNetwork,
    images: Tensor,
    targets: Sequence[StageTargets],
    config: LossConfig,
    precision: str = "float32",
    threads: int = 1,
) -> BatchLosses:
    """The losses of offline pod: predictions on the stored canvases, compared with the stored targets, all stages.

    Args:
        network: The network that is trained.
        images: Shape (B, 3, H, W), float32 in [0, 1].
        targets: The batched targets of each stage that takes part.
        config: Weights of the loss.
        precision: "float32" or "bfloat16", for computations inside the network.
        threads: CPU threads of the network.
    """
    total = torch.zeros(len(images), device=images.device)
    for stage, (canvas, active, target) in enumerate(targets):
        if bool(active.any()):
            proposals = propose(network, images, canvas, active, stage, precision, threads)
            total = total + config.stage_weights.at(stage) * _teach(proposals, target, active, config)
    return BatchLosses(total, None)


def online_pod_losses(
    network: PredictorNetwork,
    images: Tensor,
    horizons: Sequence[OptimizeConfig],
    config: LossConfig,
    workers: Workers,
    precision: str = "float32",
) -> BatchLosses:
    """The losses of online pod: a short optimisation starts from the predictions, and its result is their target.

    The next stage builds on the predictions and not on the targets: when the network predicts, it meets such canvases.

    Args:
        network: The network that is trained.
        images: Shape (B, 3, H, W), float32 in [0, 1].
        horizons: The optimiser's configuration for each stage that takes part.
        config: Weights of the loss, and stage control.
        workers: CPU threads; each thread optimises one image at a time.
        precision: "float32" or "bfloat16", for computations inside the network.
    """
    _, _, height, width = images.shape
    control = config.control()
    canvas = torch.zeros_like(images)
    total = torch.zeros(len(images), device=images.device)
    for stage, horizon in enumerate(horizons):
        active = active_batch(canvas, images, network.patch_size, control)
        if not bool(active.any()):
            break
        proposals = propose(network, images, canvas, active, stage, precision, workers.count)
        predicted = proposals[-1].detach()
        goal = _optimized(network, predicted, active, images, canvas, horizon, workers)
        total = total + config.stage_weights.at(stage) * _teach(proposals, goal, active, config)
        gaussians = activate_batch(network, predicted, active, height, width)
        canvas = canvas + render_batch(gaussians, active.sum(dim=1).tolist(), height, width, workers)
    return BatchLosses(total, squared_errors(canvas, images))


def _optimized(
    network: PredictorNetwork,
    raw: Tensor,
    active: Tensor,
    images: Tensor,
    canvas: Tensor,
    horizon: OptimizeConfig,
    workers: Workers,
) -> Tensor:
    """The raw numbers (B, patches, 8), optimised in active patches where that lowers the loss."""
    _, _, height, width = images.shape
    patch_size = network.patch_size
    anchor = anchors_batch(network, raw, height, width)
    problems = [
        Problem(raw[index, chosen], anchor[index, chosen], images[index], canvas[index])
        for index, chosen in enumerate(active)
        if bool(chosen.any())
    ]
    if raw.device.type == "cuda":
        results = optimize_batch(problems, patch_size, horizon)
    else:
        results: list[Any] = [None] * len(problems)

        def run(index: int) -> None:
            start, place, image, background, _ = problems[index]
            results[index] = optimize(start, place, image, patch_size, horizon, canvas=background)

        workers.run(run, [(index,) for index in range(len(problems))])
    goal = raw.clone()
    kept = [result.unless_worse(problem.raw) for result, problem in zip(results, problems, strict=True)]
    goal[active] = torch.cat([result.raw for result in kept])
    return goal


def _judge(drawn: Tensor, images: Tensor, photometric: BatchLoss, config: LossConfig) -> Tensor:
    """The loss of the images that were drawn, one for each image, shape (B,)."""
    losses = torch.zeros(len(images), device=images.device)
    if config.photometric_weight:
        losses = losses + config.photometric_weight * photometric(drawn)
    if config.mse_weight or config.psnr_weight:
        squared = (drawn - images).square().mean(dim=(1, 2, 3))
        losses = losses + config.mse_weight * squared
        if config.psnr_weight:
            losses = losses + config.psnr_weight * torch.log10(squared + _SMALLEST_MSE)
    return losses


def squared_errors(canvas: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of each image, after the canvas is clamped to [0, 1]; shape (B,), without gradient."""
    return (canvas.detach().clamp(0, 1) - images).square().mean(dim=(1, 2, 3))
