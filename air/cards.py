"""Cards: the JSON beside a file of weights that describes it and holds its checksum.

    NAME.safetensors    the weights, by parameter name
    NAME.json           the card

Predictors and learned update rules are stored so. Loading reads numbers and text only; nothing is unpickled or run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from air.errors import CheckpointError


def weights_path(path: str | Path) -> Path:
    """The path, if it is named as weights are.

    Raises:
        CheckpointError: It is not NAME.safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: a checkpoint is a file NAME.safetensors with a card NAME.json beside it")
    return path


def write_card(path: Path, form: str, card: Mapping[str, Any]) -> None:
    """Writes the card of the weights at `path`. Write it last: a card of other weights does not load.

    Args:
        path: NAME.safetensors.
        form: The name of the card's format.
        card: Its fields.
    """
    document = {"format": form, **card}
    path.with_suffix(".json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def read_card(path: str | Path, form: str, kind: str) -> dict[str, Any]:
    """The fields of the card of the weights NAME.safetensors, without the name of the format.

    Args:
        path: NAME.safetensors.
        form: The format that the card must have.
        kind: What the card describes, for messages, such as "a predictor".

    Raises:
        CheckpointError: The card is missing, is not JSON, has another format or names no checksum.
    """
    path = weights_path(path)
    beside, document = path.with_suffix(".json"), _read_document(path)
    if document.pop("format", None) != form:
        raise CheckpointError(f"{beside}: is not the card of {kind} (its format is not {form!r})")
    if "sha256" not in document:
        raise CheckpointError(
            f"{beside}: names no checksum (sha256) of {path.name}, so nothing says that the two belong together: "
            "train or import the checkpoint again with this version"
        )
    return document


def format_of(path: str | Path) -> str:
    """The name of the format of the card of the weights NAME.safetensors; empty if the card names none.

    Raises:
        CheckpointError: The card is missing or is not JSON.
    """
    return str(_read_document(weights_path(path)).get("format", ""))


def _read_document(path: Path) -> dict[str, Any]:
    """The card of the weights at `path`, as it is stored; empty if it holds no fields."""
    beside = path.with_suffix(".json")
    try:
        document = json.loads(beside.read_text())
    except OSError as error:
        raise CheckpointError(f"{beside}: the card of {path.name} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{beside}: is not JSON: {error}") from None
    return document if isinstance(document, dict) else {}


def check_weights(path: str | Path, sha256: str) -> None:
    """Compares the checksum of the weights NAME.safetensors with that of their card.

    Raises:
        CheckpointError: The weights are missing, or the card describes another file.
    """
    path = Path(path)
    found = checksum(path)
    if found != sha256:
        raise CheckpointError(
            f"{path} is not the file that its card {path.with_suffix('.json')} describes (sha256 {found[:12]}, "
            f"expected {sha256[:12]}): one of the two is damaged or of another checkpoint; copy both again from "
            "their source"
        )


def checksum(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
