"""Checkpoints of predictors: weights as safetensors, and a card beside them, JSON that describes them.

    NAME.safetensors    the weights, by parameter name
    NAME.json           the card, which holds the checksum of the weights

Loading reads numbers and text only; nothing is unpickled or run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from air import cards
from air.cards import checksum, weights_path, write_card
from air.errors import CheckpointError
from air.predictor.network import PredictorNetwork, build
from air.version import __version__

FORMAT = "air-predictor-1"


@dataclass(frozen=True)
class Card:
    """The description of a checkpoint.

    Attributes:
        architecture: Name of the network's architecture.
        settings: Keyword arguments that build the network.
        sha256: Checksum of the file of weights, hexadecimal. The card does not describe any other file.
        phase: The training phase that made it.
        step: Optimiser steps in that phase.
        plan: Hash of the plan of the training data; empty if there was no plan.
        metrics: Figures by name, such as {"valid_psnr": 31.2}.
        notes: Anything else: data and their terms, command, seed.
        code_version: Version of this package.
    """

    architecture: str
    settings: dict[str, Any]
    sha256: str
    phase: str = ""
    step: int = 0
    plan: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    code_version: str = __version__


def save_checkpoint(path: str | Path, network: PredictorNetwork, **card: Any) -> Card:
    """Writes a checkpoint, the card last.

    If the process stops between the two files, the pair does not load, since the card has another checksum.

    Args:
        path: `NAME.safetensors`; the card is `NAME.json` beside it.
        network: The network to store.
        card: Fields of `Card` except architecture, settings and sha256.
    """
    path = weights_path(path)
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    safetensors.torch.save_file(state, path, metadata={"format": FORMAT})
    described = Card(network.architecture, network.settings, checksum(path), **card)
    write_card(path, FORMAT, dataclasses.asdict(described))
    return described


def load_checkpoint(path: str | Path) -> tuple[PredictorNetwork, Card]:
    """The network, ready to predict, and its card.

    Raises:
        CheckpointError: A file is missing or is not a checkpoint of this project, or weights and card do not belong
            together.
    """
    path = weights_path(path)
    card = read_card(path)
    check_weights(path, card)
    try:
        network = build(card.architecture, card.settings, empty=True)
        state = safetensors.torch.load_file(path)
    except (ValueError, OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be loaded: {error}") from None
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the weights do not fit their card: {error}") from None
    return network.eval(), card


def read_card(path: str | Path) -> Card:
    """The card of the checkpoint `NAME.safetensors`.

    Raises:
        CheckpointError: The card is missing, or is not a card of this version.
    """
    beside = Path(path).with_suffix(".json")
    document = cards.read_card(path, FORMAT, "a predictor")
    try:
        card = Card(**document)
    except TypeError as error:
        raise CheckpointError(f"{beside}: is not a card of this version: {error}") from None
    for name in ("patch_size", "num_stages"):
        if not isinstance(card.settings, dict) or not isinstance(card.settings.get(name), int):
            raise CheckpointError(f"{beside}: is not a card of this version: its settings have no whole number {name}")
    return card


def check_weights(path: str | Path, card: Card) -> None:
    """Compares the checksum of the weights `NAME.safetensors` with their card.

    Raises:
        CheckpointError: The weights are missing, or the card describes another file.
    """
    cards.check_weights(path, card.sha256)
