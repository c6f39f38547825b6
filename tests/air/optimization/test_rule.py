"""Update rules: the learned one as a definition, and in the compiled step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import air
from air.errors import CheckpointError
from air.fitting.grid import grid_initialization
from air.gaussians import anchors
from air.optimization.config import OptimizeConfig
from air.optimization.optimize import optimize
from air.optimization.problem import Moments
from air.optimization.rule import (
    OWN_FEATURES,
    SHARED_FEATURES,
    Adam,
    LearnedRule,
    Progress,
    State,
    describe,
    directions_of,
)
from air.optimization.rule_file import find_rule, load_rule, save_rule
from air.optimization.settings import OPTIMIZATION, REFINEMENT_RULE_STEPS, RULE_STEPS, fit_optimization, refinement
from air.predictor.base import GridPredictor
from air.stages.loop import all_predicted
from air.stages.predict import predict
from tests.support.cases import smooth_image

HEIGHT, WIDTH, PATCH = 21, 26, 5


def a_rule(seed: int = 0, strength: float = 0.1) -> LearnedRule:
    """A rule whose coefficients depend on every feature."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rule = LearnedRule()
        torch.nn.init.normal_(rule.last.weight, std=strength)
        torch.nn.init.normal_(rule.last.bias, std=strength)
        torch.nn.init.normal_(rule.first.bias, std=strength)
    return rule


