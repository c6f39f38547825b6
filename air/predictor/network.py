"""What every predictor network is: a module from images and canvases to raw Gaussians, one call per stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from air.gaussians import anchors
from air.predictor import Prediction


class PredictorNetwork(nn.Module):
    """Base of the networks. A subclass implements `forward`.

    Attributes:
        patch_size: Pixels between anchors.
        num_stages: How many stages it has learnt at most; a stage beyond them is an error.
    """

    def __init__(self, patch_size: int, num_stages: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_stages = num_stages

    def forward(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int) -> Tensor:
        """Raw Gaussians of one stage for a batch of images of one size, differentiable in the parameters.

        Args:
            image: What is to be reached, shape (B, 3, H, W), float32 in [0, 1].
            canvas: Unclamped render of the earlier stages, shape (B, 3, H, W), detached.
            active: Which patches keep their Gaussian, boolean, shape (B, rows · columns).
            stage: From 0.

        Returns:
            Shape (B, rows · columns, 8), patches in row-major order.
        """
        raise NotImplementedError

    def start_stage(self, stage: int) -> None:
        """Prepares a stage that was not trained yet: it starts as a copy of the one before it."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int) -> Prediction:
        """As `air.predictor.Predictor`: one image, no gradient."""
        if not 0 <= stage < self.num_stages:
            raise ValueError(f"this predictor has {self.num_stages} stages, there is no stage {stage}")
        _, height, width = image.shape
        raw = self(image[None], canvas[None], active[None], stage)[0]
        return Prediction(raw, anchors(height, width, self.patch_size, image.dtype).to(image.device))
