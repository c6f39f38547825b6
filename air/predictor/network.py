"""What every predictor network is: a module from images and canvases to raw Gaussians, one call per stage."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from air.gaussians import anchors
from air.predictor.base import Prediction
from air.predictor.quantizer import ImageAdaptiveQuantizer

_QUANTIZER_RATE = 10.0
"""Steps and lows lie tenths from where they start, a trained network's weights thousandths from where they go."""

_DECAYING = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


class PredictorNetwork(nn.Module, ABC):
    """Base of the networks. A subclass implements `forward`, `global_feature` and `start_stage`.

    All its tensors are in its state dict.

    Args:
        feature_size: Length of its global feature.
        quantizer_bits: Per channel, of the quantiser that the network learns (`air.codec.uniform`); None: it has none.
        settings: The other keyword arguments of the subclass.

    Attributes:
        architecture: Its name in `ARCHITECTURES`.
        can_checkpoint: Whether `gradient_checkpointing` does anything.
        untrained_part: What of a fresh network is meant to have weights that were learned elsewhere; empty: nothing.
        patch_size: Pixels between anchors.
        num_stages: How many stages it can predict; a stage beyond them is an error.
        settings: The keyword arguments that build it again, plain JSON values.
        gradient_checkpointing: Whether training recomputes activations in the backward pass instead of keeping them,
            where the architecture can: less memory, more time, the same gradients. Off in a new network.
        quantizer: What its Gaussians are stored with, if it has learned that.
    """

    architecture: ClassVar[str]
    can_checkpoint: ClassVar[bool] = False
    untrained_part: ClassVar[str] = ""

    def __init__(self, *, feature_size: int, quantizer_bits: Sequence[int] | None = None, **settings: Any) -> None:
        super().__init__()
        # Absent where there is none, so that cards say the same as before there were quantisers.
        self.settings = settings if quantizer_bits is None else {**settings, "quantizer_bits": list(quantizer_bits)}
        self.patch_size: int = settings["patch_size"]
        self.num_stages: int = settings["num_stages"]
        self.gradient_checkpointing = False
        self.quantizer = (
            None if quantizer_bits is None else ImageAdaptiveQuantizer(feature_size, self.patch_size, quantizer_bits)
        )

    @abstractmethod
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

    def proposals(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int) -> list[Tensor]:
        """What the network passes through on its way to `forward`'s result, which is the last: training judges each.

        Arguments and shapes as `forward`. A network that works in one go has one.
        """
        return [self(image, canvas, active, stage)]

    @abstractmethod
    def global_feature(self, image: Tensor, canvas: Tensor, stage: int) -> Tensor:
        """What the quantiser adapts to, shape (B, feature_size), differentiable in the parameters.

        Args:
            image: As for `forward`.
            canvas: What the last stage was given.
            stage: The last stage that added Gaussians.
        """

    @abstractmethod
    def start_stage(self, stage: int) -> None:
        """Prepares a stage that was not trained yet: it starts as a copy of the one before it."""

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """The parameters in groups for a torch optimiser.

        Weights of linear and convolutional layers decay; biases, norms and embeddings do not. The quantiser learns ten
        times as fast.

        Args:
            learning_rate: That of most parameters; others get `learning_rate_factor` times it.
            weight_decay: Of those that decay.

        Returns:
            Groups of {"params", "lr", "weight_decay"}: every parameter that takes a gradient once, in a fixed order.
        """
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if parameter.requires_grad:
                    decays = isinstance(module, _DECAYING) and parameter.ndim > 1
                    factor = _QUANTIZER_RATE if name.startswith("quantizer.") else self.learning_rate_factor(name)
                    groups.setdefault((factor, decays), []).append(parameter)
        return [
            {"params": parameters, "lr": learning_rate * factor, "weight_decay": weight_decay if decays else 0.0}
            for (factor, decays), parameters in groups.items()
        ]

    def learning_rate_factor(self, name: str) -> float:
        """Learning rate of the parameter `name`, as a multiple of the others'; overridden where some learn slower."""
        return 1.0

    def anchors(self, raw: Tensor, height: int, width: int) -> Tensor:
        """What the offsets of one image's Gaussians count from, as `Prediction.anchor`.

        Args:
            raw: Gaussians of all patches, shape (rows · columns, 8).
            height: Of the image, in pixels.
            width: The same.
        """
        return anchors(height, width, self.patch_size, raw.dtype).to(raw.device)

    @torch.no_grad()
    def predict(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int) -> Prediction:
        """As `air.predictor.base.Predictor`: one image, no gradient."""
        if not 0 <= stage < self.num_stages:
            raise ValueError(f"this predictor has {self.num_stages} stages, there is no stage {stage}")
        _, height, width = image.shape
        raw = self(image[None], canvas[None], active[None], stage)[0]
        return Prediction(raw, self.anchors(raw, height, width))


ARCHITECTURES = {
    "compact": "air.predictor.compact.network:CompactPredictor",
    "dinov3": "air.predictor.dinov3.network:DinoPredictor",
}
"""Where each architecture's class is; its module loads with the first use."""


def architecture_class(architecture: str) -> type[PredictorNetwork]:
    """The class of a network by a name in `ARCHITECTURES`.

    Raises:
        ValueError: The architecture is unknown.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    module, name = ARCHITECTURES[architecture].split(":")
    return getattr(importlib.import_module(module), name)


def build(architecture: str, settings: dict[str, Any], *, empty: bool = False) -> PredictorNetwork:
    """A network with fresh weights.

    Args:
        architecture: A name in `ARCHITECTURES`.
        settings: Its keyword arguments.
        empty: Leave all weights unset, for a caller that fills them: drawing those of a large network takes a minute.

    Raises:
        ValueError: The architecture is unknown, or a setting is missing, unknown or out of its bounds.
    """
    network_class = architecture_class(architecture)
    known = set(inspect.signature(network_class).parameters)
    if unknown := sorted(settings.keys() - known):
        raise ValueError(
            f"architecture {architecture!r} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    try:
        with torch.device("meta") if empty else nullcontext():
            network = network_class(**settings)
    except TypeError as error:
        raise ValueError(f"settings of architecture {architecture!r}: {error}") from None
    return network.to_empty(device="cpu") if empty else network
