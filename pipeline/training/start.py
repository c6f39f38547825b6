"""What a training run begins with: fresh weights, or those of a checkpoint, as they are or with changed settings."""

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
    """Refuses what cannot be trained before anything is written: builds the network, without weights.

    Of a checkpoint it reads the card alone. Warns of a fresh network that is meant to have weights learned elsewhere.

    Raises:
        CheckpointError: There is no such checkpoint.
        TrainingError: It does not fit the configuration, or the configuration describes no network.
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
            "the %s of %s starts from random weights. Pretrained ones come with a checkpoint: give them to a network, "
            "save it, and name it with --from (docs/predictor.md, a training of your own)",
            network.untrained_part,
            architecture,
        )


def _fresh_settings(config: TrainConfig) -> dict[str, Any]:
    """What builds a network that no checkpoint begins.

    Raises:
        TrainingError: A setting stands in for an option.
    """
    for name, option in (("patch_size", "patch_size"), ("num_stages", "stages"), ("quantizer_bits", "phase quantize")):
        if name in config.settings:
            raise TrainingError(f"settings holds {name}, which is not set there: use {option}")
    return {"patch_size": config.patch_size, "num_stages": config.stages, **config.settings}


def _changed_settings(config: TrainConfig) -> dict[str, Any]:
    """What the phase makes another of a checkpoint's settings."""
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
    """The network that a run begins with, and the names of the parameters that a checkpoint gave it.

    Without a checkpoint, fresh weights that the seed determines. In phase `patch`, a network of the new patch size with
    all those weights of the checkpoint whose shapes fit; in phase `quantize`, one with a quantiser.

    Args:
        config: One that `check_start` let pass.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        TrainingError: The configuration describes no network.
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
        # Levels of other bits have other steps: a quantiser that is there begins anew, too.
        network.quantizer = None
        network, taken = _with(network, card, _changed_settings(config))
    assert network.quantizer is not None
    if config.quantizer_alone:
        network.requires_grad_(False)
        network.quantizer.requires_grad_(True)
    return network, taken


def _with(network: PredictorNetwork, card: Card, changes: dict[str, Any]) -> tuple[PredictorNetwork, list[str]]:
    """The network with other settings, and the names of those weights that fit it and were taken over."""
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
