"""The network that a training run begins with: fresh, or from a checkpoint, with its own or with changed settings."""

from __future__ import annotations

import logging
from typing import Any

import torch

from air.predictor.checkpoint import Card, load_checkpoint, read_card
from air.predictor.network import PredictorNetwork, build
from pipeline.errors import TrainingError
from pipeline.identity import seed_of
from pipeline.predictors import local_checkpoint
from pipeline.training.config import TrainConfig, TrainerConfig

logger = logging.getLogger(__name__)


def check_start(config: TrainConfig, trainer: TrainerConfig) -> None:
    """Refuses a configuration that cannot be trained, before anything is written: builds the network without weights.

    From a checkpoint only the card is read. Logs a warning if a part of a fresh network starts from random weights,
    although it is made for pretrained ones.

    Raises:
        CheckpointError: There is no such checkpoint.
        TrainingError: The checkpoint does not fit the configuration, or no network can be built from the configuration.
    """
    if config.from_:
        with local_checkpoint(config.from_) as path:
            card = read_card(path)
        _check_card(card, config)
        architecture, settings = card.architecture, {**card.settings, **_changed_settings(config)}
    else:
        architecture, settings = config.architecture, _fresh_settings(config)
    network = _build(architecture, settings, empty=True)
    if trainer.gradient_checkpointing and not network.can_checkpoint:
        raise TrainingError(f"the architecture {architecture} has no gradient_checkpointing: leave it off")
    if not config.from_ and network.untrained_part:
        logger.warning(
            "the %s of %s starts from random weights. To start from pretrained weights, load them into a network, save "
            "it as a checkpoint, and name the checkpoint with --from (docs/predictor.md, a training of your own)",
            network.untrained_part,
            architecture,
        )


def _fresh_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings of a fresh network.

    Raises:
        TrainingError: `settings` sets what an option sets.
    """
    for name, option in (("patch_size", "patch_size"), ("num_stages", "stages"), ("quantizer_bits", "phase quantize")):
        if name in config.settings:
            raise TrainingError(f"settings holds {name}, which is not set there: use {option}")
    return {"patch_size": config.patch_size, "num_stages": config.stages, **config.settings}


def _changed_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings of a checkpoint's network that the phase changes."""
    if config.phase == "patch":
        return {"patch_size": config.patch_size}
    return {"quantizer_bits": list(config.quantizer_bits)} if config.phase == "quantize" else {}


def _check_card(card: Card, config: TrainConfig) -> None:
    stages, patch_size = card.settings["num_stages"], card.settings["patch_size"]
    if stages < config.stages:
        raise TrainingError(f"{config.from_} has {stages} stages, the run {config.stages}: set stages to {stages}")
    if config.phase == "patch" and patch_size == config.patch_size:
        raise TrainingError(
            f"{config.from_} has patch size {patch_size} already: use --phase refine, or set patch_size"
        )
    if config.phase != "patch" and patch_size != config.patch_size:
        raise TrainingError(
            f"{config.from_} has patch size {patch_size}, the run {config.patch_size}: "
            f"set patch_size to {patch_size}, or change it with --phase patch"
        )
    if config.uses_targets and card.settings.get("pixel_stretch"):
        raise TrainingError(
            f"{config.from_} stretches centres (pixel_stretch), and stored targets count from plain anchors: "
            "use another phase, or --targets online"
        )


def make_network(config: TrainConfig) -> tuple[PredictorNetwork, list[str]]:
    """The network that a run begins with, and the names of the parameters that come from a checkpoint.

    Without a checkpoint, the seed determines fresh weights. In phase `patch`, the network has the new patch size, and
    takes all weights of the checkpoint whose shapes fit. In phase `quantize`, the network has a quantiser.

    Args:
        config: A configuration that passed `check_start`.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        TrainingError: No network can be built from the configuration.
    """
    torch.manual_seed(seed_of(config.seed, "weights"))
    if not config.from_:
        return _build(config.architecture, _fresh_settings(config)), []
    with local_checkpoint(config.from_) as path:
        network, card = load_checkpoint(path)
    if config.phase == "patch":
        return _with(network, card, _changed_settings(config))
    taken = [name for name, _ in network.named_parameters()]
    if config.phase == "quantize":
        network, taken = _with_quantizer(network, card, config)
    return network, taken


def _with_quantizer(network: PredictorNetwork, card: Card, config: TrainConfig) -> tuple[PredictorNetwork, list[str]]:
    bits = list(config.quantizer_bits)
    taken = [name for name, _ in network.named_parameters()]
    if network.settings.get("quantizer_bits") != bits:
        # Another number of bits means other steps, so an existing quantiser with other bits is replaced, too.
        network.quantizer = None
        network, taken = _with(network, card, _changed_settings(config))
    assert network.quantizer is not None
    if config.quantizer_alone:
        network.requires_grad_(False)
        network.quantizer.requires_grad_(True)
    return network, taken


def _with(network: PredictorNetwork, card: Card, changes: dict[str, Any]) -> tuple[PredictorNetwork, list[str]]:
    """A network with changed settings that takes over all weights whose shapes fit, and the names of these weights."""
    other = _build(card.architecture, {**card.settings, **changes})
    fresh, learned = other.state_dict(), network.state_dict()
    fitting = {name: value for name, value in learned.items() if name in fresh and fresh[name].shape == value.shape}
    other.load_state_dict({**fresh, **fitting})
    return other, list(fitting)


def _build(architecture: str, settings: dict[str, Any], *, empty: bool = False) -> PredictorNetwork:
    try:
        return build(architecture, settings, empty=empty)
    except ValueError as error:
        raise TrainingError(f"no network can be built: {error}") from None
