"""What every predictor network is: a module from images and canvases to raw Gaussians, one call per stage."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from air.gaussians import anchors
from air.predictor import Prediction


class PredictorNetwork(nn.Module):
    """Base of the networks. A subclass implements `forward` and `start_stage`.

    Attributes:
        architecture: Its name in `ARCHITECTURES`.
        patch_size: Pixels between anchors.
        num_stages: How many stages it can predict; a stage beyond them is an error.
        settings: The keyword arguments that build it again, plain JSON values.
    """

    architecture: ClassVar[str]

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.patch_size: int = settings["patch_size"]
        self.num_stages: int = settings["num_stages"]

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


ARCHITECTURES = {"compact": "air.predictor.compact:CompactPredictor", "dinov3": "air.predictor.dinov3:DinoPredictor"}
"""Where each architecture's class is; its module loads with the first use."""


def build(architecture: str, settings: dict[str, Any]) -> PredictorNetwork:
    """A network with fresh weights.

    Raises:
        ValueError: The architecture is unknown, or a setting is missing, unknown or out of its bounds.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    module, name = ARCHITECTURES[architecture].split(":")
    try:
        return getattr(importlib.import_module(module), name)(**settings)
    except TypeError as error:
        raise ValueError(f"settings of architecture {architecture!r}: {error}") from None