def problem(dtype: torch.dtype = torch.float32):
    target = smooth_image(HEIGHT, WIDTH).to(dtype)
    raw = grid_initialization(target, PATCH)
    raw = raw + 0.2 * torch.randn(raw.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return raw, anchors(HEIGHT, WIDTH, PATCH, dtype), target


def config(rule: LearnedRule | None = None, steps: int = 8, **settings) -> OptimizeConfig:
    return replace(OPTIMIZATION, **{"steps": steps, "squared_fraction": 0.0, "learned": rule, **settings})


def a_state(count: int = 6, **changes) -> State:
    generator = torch.Generator().manual_seed(3)
    raw, gradient, mean = torch.randn(3, count, 8, generator=generator, dtype=torch.float64)
    square = gradient.square() + 0.1
    progress = Progress(step=2, steps=10, earlier=3, later=4, rms_error=0.1)
    rates = torch.from_numpy(config().first_learning_rates())
    state = State(raw, gradient * 1e-3, mean * 1e-3, square * 1e-6, torch.arange(count), rates, 6, 900, progress, 1e-8)
    return replace(state, **changes)


def test_a_new_rule_is_the_cautious_adam():
    state = a_state()
    assert torch.allclose(LearnedRule().double().move(state), Adam(0.0).move(state).clamp(-5, 5))


def test_features_have_the_shapes_and_bounds_that_are_documented():
    features, curvature = describe(a_state())
    assert features.shape == (6, OWN_FEATURES + SHARED_FEATURES)
    assert curvature.shape == (6, 8)
    assert bool((curvature > 0).all())
    assert bool((features[:, 16:24].abs() <= 3).all())  # the Gauss-Newton steps
    assert bool((features[:, 24:32].abs() <= 2).all())  # how many pixels pull in one direction
    assert bool((features[:, 32:42].abs() <= 1).all())  # shape, colour and age


def test_the_gauss_newton_step_leads_a_lone_gaussian_home():
    """Moved off a target of one elongated, rotated Gaussian, the step of its centre points back and has its length."""
    from air.gaussians import activate
    from air.rendering.render import render

    anchor = torch.full((1, 2), 31.5, dtype=torch.float64)
    raw = torch.tensor([[0.0, 0.0, 1.0, -2.0, -1.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    target = render(activate(raw, anchor, 16), 64, 64)
    away = raw.clone()
    away[:, :2] = torch.tensor([0.03, -0.02])
    moved = away.clone().requires_grad_()
    difference = render(activate(moved, anchor, 16), 64, 64) - target
    rms = float(difference.detach().square().mean().sqrt())
    # The gradient whose pull is that of half the squared error.
    count = difference.numel()
    (0.5 * difference.square().sum() * 0.7 / (rms * count)).backward()
    assert moved.grad is not None
    state = a_state(
        1,
        raw=away,
        gradient=moved.grad,
        mean=moved.grad,
        square=moved.grad.square(),
        patch_size=16,
        num_values=count,
        progress=Progress(0, 1, 0, 0, rms),
        learning_rates=torch.full((8,), 10.0, dtype=torch.float64),
    )
    _, _, newton = directions_of(describe(state).features)
    assert newton[0, :2].numpy() * 10 == pytest.approx([-0.03, 0.02], rel=0.1)


@pytest.mark.parametrize("settings", [{}, {"learned_steps": 4}, {"squared_fraction": 1.0}, {"earlier_steps": 7}])
def test_the_compiled_rule_agrees_with_the_definition(settings: dict):
    rule = a_rule()
    fast = optimize(*problem(), PATCH, config(rule, **settings), backend="cpu")
    slow = optimize(*problem(torch.float64), PATCH, config(rule.double(), **settings))
    assert fast.trajectory.loss == pytest.approx(slow.trajectory.loss, rel=1e-3)
    assert fast.raw.numpy() == pytest.approx(slow.raw.float().numpy(), abs=0.02)
    assert fast.trajectory.loss[-1] < fast.trajectory.loss[0]


def test_the_first_update_agrees_number_by_number():
    rule = a_rule()
    ages = torch.arange(30, dtype=torch.int32) % 7
    raw, anchor, target = problem(torch.float64)
    generator = torch.Generator().manual_seed(5)
    mean = 1e-4 * torch.randn(raw.shape, generator=generator, dtype=torch.float64)
    moments = Moments(mean, 2 * mean.square() + 1e-9, ages)
    settings = config(rule, steps=1, squared_fraction=0.5)
    slow = optimize(raw, anchor, target, PATCH, config(rule.double(), steps=1, squared_fraction=0.5), moments=moments)
    single = (tensor.float() for tensor in (raw, anchor, target))
    fast = optimize(*single, PATCH, settings, moments=moments, backend="cpu")
    moved = slow.raw - raw
    assert float(moved.abs().mean()) > 0.01
    assert fast.raw.numpy() == pytest.approx(slow.raw.numpy(), abs=2e-4)
    assert fast.moments is not None
    assert fast.moments.age.tolist() == (ages + 1).tolist()


def test_threads_do_not_change_a_bit():
    arguments = (*problem(), PATCH, config(a_rule(), squared_fraction=1.0))
    one, two = (optimize(*arguments, backend="cpu", threads=threads) for threads in (1, 2))
    assert torch.equal(one.raw, two.raw)
    assert one.trajectory.loss.tobytes() == two.trajectory.loss.tobytes()


@pytest.mark.parametrize("value", [-40.0, 40.0, 1e6])
def test_saturated_numbers_stay_finite(value: float):
    raw, anchor, target = problem()
    raw[::3] = value
    raw[1::3, 2:] = -value
    result = optimize(raw, anchor, target, PATCH, config(a_rule(), squared_fraction=1.0), backend="cpu")
    assert bool(result.raw.isfinite().all())
    assert np.isfinite(result.trajectory.loss).all()


def test_a_perfect_picture_stays():
    """Without an error there is no direction: the squared error's scale and all quotients stay finite."""
    raw, anchor, _ = problem()
    target = torch.zeros(3, HEIGHT, WIDTH)
    raw[:, 5:] = 0
    for backend in ("cpu", "reference"):
        settings = config(LearnedRule(), squared_fraction=1.0)
        result = optimize(raw, anchor, target, PATCH, settings, backend=backend)
        assert bool(result.raw.isfinite().all())
        assert result.trajectory.loss[-1] == pytest.approx(0, abs=1e-4)


def test_the_squared_error_gains_decibels_of_it():
    plain, squared = (
        optimize(*problem(), PATCH, config(None, steps=40, squared_fraction=fraction)).trajectory.psnr[-1]
        for fraction in (0.0, 1.0)
    )
    assert squared > plain


def test_other_betas_than_those_of_the_training_are_refused():
    with pytest.raises(ValueError, match=r"trained with beta1 0\.85"):
        OptimizeConfig(learned=LearnedRule(), beta1=0.9)


def test_a_rule_that_was_stored_moves_alike(tmp_path: Path):
    rule = a_rule()
    saved = save_rule(tmp_path / "rule.safetensors", rule, step=7, metrics={"valid_psnr": 30.0})
    loaded, card = load_rule(tmp_path / "rule.safetensors")
    assert card == saved
    assert card.step == 7
    state = a_state()
    assert torch.equal(loaded.move(state), rule.move(state))


@pytest.mark.parametrize("damage", ["cut", "card", "shape", "missing", "name"])
def test_a_damaged_rule_is_refused_by_name(tmp_path: Path, damage: str):
    path = tmp_path / "rule.safetensors"
    save_rule(path, a_rule())
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "card":
        path.with_suffix(".json").write_text("{")
    elif damage == "shape":
        card = path.with_suffix(".json")
        card.write_text(card.read_text().replace('"hidden": 16', '"hidden": 32'))
    elif damage == "missing":
        path.unlink()
    else:
        path = tmp_path / "rule.pt"
    with pytest.raises(CheckpointError, match="rule"):
        find_rule(path)


def test_rules_have_names():
    assert find_rule("adam") is None
    with pytest.raises(CheckpointError, match="unknown update rule 'best'"):
        find_rule("best")
    assert fit_optimization(RULE_STEPS + 1).learned is None
    assert fit_optimization(10, "adam").learned is None
    rule = a_rule()
    assert fit_optimization(10, rule).learned is rule
    assert refinement(REFINEMENT_RULE_STEPS + 1).learned is None
    assert refinement(10, "adam").learned is None
    assert refinement(100, rule).learned is rule


def test_few_steps_from_a_good_start_are_smaller_and_many_are_not():
    few, some, many = (refinement(steps, "adam").learning_rates(0) for steps in (1, 10, 100))
    assert (few < some).all()
    assert (some < many).all()
    assert many.tolist() == OPTIMIZATION.learning_rates(0).tolist()


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_the_shipped_rule_refines_better_than_adam(steps: int):
    image = smooth_image(64, 64)
    raw, anchor = all_predicted(predict(image, GridPredictor(7), 3))

    def refined(rule: str) -> float:
        return optimize(raw, anchor, image, 7, refinement(steps, rule)).trajectory.psnr[-1]

    assert refined("shipped") > refined("adam")


def test_the_shipped_rule_makes_short_fits_better():
    image = smooth_image(64, 64)
    for steps in (10, 30):
        adam, shipped = (air.fit(image, steps, num_gaussians=200, rule=rule) for rule in ("adam", "shipped"))
        assert shipped.trajectory.psnr[-1] > adam.trajectory.psnr[-1] + 0.3
        default = air.fit(image, steps, num_gaussians=200)
        assert torch.equal(default.raw, shipped.raw)
