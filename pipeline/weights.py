"""Files of weights as they travel: NAME.safetensors with its card NAME.json beside it, on any storage.

This module must not know what the weights are for, beyond the kind that their card states.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.storage.open import open_parent

Kind = Literal["predictor", "rule"]
"""What weights are: those of a predictor, or of an update rule of the optimiser."""

KINDS: dict[Kind, str] = {"predictor": "a predictor", "rule": "an update rule"}
"""The kinds, as messages name them."""


@dataclass(frozen=True)
class WeightsCard:
    """What the card of any weights says.

    Attributes:
        kind: What the weights are.
        model: Their name in tables: the architecture or "rule", and the first 12 digits of the checksum.
        sha256: Checksum of the file of weights, hexadecimal.
        metrics: Figures by name, such as {"valid_psnr": 31.2}.
    """

    kind: Kind
    model: str
    sha256: str
    metrics: dict[str, float]


@contextmanager
def local_weights(uri: str) -> Iterator[Path]:
    """A file NAME.safetensors on this machine, its card beside it. Remote files are copied for the time being.

    Raises:
        StorageError: A remote file cannot be fetched.
    """
    storage, file = open_parent(uri)
    if storage.root.startswith("/"):
        yield Path(storage.root) / file
        return
    with tempfile.TemporaryDirectory(prefix="air-") as folder:
        for part in (file, str(Path(file).with_suffix(".json"))):
            (Path(folder) / part).write_bytes(storage.read(part))
        yield Path(folder) / file


def read_weights(path: Path) -> WeightsCard:
    """Reads the card of weights of any kind, and compares the weights' checksum with it.

    Args:
        path: NAME.safetensors, a local file.

    Raises:
        CheckpointError: The card is missing or of no known kind, or describes other weights.
    """
    from air import cards
    from air.optimization import rule_file
    from air.predictor import checkpoint

    if cards.format_of(path) == rule_file.FORMAT:
        kind, card = "rule", rule_file.read_rule_card(path)
    else:
        kind, card = "predictor", checkpoint.read_card(path)
    cards.check_weights(path, card.sha256)
    name = kind if isinstance(card, rule_file.RuleCard) else card.architecture
    return WeightsCard(kind, model_name(name, card.sha256), card.sha256, card.metrics)


def model_name(name: str, sha256: str) -> str:
    """The name of weights in tables: what they are, and the first 12 digits of their checksum."""
    return f"{name}:{sha256[:12]}"
