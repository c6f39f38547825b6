"""What a rule is taught, in small pure functions: a goal for each stored move, and the objective of fresh roll-outs.

Tensors of samples have shape (M, 52) for features, (M, 8) for moves, credits and curvatures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from air.optimization.rule import LearnedRule
from pipeline.rules.config import RuleConfig

_CHUNK = 32_768
"""Samples whose activations are in memory at a time."""

_LEAST = 1e-30
"""The least size of a credit or curvature that something is divided by."""


class Samples(NamedTuple):
    """Updates of single Gaussians, as `air.fitting.rollout.RollOut` has them."""

    features: Tensor
    move: Tensor
    credit: Tensor
    curvature: Tensor


class Scale(NamedTuple):
    """Sizes over all stored samples, each of shape (8,), float32.

    Attributes:
        credit: Root of the mean square of each number's credit.
        curvature: Mean of each number's curvature.
    """

    credit: Tensor
    curvature: Tensor


def goal_of(move: Tensor, credit: Tensor, scale: Tensor, step_size: float, bound: float) -> Tensor:
    """The move that should have been made: the one that was made, less a bounded step along its credit.

    A bound is what makes several passes over stored credits safe: a credit is a derivative at the move that was made,
    and says nothing of moves far from it.

    Args:
        move: The moves, shape (M, 8).
        credit: Derivatives of the objective by them, shape (M, 8).
        scale: The credits' size by number, shape (8,).
        step_size: Length of the step for a credit of that size, in learning rates.
        bound: The longest step, in learning rates.
    """
    return move - (step_size * credit / scale.clamp_min(_LEAST)).clamp(-bound, bound)


def stored_loss(rule: LearnedRule, samples: Samples, scale: Scale, config: RuleConfig) -> Tensor:
    """What a rule should make small over stored samples; a scalar.

    With the goal "quadratic" it is the change of the objective by the rule's moves u in place of the stored ones u0, as
    credit and curvature predict it, over the mean curvature:

        mean (credit · (u - u0) + curvature / (2 step_size) · (u - u0)²)

    The stored curvature is that of a Gaussian that no other overlaps, at one update. Gaussians overlap, and a rule
    moves all of them at every update. So the true curvature is several times as large, which `step_size` allows for.
    With "size" it is the mean squared distance from `goal_of`, in learning rates.

    Args:
        rule: The rule that learns.
        samples: Stored samples.
        scale: Of all stored samples.
        config: The goal, and how far it lies.
    """
    moves = rule(samples.features)
    if config.goal == "size":
        goal = goal_of(samples.move, samples.credit, scale.credit, config.step_size, config.bound)
        return (moves - goal).square().mean()
    change = moves - samples.move
    predicted = samples.credit * change + samples.curvature / (2 * config.step_size) * change.square()
    return predicted.mean() / scale.curvature.mean().clamp_min(_LEAST)


def online_gradient(rule: LearnedRule, samples: Samples, fraction: float) -> tuple[float, list[Tensor]]:
    """The objective of one roll-out and its gradient by the rule's parameters.

    The objective is the sum of credit times move over all updates of all Gaussians. Its gradient is that of the
    losses that followed, with the features held fixed.

    Args:
        rule: The rule that rolled out.
        samples: Of one roll-out.
        fraction: Fraction of the updates of Gaussians that the samples are.
    """
    parameters = list(rule.parameters())
    gradient = [torch.zeros_like(parameter) for parameter in parameters]
    objective = 0.0
    for features, credit in zip(samples.features.split(_CHUNK), samples.credit.split(_CHUNK), strict=True):
        part = (rule(features) * credit).sum() / fraction
        objective += float(part.detach())
        for total, own in zip(gradient, torch.autograd.grad(part, parameters), strict=True):
            total += own
    return objective, gradient
