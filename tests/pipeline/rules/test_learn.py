"""What a rule is taught: the stored objective, the online gradient, and steps that a bad gradient cannot spoil."""

from __future__ import annotations

import copy

import pytest
import torch

from air.optimization.rule import LearnedRule
from pipeline.rules.config import LearnerConfig, RuleConfig
from pipeline.rules.learn import Samples, online_gradient, stored_loss
from pipeline.rules.reference import fresh_rule
from pipeline.rules.state import RuleState


def make_samples(count: int = 300) -> Samples:
    generator = torch.Generator().manual_seed(0)
    features, move, credit, curvature = (torch.randn(count, size, generator=generator) for size in (52, 8, 8, 8))
    return Samples(features, move, credit, curvature.abs())


def test_the_stored_loss_has_its_least_at_a_part_of_newtons_step() -> None:
    samples = make_samples()
    best = samples.move - 0.3 * samples.credit / samples.curvature

    class Plays(LearnedRule):
        def __init__(self, moves: torch.Tensor) -> None:
            super().__init__()
            self.moves = moves

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.moves

    def loss_at(moves: torch.Tensor) -> float:
        return float(stored_loss(Plays(moves), samples, 0.5, 0.3))

    assert loss_at(samples.move) == 0
    lowest = -0.3 / 2 * (samples.credit.square() / samples.curvature).mean() / 0.5
    assert loss_at(best) == pytest.approx(float(lowest), rel=1e-4)
    for factor in (0.9, 1.1):
        assert loss_at(samples.move + factor * (best - samples.move)) > loss_at(best)


def test_the_online_gradient_is_that_of_credit_times_move() -> None:
    rule, samples = fresh_rule(0), make_samples(40_000)
    objective, gradient = online_gradient(rule, samples, 0.5)
    expected = (rule(samples.features) * samples.credit).sum() / 0.5
    torch.testing.assert_close(objective, float(expected.detach()), rtol=1e-4, atol=1e-2)
    for ours, theirs in zip(gradient, torch.autograd.grad(expected, list(rule.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-1)


def test_a_gradient_that_is_not_finite_leaves_the_rule_as_it_is_and_a_long_one_is_shortened() -> None:
    state = RuleState(fresh_rule(0), LearnerConfig(warmup_steps=0))
    gradient = [torch.ones_like(parameter) for parameter in state.rule.parameters()]
    before = copy.deepcopy(state.rule.state_dict())
    done = state.update([torch.full_like(part, torch.nan) for part in gradient], 10)
    assert not done.taken
    assert state.step == 1
    assert all(torch.equal(before[name], value) for name, value in state.rule.state_dict().items())
    for _ in range(4):
        state.update(gradient, 10)
    state.update([1000 * part for part in gradient], 10)
    for parameter in state.rule.parameters():  # twice the median of the norms
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, 2.0))


def test_the_learning_rate_rises_over_the_warm_up_and_falls_linearly() -> None:
    config = RuleConfig()
    rates = [config.learning_rate_at(step, 1000) for step in (0, 19, 500, 999)]
    assert rates[0] == pytest.approx(5e-3 / 20)
    assert rates[1] == pytest.approx(5e-3, rel=0.02)
    assert rates[2] == pytest.approx(5e-3 * 0.525)
    assert rates[3] == pytest.approx(5e-3 * 0.05, rel=0.02)
