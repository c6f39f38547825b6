"""What a training phase holds the network against, for a batch of images of one size (method.md section 5).

Every function returns one loss per image, so that a caller weights images, not workers. They know nothing of where the
images come from or how the network is updated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from pydantic import Field, model_validator
from torch import Tensor

from air.batch import BatchLoss, render_batch
from air.gaussians import Gaussians, activate, anchors
from air.predictor.network import PredictorNetwork
from air.render.threads import Workers
from air.stages import StageControl, active_patches
from pipeline.config import Config

_SMALLEST_MSE = 1e-5
"""50 dB: what is better need not be made better still."""


class LossConfig(Config):
    """What is asked of the network."""

    stage_weights: tuple[float, ...] = Field(
        (1.0,), description="weight of each stage's loss; the last one holds for all further"
    )
    photometric_weight: float = Field(1.0, ge=0, le=1e6, description="weight of 0.7 L1 + 0.3 (1 - SSIM)")
    mse_weight: float = Field(0.0, ge=0, le=1e6, description="weight of the mean squared error")
    psnr_weight: float = Field(
        0.0, ge=0, le=1e6, description="weight of -PSNR / 10, with which every image counts alike, easy or hard"
    )
    proposal_weight: float = Field(
        0.3, ge=0, le=1e6, description="weight of what a network passes through on its way to a stage's result"
    )
    max_patch_mse: float = Field(10**-3.5, ge=0, le=10, description="a patch with a larger mean squared error is bad")
    max_patch_dssim: float = Field(0.05, ge=0, le=2, description="a patch with a larger 1 - SSIM is bad")

    @model_validator(mode="after")
    def _weights_are_weights(self) -> LossConfig:
        if not self.stage_weights or not all(0 <= weight <= 1e6 for weight in self.stage_weights):
            raise ValueError("stage_weights must be one or more numbers from 0 to 1000000")
        return self

    def stage_weight(self, stage: int) -> float:
        """The weight of a stage's loss."""
        return self.stage_weights[min(stage, len(self.stage_weights) - 1)]

    def control(self) -> StageControl:
        """Which patches get a Gaussian."""
        return StageControl(self.max_patch_mse, self.max_patch_dssim)


@dataclass
class BatchLosses:
    """Losses of a batch.

    Attributes:
        loss: What is minimised, shape (B,), with its graph.
        squared_error: Of the last stage's image, clamped to [0, 1], mean over its pixels, shape (B,).
        gaussians: How many each stage drew, summed over the batch.
    """

    loss: Tensor
    squared_error: Tensor
    gaussians: list[int] = field(default_factory=list)


def propose(
    network: PredictorNetwork, images: Tensor, canvas: Tensor, active: Tensor, stage: int, precision: str
) -> list[Tensor]:
    """Raw Gaussians (B, patches, 8) in float32, the last ones the stage's; only the network may be less precise."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        proposals = network.proposals(images, canvas.detach(), active, stage)
    return [raw.float() for raw in proposals]


def active_batch(canvas: Tensor, images: Tensor, patch_size: int, control: StageControl) -> Tensor:
    """Which patches of each image are still bad, boolean, shape (B, patches)."""
    pairs = zip(canvas.detach(), images, strict=True)
    return torch.stack([active_patches(drawn, image, patch_size, control) for drawn, image in pairs])


def activate_batch(raw: Tensor, active: Tensor, height: int, width: int, patch_size: int) -> Gaussians:
    """The Gaussians of the active patches of all images, one image after another."""
    anchor = anchors(height, width, patch_size).to(raw.device)
    image, patch = active.nonzero(as_tuple=True)
    return activate(raw[image, patch], anchor[patch], patch_size)


def finetune_losses(
    network: PredictorNetwork,
    images: Tensor,
    stages: int,
    config: LossConfig,
    workers: Workers,
    precision: str = "float32",
) -> BatchLosses:
    """All stages jointly, each stage's render held against the image.

    A render is a plain sum, so a stage's image is that of the stage before plus what the stage draws: its loss reaches
    every earlier stage without drawing anything twice. What the network sees of the canvas carries no gradient.

    Args:
        network: What is trained.
        images: Shape (B, 3, H, W), float32 in [0, 1].
        stages: How many take part.
        config: Weights and stage control.
        workers: CPU threads for rendering and loss.
        precision: "float32" or "bfloat16".
    """
    _, _, height, width = images.shape
    control = config.control()
    judge = BatchLoss(images, workers)
    canvas = torch.zeros_like(images)
    total = torch.zeros(len(images), device=images.device)
    counts = []
    for stage in range(stages):
        active = active_batch(canvas, images, network.patch_size, control)
        counts.append(int(active.sum()))
        drawn = [canvas]
        if counts[-1]:
            proposals = propose(network, images, canvas, active, stage, precision)
            per_image = active.sum(dim=1).tolist()
            tables = [activate_batch(raw, active, height, width, network.patch_size) for raw in proposals]
            drawn = [canvas + render_batch(table, per_image, height, width, workers) for table in tables]
        canvas = drawn[-1]
        losses = _judge(canvas, images, judge, config)
        for passed in drawn[:-1]:
            losses = losses + config.proposal_weight * _judge(passed, images, judge, config)
        total = total + config.stage_weight(stage) * losses
    return BatchLosses(total, squared_errors(canvas, images), counts)


def _judge(drawn: Tensor, images: Tensor, photometric: BatchLoss, config: LossConfig) -> Tensor:
    """The loss of each image, shape (B,)."""
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
    """Mean squared error of each image of a canvas clamped to [0, 1], without gradient, shape (B,)."""
    return (canvas.detach().clamp(0, 1) - images).square().mean(dim=(1, 2, 3))
