"""Which settings and which update rule a number of steps gets: of fits that grow, and of good starts.

What wins at that number of steps, by measurement (docs/optimizer.md), is chosen here and nowhere else. This module
knows nothing of growth, stages or networks.
"""

from __future__ import annotations

import math
from dataclasses import replace

from air.defaults import AUTO
from air.optimization.config import OptimizeConfig
from air.optimization.rule import LearnedRule
from air.optimization.rule_file import find_rule, shipped_rule

OPTIMIZATION = OptimizeConfig(
    offset_learning_rate=0.04,
    scale_learning_rate=0.2,
    angle_learning_rate=0.1,
    colour_learning_rate=0.025,
    beta1=0.85,
    opposed_fraction=0.0,
    squared_fraction=0.5,
)
"""Learning rates and schedule of growing fits and of refinement, with Adam or with a learned rule.

Adam's moments survive growth, so these rates are lower than those of a plain grid. No number moves against its
gradient, since plain Adam overshoots where new Gaussians appear beside old ones. The squared error's gradient in place
of half of L1's gains decibels and similarity alike.
"""

RULE_STEPS = 60
"""The longest growing fit that the shipped rule makes by default. Adam is as good after that."""

REFINEMENT_RULE_STEPS = 40
"""The longest refinement that the shipped rule makes by default. Adam is better after that."""

_REFINEMENT_FACTOR = 0.15  # on the rates of a refinement, times the root of its steps


def fit_optimization(steps: int, rule: str | LearnedRule = AUTO) -> OptimizeConfig:
    """Settings of a growing fit with an update rule, the same where a rule is trained and where it is used.

    Args:
        steps: Number of updates, at least 0.
        rule: "auto", the shipped rule in fits of at most `RULE_STEPS` steps and Adam in longer ones; "adam";
            "shipped"; the path of a rule NAME.safetensors; or a rule.

    Raises:
        CheckpointError: There is no such rule.
        ValueError: The rule was trained with other betas than those of `OPTIMIZATION`.
    """
    return replace(OPTIMIZATION, steps=steps, learned=_choose(rule, steps <= RULE_STEPS))


def refinement(steps: int, rule: str | LearnedRule = AUTO) -> OptimizeConfig:
    """Settings for a start that is good already, such as a prediction: few steps are smaller ones.

    The rates that suit a long optimisation first make a prediction several decibels worse. So they are multiplied by
    0.15 √steps, at most by 1.

    Args:
        steps: Number of updates, at least 0.
        rule: As for `fit_optimization`; "auto" takes the shipped rule for at most `REFINEMENT_RULE_STEPS` steps.

    Raises:
        CheckpointError: There is no such rule.
        ValueError: The rule was trained with other betas than those of `OPTIMIZATION`.

    Example:
        >>> refinement(4, "adam").learning_rates(0)[2] < refinement(200, "adam").learning_rates(0)[2]
        np.True_
    """
    learned = _choose(rule, steps <= REFINEMENT_RULE_STEPS)
    factor = min(1.0, _REFINEMENT_FACTOR * math.sqrt(max(1, steps)))
    return replace(OPTIMIZATION, steps=steps, learned=learned).scaled(factor)


def _choose(rule: str | LearnedRule, short: bool) -> LearnedRule | None:
    """The learned rule; None is Adam."""
    if isinstance(rule, LearnedRule):
        return rule
    if rule == AUTO:
        return shipped_rule() if short else None
    return find_rule(rule)
