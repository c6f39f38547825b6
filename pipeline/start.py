"""What a training run begins with: fresh weights, or those of a checkpoint, as they are or for another patch size."""

from __future__ import annotations

from typing import Any

import torch

from air.predictor.checkpoint import Card, load_checkpoint
from air.predictor.network import PredictorNetwork, build
from pipeline.errors import TrainingError
from pipeline.predictors import local_checkpoint
from pipeline.train_config import TrainConfig
from pipeline.work import seed_of


def make_network(config: TrainConfig) -> tuple[PredictorNetwork, list[str]]:
    """The network that a run begins with, and the names of the parameters that a checkpoint gave it.

    Without a checkpoint, fresh weights that the seed determines. In phase `patch`, a network of the new patch size with
    all those weights of the checkpoint whose shapes fit.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        TrainingError: It does not fit the configuration, or the configuration no network.
    """
    torch.manual_seed(seed_of(config.seed, "weights"))
    if not config.from_:
        settings = {"patch_size": config.patch_size, "num_stages": config.stages, **config.settings}
        return _build(config.architecture, settings), []
    with local_checkpoint(config.from_) as path:
        network, card = load_checkpoint(path)
    if network.num_stages < config.stages:
        raise TrainingError(
            f"{config.from_} has {network.num_stages} stages, the run {config.stages}: "
            f"set stages to {network.num_stages}"
        )
    if config.phase == "patch":
        return _with_patch_size(network, card, config)
    if network.patch_size != config.patch_size:
        raise TrainingError(
            f"{config.from_} has patch size {network.patch_size}, the run {config.patch_size}: "
            f"set patch_size to {network.patch_size}, or change it with --phase patch"
        )
    return network, [name for name, _ in network.named_parameters()]


def _with_patch_size(network: PredictorNetwork, card: Card, config: TrainConfig) -> tuple[PredictorNetwork, list[str]]:
    if network.patch_size == config.patch_size:
        raise TrainingError(
            f"{config.from_} has patch size {config.patch_size} already: use --phase refine, or set patch_size"
        )
    other = _build(card.architecture, {**card.settings, "patch_size": config.patch_size})
    fresh, learned = other.state_dict(), network.state_dict()
    fitting = {name: value for name, value in learned.items() if name in fresh and fresh[name].shape == value.shape}
    other.load_state_dict({**fresh, **fitting})
    return other, list(fitting)


def _build(architecture: str, settings: dict[str, Any]) -> PredictorNetwork:
    try:
        return build(architecture, settings)
    except ValueError as error:
        raise TrainingError(f"no network can be built: {error}") from None
