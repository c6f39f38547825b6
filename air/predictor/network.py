"""The base class of predictor networks: modules from images and canvases to raw Gaussians, one call per stage."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from air.compute.threads import limit_torch
from air.gaussians import anchors
from air.predictor.base import Prediction
from air.predictor.quantizer import ImageAdaptiveQuantizer

_QUANTIZER_RATE = 10.0
"""Learning rate of the quantiser, as a multiple of the others'. Its steps and lows must move by tenths, the weights of
a trained network by thousandths."""

_DECAYING = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


class PredictorNetwork(nn.Module, ABC):
    """Base of the networks. A subclass implements `forward`, `global_feature` and `start_stage`.

    All tensors of a network are in its state dict.

    Args:
        feature_size: Length of the global feature.
        quantizer_bits: Bits per channel of the quantiser that the network learns (`air.codec.uniform`); None for a
            network without a quantiser.
        settings: The other keyword arguments of the subclass.

    Attributes:
        architecture: Its name in `ARCHITECTURES`.
        can_checkpoint: Whether `gradient_checkpointing` has an effect.
        untrained_part: The submodule that expects weights trained elsewhere; empty if there is none.
        patch_size: Pixels between anchors.
        num_stages: Number of stages that it can predict; a later stage is an error.
        settings: The keyword arguments that build the network again, plain JSON values.
        gradient_checkpointing: Whether training recomputes activations in the backward pass instead of keeping them,
            where the architecture can: less memory, more time, the same gradients. Off in a new network.
        quantizer: The learned quantiser that stores its Gaussians; None if it has not learned one.
    """

    architecture: ClassVar[str]
    can_checkpoint: ClassVar[bool] = False
    untrained_part: ClassVar[str] = ""

    def __init__(self, *, feature_size: int, quantizer_bits: Sequence[int] | None = None, **settings: Any) -> None:
        super().__init__()
        # Left out if None, so that the cards of networks without a quantiser stay the same.
        self.settings = settings if quantizer_bits is None else {**settings, "quantizer_bits": list(quantizer_bits)}
        self.patch_size: int = settings["patch_size"]
        self.num_stages: int = settings["num_stages"]
        self.gradient_checkpointing = False
        self.quantizer = (
            None if quantizer_bits is None else ImageAdaptiveQuantizer(feature_size, self.patch_size, quantizer_bits)
        )

    @abstractmethod
    def forward(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int, threads: int = 1) -> Tensor:
        """Raw Gaussians of one stage for a batch of images of one size, differentiable in the parameters.

        Args:
            image: The images, shape (B, 3, H, W), float32 in [0, 1].
            canvas: Unclamped render of the earlier stages, shape (B, 3, H, W), detached.
            active: Patches that keep their Gaussian, boolean, shape (B, rows · columns).
            stage: From 0.
            threads: CPU threads of the compiled kernels. Torch's own number stays as the caller has set it.

        Returns:
            Shape (B, rows · columns, 8), patches in row-major order.
        """

    def proposals(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int, threads: int = 1) -> list[Tensor]:
        """The intermediate results of `forward` and, last, its result. Training computes a loss for each.

        Arguments and shapes are those of `forward`. A network without intermediate results gives one.
        """
        return [self(image, canvas, active, stage, threads)]

    @abstractmethod
    def global_feature(self, image: Tensor, canvas: Tensor, stage: int) -> Tensor:
        """The features that the quantiser adapts to, shape (B, feature_size), differentiable in the parameters.

        Args:
            image: As for `forward`.
            canvas: The canvas that the last stage was given.
            stage: The last stage that added Gaussians.
        """

    @abstractmethod
    def start_stage(self, stage: int) -> None:
        """Prepares a stage that was not trained yet: copies the stage before it."""

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """The parameters in groups for a torch optimiser.

        Weights of linear and convolutional layers decay; biases, norms and embeddings do not. The quantiser learns ten
        times as fast.

        Args:
            learning_rate: Learning rate, multiplied by the `learning_rate_factor` of each parameter.
            weight_decay: Weight decay of those that decay.

        Returns:
            Groups of {"params", "lr", "weight_decay"}. Each parameter that takes a gradient is in one of them, in a
            fixed order.
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
        """Learning rate of the parameter `name`, as a multiple of the others'. Subclasses override this."""
        return 1.0

    def anchors(self, raw: Tensor, height: int, width: int) -> Tensor:
        """The anchors of one image's Gaussians, shape (rows · columns, 2), as `Prediction.anchor`.

        Args:
            raw: Gaussians of all patches, shape (rows · columns, 8).
            height: Height of the image in pixels.
            width: Width of the image in pixels.
        """
        return anchors(height, width, self.patch_size, raw.dtype).to(raw.device)

    @torch.no_grad()
    def predict(self, image: Tensor, canvas: Tensor, active: Tensor, stage: int, threads: int = 1) -> Prediction:
        """As `air.predictor.base.Predictor`: one image, no gradient.

        Raises:
            ValueError: The network has no such stage, or `threads` is below one.
        """
        if not 0 <= stage < self.num_stages:
            raise ValueError(f"this predictor has {self.num_stages} stages, numbered from 0: there is no stage {stage}")
        _, height, width = image.shape
        with limit_torch(threads):
            raw = self(image[None], canvas[None], active[None], stage, threads)[0]
            return Prediction(raw, self.anchors(raw, height, width))


ARCHITECTURES = {
    "compact": "air.predictor.compact.network:CompactPredictor",
    "dinov3": "air.predictor.dinov3.network:DinoPredictor",
}
"""Module and class of each architecture; the module loads on first use."""


def architecture_class(architecture: str) -> type[PredictorNetwork]:
    """The network class of an architecture in `ARCHITECTURES`.

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
        settings: Keyword arguments of the network.
        empty: Leave all weights unset, for a caller that fills them. Drawing random weights for a large network takes
            a minute.

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
