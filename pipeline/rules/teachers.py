"""Where the gradient of a step comes from: stored samples, or fresh roll-outs of the rule that learns.

This module must not know the run around a step. `pipeline.rules.rounds` has the teacher that rolls out into files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pipeline.errors import TrainingError
from pipeline.rules.config import RunConfig
from pipeline.rules.learn import Samples, stored_loss
from pipeline.rules.online import Lesson, Lessons
from pipeline.rules.state import RuleState
from pipeline.rules.stored import SampleFeed, StoredBlock, mean_curvature
from pipeline.training.order import FeedConfig
from pipeline.work.runner import MIN_SAMPLES_TO_JUDGE

logger = logging.getLogger(__name__)

MAX_BAD_SHARE = 0.5
"""A run without files stops if a larger fraction of its roll-outs cannot be used."""


class Teacher(Protocol):
    """Gives the gradient of a step."""

    def teach(self, state: RuleState) -> tuple[list[Tensor], dict[str, float]]:
        """The gradient by the rule's parameters, empty if there is none, and figures; counts samples in the state."""
        ...

    def close(self) -> None: ...


class StoredTeacher:
    """Minibatches of stored samples.

    Args:
        blocks: Where the samples lie.
        config: How far the rule goes, and how often it tells figures.
        feed: The order of the samples.
        first: The step that takes the first minibatch.
    """

    def __init__(self, blocks: Sequence[StoredBlock], config: RunConfig, feed: FeedConfig, first: int = 0) -> None:
        self._config = config
        self._mean_curvature = mean_curvature(blocks)
        self._feed = SampleFeed(blocks, feed)
        self._first = first

    def teach(self, state: RuleState) -> tuple[list[Tensor], dict[str, float]]:
        """As `Teacher.teach`."""
        config = self._config
        samples = self._feed.batch(state.step - self._first)
        loss = stored_loss(state.rule, samples, self._mean_curvature, config.step_size)
        state.samples += len(samples.move)
        gradient = torch.autograd.grad(loss, list(state.rule.parameters()))
        figures = {"loss": float(loss.detach())}
        if (state.step + 1) % config.log_every == 0:
            figures["moved"] = _distance(state, samples)
        return list(gradient), figures

    def close(self) -> None:
        """Does nothing."""


def _distance(state: RuleState, samples: Samples) -> float:
    """Root of the mean squared distance between the rule's moves and those that were made, in learning rates."""
    with torch.no_grad():
        return float((state.rule(samples.features) - samples.move).square().mean().sqrt())


class OnlineTeacher:
    """Fresh roll-outs of the rule that learns."""

    def __init__(self, lessons: Lessons) -> None:
        self._lessons = lessons

    def teach(self, state: RuleState) -> tuple[list[Tensor], dict[str, float]]:
        """As `Teacher.teach`."""
        given = self._lessons.of_step(state.rule, state.step)
        usable = [one for one in given if isinstance(one, Lesson)]
        refused = [one for one in given if isinstance(one, str)]
        state.samples += len(given)
        state.skipped += len(refused)
        if refused:
            logger.info("%s", refused[-1])
        if state.samples >= MIN_SAMPLES_TO_JUDGE and state.skipped > MAX_BAD_SHARE * state.samples:
            raise TrainingError(
                f"{state.skipped} of the {state.samples} roll-outs so far cannot be used"
                f"{f', such as {refused[-1]}' if refused else ''}. Repair or replace the pictures."
            )
        if not usable:
            return [], {}
        gradient = [torch.stack(parts).mean(0) for parts in zip(*(one.gradient for one in usable), strict=True)]
        figures = {
            "objective": sum(one.objective for one in usable) / len(usable),
            "psnr": sum(one.psnr for one in usable) / len(usable),
        }
        return gradient, figures

    def close(self) -> None:
        """Ends the processes."""
        self._lessons.close()
