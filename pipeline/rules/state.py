"""What a rule's run must remember, and the rule that it makes for others.

The files are those of `pipeline.training.state`, with the kinds of tensors below. OUT/rule.safetensors and rule.json
are what the run makes; it goes on from `checkpoints/` alone.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from air.optimization.rule import LearnedRule
from air.optimization.rule_file import save_rule
from pipeline.errors import TrainingError
from pipeline.rules.config import LearnerConfig
from pipeline.storage.base import Storage
from pipeline.training.state import load_moments, moments_of, read_checkpoint, write_checkpoint

KINDS = ("model", "optimizer")
"""The sets of tensors of a checkpoint; each is a file."""

RULE = "rule.safetensors"
"""The rule that a run makes, in its folder; its card is rule.json."""

_NORMS = 100
"""Norms of gradients that a step's norm is compared with."""


class Update(NamedTuple):
    """What a step of the learner did.

    Attributes:
        learning_rate: Of this step.
        norm: Norm of the gradient before it was bounded.
        taken: Whether the gradient was finite; otherwise the rule stays as it is.
    """

    learning_rate: float
    norm: float
    taken: bool


class RuleState:
    """A rule that learns, its optimiser, and how far the run is.

    Attributes:
        rule: The rule.
        step: Steps done.
        seconds: Training time of these steps.
        samples: Stored samples, or fits, that these steps learned from.
        skipped: Fits that could not be used.
    """

    def __init__(self, rule: LearnedRule, config: LearnerConfig) -> None:
        self.rule = rule.train().requires_grad_(True)
        self.step = 0
        self.seconds = 0.0
        self.samples = 0
        self.skipped = 0
        self._config = config
        self._norms: list[float] = []
        betas = (config.beta1, config.beta2)
        self._optimizer = torch.optim.Adam(self.rule.parameters(), lr=config.learning_rate, betas=betas)

    def update(self, gradient: Sequence[Tensor], steps: int) -> Update:
        """Takes a step with a gradient by the rule's parameters; `steps` is the number of steps of the whole run.

        A gradient that is long beside earlier ones is shortened, and one that is not finite makes no move.
        """
        learning_rate = self._config.learning_rate_at(self.step, steps)
        norm = float(torch.stack([part.norm() for part in gradient]).norm()) if gradient else math.nan
        taken = math.isfinite(norm)
        if taken:
            self._norms = [*self._norms, norm][-_NORMS:]
            longest = self._config.max_norm_ratio * statistics.median(self._norms)
            factor = min(1.0, longest / norm) if norm else 1.0
            for parameter, part in zip(self.rule.parameters(), gradient, strict=True):
                parameter.grad = part * factor
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self.step += 1
        return Update(learning_rate, norm, taken)

    def save(self, output: Storage, about: Mapping[str, Any]) -> str:
        """Writes a checkpoint; `about` is what the run that goes on from it must agree with. Returns its folder."""
        state = {
            "seconds": self.seconds,
            "samples": self.samples,
            "skipped": self.skipped,
            "norms": self._norms,
            **about,
        }
        tensors = {"model": self.rule.state_dict(), "optimizer": moments_of(self._optimizer, self.rule)}
        return write_checkpoint(output, self.step, tensors, state)

    def load(self, output: Storage, folder: str, about: Mapping[str, Any]) -> None:
        """Takes over the state of a checkpoint.

        Raises:
            TrainingError: The checkpoint is of another version or another run; the message says what differs.
            DamagedDataError: The checkpoint cannot be read.
        """
        state, tensors = read_checkpoint(output, folder, KINDS, about)
        try:
            self.rule.load_state_dict(tensors["model"])
        except RuntimeError as error:
            raise TrainingError(f"cannot go on from {output.uri(folder)}: its weights do not fit: {error}") from None
        load_moments(self._optimizer, self.rule, tensors["optimizer"])
        self.step, self.seconds, self.samples = state["step"], state["seconds"], state["samples"]
        self.skipped, self._norms = state["skipped"], list(state["norms"])


def keep_rule(output: Storage, rule: LearnedRule, **card: Any) -> None:
    """Writes a rule and its card into a run's folder; `card` are fields of `air.optimization.rule_file.RuleCard`."""
    with tempfile.TemporaryDirectory(prefix="air-") as folder:
        path = Path(folder) / RULE
        save_rule(path, rule, **card)
        upload_rule(output, path)


def upload_rule(output: Storage, local: Path, folder: str = "") -> None:
    """Copies a rule of this machine into a folder, as `RULE`; the card last, which says that the weights are whole."""
    for path in (local, local.with_suffix(".json")):
        output.upload(path, f"{folder}/{path.name}" if folder else path.name)
