"""Learned update rules as files: the weights NAME.safetensors and a card NAME.json beside them (`air.cards`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from air import cards, defaults
from air.errors import CheckpointError
from air.optimization.rule import HIDDEN, OWN_FEATURES, SHARED_FEATURES, LearnedRule
from air.version import __version__

FORMAT = "air-rule-1"

_SHAPE = {"own_features": OWN_FEATURES, "shared_features": SHARED_FEATURES, "hidden": HIDDEN}


@dataclass(frozen=True)
class RuleCard:
    """The description of a stored rule.

    Attributes:
        sha256: Checksum of the file of weights, hexadecimal.
        beta1, beta2: Constants of the moments that the rule was trained with.
        shape: Numbers of features and the width of the network. Rules of another shape do not load.
        step: Training steps.
        plan: Hash of the plan of the training data; empty if there was no plan.
        metrics: Figures by name, such as {"valid_psnr_10": 32.5}.
        notes: Anything else: data and their terms, settings, seed.
        code_version: Version of this package.
    """

    sha256: str
    beta1: float
    beta2: float
    shape: dict[str, int]
    step: int = 0
    plan: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    code_version: str = __version__


def save_rule(path: str | Path, rule: LearnedRule, **card: Any) -> RuleCard:
    """Writes a rule, the card last.

    Args:
        path: NAME.safetensors; the card is NAME.json beside it.
        rule: The rule to store.
        card: Fields of `RuleCard` beside checksum, betas and shape.
    """
    path = cards.weights_path(path)
    state = {name: value.detach().cpu().float().contiguous() for name, value in rule.state_dict().items()}
    safetensors.torch.save_file(state, path, metadata={"format": FORMAT})
    described = RuleCard(cards.checksum(path), rule.beta1, rule.beta2, dict(_SHAPE), **card)
    cards.write_card(path, FORMAT, dataclasses.asdict(described))
    return described


def load_rule(path: str | Path) -> tuple[LearnedRule, RuleCard]:
    """The rule, ready to use, and its card.

    Raises:
        CheckpointError: A file is missing or is not a rule of this version, or weights and card do not belong together.
    """
    path = cards.weights_path(path)
    card = read_rule_card(path)
    cards.check_weights(path, card.sha256)
    rule = LearnedRule(card.beta1, card.beta2)
    try:
        rule.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: is not a learned rule of this version: {error}") from None
    return rule.eval().requires_grad_(False), card


def read_rule_card(path: str | Path) -> RuleCard:
    """The card of the rule NAME.safetensors.

    Raises:
        CheckpointError: The card is missing, or is not a card of this version.
    """
    beside = Path(path).with_suffix(".json")
    try:
        card = RuleCard(**cards.read_card(path, FORMAT, "an update rule"))
    except TypeError as error:
        raise CheckpointError(f"{beside}: is not a card of this version: {error}") from None
    if card.shape != _SHAPE:
        raise CheckpointError(f"{beside}: the rule has the shape {card.shape}, this version uses {_SHAPE}")
    return card


@lru_cache(maxsize=1)
def shipped_rule() -> LearnedRule | None:
    """The rule that this package ships; None if this installation has none."""
    return load_rule(defaults.RULE_PATH)[0] if defaults.has_rule() else None


def rule_path(name: str | Path) -> str:
    """The path or URI of a rule's weights.

    Args:
        name: "shipped", or the path or URI of NAME.safetensors.

    Raises:
        CheckpointError: The name is of another kind, or this installation ships no rule.
    """
    if name == defaults.SHIPPED:
        if not defaults.has_rule():
            raise CheckpointError(
                f"this installation ships no update rule ({defaults.RULE_PATH} is missing): train one with "
                f"`air train --phase rule` and give its path, or use {defaults.ADAM}"
            )
        return str(defaults.RULE_PATH)
    if not str(name).endswith(".safetensors"):
        raise CheckpointError(
            f"unknown update rule {str(name)!r}: give {defaults.ADAM}, {defaults.SHIPPED} or a file NAME.safetensors"
        )
    return str(name)


def find_rule(name: str | Path) -> LearnedRule | None:
    """A rule by name.

    Args:
        name: "adam", which is None; "shipped"; or the path of a rule NAME.safetensors.

    Raises:
        CheckpointError: There is no such rule, or it cannot be loaded.
    """
    if name == defaults.ADAM:
        return None
    path = rule_path(name)
    return shipped_rule() if name == defaults.SHIPPED else load_rule(path)[0]
