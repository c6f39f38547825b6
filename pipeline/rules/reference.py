"""References to update rules, by name or URI and checksum, which a driver makes and workers load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from air.defaults import ADAM, SHIPPED
from air.errors import CheckpointError
from pipeline.identity import seed_of
from pipeline.registry.names import describe_unknown, locate
from pipeline.storage.base import MissingFileError, Storage
from pipeline.storage.uri import normalise
from pipeline.weights import local_weights, model_name

if TYPE_CHECKING:
    from air.optimization.rule import LearnedRule


@dataclass(frozen=True)
class RuleReference:
    """Identifies an update rule and its weights.

    Attributes:
        name: "adam", "shipped" or the normalised URI of NAME.safetensors.
        model: Its name in tables: "adam", or "rule:" and the first 12 digits of the weights' checksum.
        sha256: Checksum of the weights, hexadecimal; empty for "adam".
    """

    name: str
    model: str
    sha256: str


def find_rule(name: str, output: Storage | None = None, key: str = "rule") -> RuleReference:
    """Finds a rule; reads its card, and the checksum of its weights.

    Args:
        name: "adam", "shipped", a path or URI of NAME.safetensors, or a name in a registry (`pipeline.registry.names`).
        output: The output folder of the job, whose plan says what an alias stood for when the job began.
        key: The key of the plan's configuration that holds the rule.

    Raises:
        CheckpointError: There is no such rule, or it has no card that fits.
    """
    if name == ADAM:
        return RuleReference(ADAM, ADAM, "")
    from air.cards import check_weights
    from air.optimization.rule_file import read_rule_card, rule_path

    located = locate(name, "rule", output, key)
    try:
        rule_path(located)  # its message has the name as it was typed
    except CheckpointError as error:
        raise CheckpointError(f"{error}{describe_unknown(name)}") from None
    uri = located if located == SHIPPED else normalise(located)
    try:
        with local_rule(uri) as path:
            card = read_rule_card(path)
            check_weights(path, card.sha256)
    except MissingFileError as error:
        raise CheckpointError(str(error)) from None
    return RuleReference(uri, model_name("rule", card.sha256), card.sha256)


@contextmanager
def local_rule(name: str) -> Iterator[Path]:
    """A rule's weights as a local file, the card beside it. A remote rule is copied for the time being.

    Args:
        name: "shipped", which each machine finds in its own installation; or a path or URI of NAME.safetensors.

    Raises:
        CheckpointError: The name is neither of these.
        StorageError: The rule cannot be fetched.
    """
    from air.optimization.rule_file import rule_path

    with local_weights(rule_path(name)) as path:
        yield path


@lru_cache(maxsize=2)
def load_rule(reference: RuleReference) -> LearnedRule:
    """The rule, ready to use. It is kept in this process, so that the next call costs nothing.

    Raises:
        CheckpointError: The rule cannot be loaded, or its weights have another checksum than the reference.
    """
    if reference.name == ADAM:
        return fresh_rule(0).eval().requires_grad_(False)
    from air.optimization import rule_file

    with local_rule(reference.name) as path:
        rule, card = rule_file.load_rule(path)
    if card.sha256 != reference.sha256:
        raise CheckpointError(
            f"{reference.name} has changed since it was looked up (sha256 {reference.sha256[:12]} -> "
            f"{card.sha256[:12]}): give the rule of every round a name of its own"
        )
    return rule


def is_whole_rule(uri: str) -> bool:
    """Whether a rule exists, with a card that fits its weights."""
    try:
        find_rule(uri)
    except CheckpointError:
        return False
    return True


def fresh_rule(seed: int) -> LearnedRule:
    """A rule before any training. The seed draws the hidden layers, which make no move yet."""
    import torch

    from air.optimization.rule import LearnedRule
    from air.optimization.settings import OPTIMIZATION

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        return LearnedRule(OPTIMIZATION.beta1, OPTIMIZATION.beta2)
