"""Roll-outs: the fit that they make, and the credit that they give its moves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import air
from air.fitting.grow import GrowthConfig
from air.fitting.rollout import CreditConfig, roll_out
from air.optimization.rule import OWN_FEATURES, SHARED_FEATURES, Adam, LearnedRule, State
from air.optimization.settings import OPTIMIZATION
from tests.support.cases import smooth_image

HEIGHT, WIDTH = 24, 31
CREDIT = CreditConfig(discount=0.6, final_weight=0.5)


class Script:
    """A rule that repeats moves, whatever it sees: as a roll-out sees its own moves when it gives credit."""

    def __init__(self) -> None:
        self.moves: list[Tensor] = []
        self.turn = 0
        self._generator = torch.Generator().manual_seed(0)

    def move(self, state: State) -> Tensor:
        if self.turn == len(self.moves):
            new = 0.3 * torch.randn(state.raw.shape, generator=self._generator)
            self.moves.append(Adam(0.0).move(state) + new.to(state.raw))
        move = self.moves[self.turn]
        self.turn += 1
        return move


def config(steps: int):
    return replace(OPTIMIZATION, steps=steps, squared_fraction=0.0)


def objective(loss: np.ndarray, update: int) -> float:
    """The discounted log losses after an update, as `CreditConfig` defines them."""
    later = np.log(loss[update + 1 :])
    weights = (1 - CREDIT.discount) * CREDIT.discount ** np.arange(len(later))
    return float(weights @ later + CREDIT.final_weight * later[-1])


@pytest.mark.parametrize("growths", [0, 2])
def test_a_roll_out_is_the_fit(growths: int):
    image = smooth_image(HEIGHT, WIDTH).double()
    growth = GrowthConfig(growths=growths)
    for rule in (Adam(0.0), LearnedRule().double()):
        rolled = roll_out(image, rule, 60, config(15), growth=growth)
        fitted = air.fit(image, 15, num_gaussians=60, optimization=config(15), growth=growth)
        assert rolled.loss == pytest.approx(fitted.trajectory.loss, rel=1e-6)
        assert rolled.psnr == pytest.approx(fitted.trajectory.psnr, abs=1e-5)


def test_the_credit_is_the_derivative_of_the_later_losses():
    """Of colours: the picture jumps where geometry moves a pixel over the edge of a support, which no gradient has."""
    image = smooth_image(HEIGHT, WIDTH).double()
    growth = GrowthConfig(growths=0)
    script = Script()
    rolled = roll_out(image, script, 20, config(7), growth=growth, credit=CREDIT)
    count = len(script.moves[0])
    assert len(rolled) == 7 * count
    generator = np.random.default_rng(0)
    for _ in range(12):
        update, gaussian, number = generator.integers(7), generator.integers(count), generator.integers(5, 8)
        ends = []
        for change in (-1e-4, 1e-4):
            changed = Script()
            changed.moves = [move.clone() for move in script.moves]
            changed.moves[update][gaussian, number] += change
            ends.append(objective(roll_out(image, changed, 20, config(7), growth=growth).loss, update))
        sample = int(update) * count + int(gaussian)
        assert int(rolled.update[sample]) == update
        assert float(rolled.credit[sample, number]) == pytest.approx((ends[1] - ends[0]) / 2e-4, rel=1e-3, abs=1e-7)


def test_credit_finds_the_gaussian_again_after_growths():
    """Growth sorts the Gaussians anew. The losses after it must count for the Gaussian that moved."""
    image = smooth_image(HEIGHT, WIDTH).double()
    growth = GrowthConfig(growths=2, growth_fraction=0.6)
    script = Script()
    rolled = roll_out(image, script, 60, config(6), growth=growth, credit=CREDIT)
    first = len(script.moves[0])
    assert len(script.moves[-1]) > first
    found, expected = [], []
    for gaussian in range(0, first, 2):
        ends = []
        for change in (-1e-4, 1e-4):
            changed = Script()
            changed.moves = [move.clone() for move in script.moves]
            changed.moves[0][gaussian, 5] += change
            ends.append(objective(roll_out(image, changed, 60, config(6), growth=growth).loss, 0))
        expected.append((ends[1] - ends[0]) / 2e-4)
        found.append(float(rolled.credit[gaussian, 5]))
    # New Gaussians get their colour from the residual, which credit does not follow: it agrees, not exactly.
    assert np.corrcoef(found, expected)[0, 1] > 0.7


def test_samples_are_a_seeded_part():
    image = smooth_image(HEIGHT, WIDTH)
    whole = roll_out(image, Adam(0.0), 60, config(10))
    part, again, other = (roll_out(image, Adam(0.0), 60, config(10), fraction=0.3, seed=seed) for seed in (4, 4, 5))
    assert len(part) == pytest.approx(0.3 * len(whole), rel=0.2)
    assert torch.equal(part.features, again.features)
    assert torch.equal(part.credit, again.credit)
    assert not torch.equal(part.update, other.update) or not torch.equal(part.features, other.features)
    assert whole.features.shape == (len(whole), OWN_FEATURES + SHARED_FEATURES)
    assert whole.move.shape == whole.credit.shape == whole.curvature.shape == (len(whole), 8)
    assert bool((whole.curvature > 0).all())


def test_a_step_against_the_credit_makes_the_next_roll_out_better():
    image = smooth_image(48, 48)
    torch.manual_seed(0)
    rule = LearnedRule()
    first = roll_out(image, rule, 120, config(10), credit=CREDIT)
    learner = torch.optim.Adam(rule.parameters(), lr=2e-3)
    for _ in range(40):
        rolled = roll_out(image, rule, 120, config(10), credit=CREDIT)
        learner.zero_grad()
        (rule(rolled.features) * rolled.credit).sum().backward()
        learner.step()
    last = roll_out(image, rule, 120, config(10), credit=CREDIT)
    assert objective(last.loss, 0) < objective(first.loss, 0) - 0.2


def test_options_that_do_not_fit_are_refused():
    image = smooth_image(HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="fraction"):
        roll_out(image, Adam(0.0), 20, config(2), fraction=0.0)
    with pytest.raises(ValueError, match="discount"):
        CreditConfig(discount=1.0)
    with pytest.raises(ValueError, match="final_weight"):
        CreditConfig(final_weight=-1.0)
