"""Checkpoints of predictors: weights as safetensors, and a card beside them, JSON that describes them.

    NAME.safetensors    the weights, by parameter name
    NAME.json           the card, which holds the checksum of the weights

Loading reads numbers and text only; nothing is unpickled or run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

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
    path = _checked(path)
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    safetensors.torch.save_file(state, path, metadata={"format": FORMAT})
    described = Card(network.architecture, network.settings, _checksum(path), **card)
    document = {"format": FORMAT, **dataclasses.asdict(described)}
    path.with_suffix(".json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    return described


def load_checkpoint(path: str | Path) -> tuple[PredictorNetwork, Card]:
    """The network, ready to predict, and its card.

    Raises:
        CheckpointError: A file is missing or is not a checkpoint of this project, or weights and card do not belong
            together.
    """
    path = _checked(path)
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
    if "sha256" not in document:
        raise CheckpointError(
            f"{beside}: names no checksum (sha256) of {path.name}, so nothing says that the two belong together: "
            "train or import the checkpoint again with this version"
        )
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
    path = Path(path)
    found = _checksum(path)
    if found != card.sha256:
        raise CheckpointError(
            f"{path} is not the file that its card {path.with_suffix('.json')} describes (sha256 {found[:12]}, "
            f"expected {card.sha256[:12]}): one of the two is damaged or of another checkpoint; copy both again from "
            "their source"
        )


def _checksum(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: a checkpoint is a file NAME.safetensors with a card NAME.json beside it")
    return path
