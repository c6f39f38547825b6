"""Checkpoints of predictors: weights as safetensors, and beside them a card, JSON that says what they are.

    NAME.safetensors    the weights, by parameter name
    NAME.json           the card

Loading reads numbers and text only; nothing is unpickled or run.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

import air
from air.errors import CheckpointError
from air.predictor.network import PredictorNetwork, build

FORMAT = "air-predictor-1"


@dataclass(frozen=True)
class Card:
    """What a checkpoint is.

    Attributes:
        architecture: Name of the network's architecture.
        settings: What builds the network.
        phase: The training phase that made it.
        step: Optimiser steps in that phase.
        plan: Hash of the plan of the training data; empty where there was none.
        metrics: Figures by name, such as {"valid_psnr": 31.2}.
        notes: Anything else: data and their terms, command, seed.
        code_version: Of this package.
    """

    architecture: str
    settings: dict[str, Any]
    phase: str = ""
    step: int = 0
    plan: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    code_version: str = air.__version__


def save_checkpoint(
    path: str | Path, network: PredictorNetwork, weights: dict[str, Any] | None = None, **card: Any
) -> Card:
    """Writes a checkpoint; the card last, so that one with a card is whole.

    Args:
        path: `NAME.safetensors`; the card is `NAME.json` beside it.
        network: What is stored.
        weights: Its state where that is not the network's own, such as a moving average.
        card: Fields of `Card` but for architecture and settings.
    """
    path = _checked(path)
    described = Card(network.architecture, network.settings, **card)
    state = {name: value.detach().cpu().contiguous() for name, value in (weights or network.state_dict()).items()}
    safetensors.torch.save_file(state, path, metadata={"format": FORMAT})
    document = {"format": FORMAT, **dataclasses.asdict(described)}
    path.with_suffix(".json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    return described


def load_checkpoint(path: str | Path) -> tuple[PredictorNetwork, Card]:
    """The network, ready to predict, and its card.

    Raises:
        CheckpointError: A file is missing, is not a checkpoint of this project, or does not fit the other.
    """
    path = _checked(path)
    card = read_card(path)
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
        CheckpointError: It is missing or not a card.
    """
    path = _checked(path)
    beside = path.with_suffix(".json")
    try:
        document = json.loads(beside.read_text())
    except OSError as error:
        raise CheckpointError(f"{beside}: the card of {path.name} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{beside}: is not JSON: {error}") from None
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise CheckpointError(f"{beside}: is not the card of a predictor (its format is not {FORMAT!r})")
    try:
        card = Card(**document)
    except TypeError as error:
        raise CheckpointError(f"{beside}: is not a card of this version: {error}") from None
    for name in ("patch_size", "num_stages"):
        if not isinstance(card.settings, dict) or not isinstance(card.settings.get(name), int):
            raise CheckpointError(f"{beside}: is not a card of this version: its settings have no whole number {name}")
    return card


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: a checkpoint is a file NAME.safetensors with a card NAME.json beside it")
    return path
