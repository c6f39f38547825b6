"""What a rule is taught, in small pure functions: the objective of stored moves, and that of fresh roll-outs.

Tensors of samples have shape (M, 52) for features, (M, 8) for moves, credits and curvatures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from air.optimization.rule import LearnedRule

_CHUNK = 32_768
"""Samples whose activations are in memory at a time."""

_LEAST = 1e-30
"""The least mean curvature that a loss is divided by."""


class Samples(NamedTuple):
    """Updates of single Gaussians, as `air.fitting.rollout.RollOut` has them."""

    features: Tensor
    move: Tensor
    credit: Tensor
    curvature: Tensor


def stored_loss(rule: LearnedRule, samples: Samples, mean_curvature: float, step_size: float) -> Tensor:
    """The change of the objective by a rule's moves u in place of the stored ones u0, as credit and curvature predict.

    A scalar, which a rule should make small:

        mean (credit · (u - u0) + curvature / (2 step_size) · (u - u0)²) / mean_curvature

    The stored curvature is that of a Gaussian that no other overlaps, at one update. Gaussians overlap, and a rule
    moves all of them at every update. So the true curvature is several times as large, which `step_size` allows for.

    Args:
        rule: The rule that learns.
        samples: Stored samples.
        mean_curvature: Of all stored samples, so that losses have a size that no corpus changes.
        step_size: How far the rule goes, as a fraction of a lone Gaussian's best move.
    """
    change = rule(samples.features) - samples.move
    predicted = samples.credit * change + samples.curvature / (2 * step_size) * change.square()
    return predicted.mean() / max(mean_curvature, _LEAST)


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
