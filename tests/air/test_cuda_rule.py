"""Learned rule and squared error on the cuda backend, against the float64 definition.

On a GPU, or on a CPU in triton's interpreter, started by test_cuda_interpreter.py.
"""

import copy
from dataclasses import replace

import pytest
import torch

from air.errors import NonFiniteLossError
from air.optimization.config import OptimizeConfig
from air.optimization.optimize import optimize, optimize_batch
from air.optimization.problem import Moments, OptimizeResult, Problem
from air.optimization.reference import MIN_MEAN_ERROR
from air.optimization.rule import LearnedRule
from tests.support.cuda_problems import DEVICE, INTERPRETED, PATCH, problem

pytest.importorskip("triton", reason="the cuda backend needs triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
real_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a real GPU")


def random_rule(seed: int = 0) -> LearnedRule:
    """A rule with no weight at zero, so that every feature and every direction counts."""
    rule = LearnedRule()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return rule


def settings(rule: LearnedRule, **changes) -> OptimizeConfig:
    return OptimizeConfig(learned=rule, beta1=rule.beta1, beta2=rule.beta2, **changes)


def exact(config: OptimizeConfig) -> OptimizeConfig:
    return config if config.learned is None else replace(config, learned=copy.deepcopy(config.learned).double())


def defined(one: Problem, config: OptimizeConfig) -> OptimizeResult:
    """The definition's result in float64."""
    raw, anchor, target = (part.cpu().double() for part in one[:3])
    canvas = None if one.canvas is None else one.canvas.cpu().double()
    moments = one.moments
    if moments is not None:
        moments = Moments(moments.mean.cpu().double(), moments.square.cpu().double(), moments.age.cpu())
    return optimize(raw, anchor, target, PATCH, exact(config), canvas=canvas, moments=moments, backend="reference")


def check(found: OptimizeResult, expected: OptimizeResult, tolerance: float = 1e-4) -> None:
    assert found.trajectory.loss == pytest.approx(expected.trajectory.loss, rel=1e-5)
    assert found.trajectory.psnr == pytest.approx(expected.trajectory.psnr, abs=1e-3)
    assert found.raw.isfinite().all()
    if len(expected.raw):
        assert (found.raw.cpu() - expected.raw).abs().max() < tolerance


def run(one: Problem, config: OptimizeConfig) -> OptimizeResult:
    return optimize(
        *one[:3], PATCH, config, canvas=one.canvas, moments=one.moments, backend="cuda" if INTERPRETED else "auto"
    )


CASES = {
    "learned": settings(random_rule(), steps=2, earlier_steps=4, later_steps=9),
    "learned, last updates": settings(random_rule(1), steps=2),
    "Adam takes over": settings(
        random_rule(2), steps=3, earlier_steps=1, later_steps=3, learned_steps=2, opposed_fraction=0.3
    ),
    "Adam took over before": settings(random_rule(), steps=2, earlier_steps=5, learned_steps=5, opposed_fraction=0.0),
    "half squared": OptimizeConfig(steps=3, squared_fraction=0.5),
    "squared": OptimizeConfig(steps=3, squared_fraction=1.0),
    "learned, squared": settings(random_rule(3), steps=2, squared_fraction=0.7, later_steps=1),
    "no update": settings(random_rule(), steps=0, squared_fraction=0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_updates_agree_with_the_definition(name):
    config = CASES[name]
    one = problem(6, 13)
    found, expected = run(one, config), defined(one, config)
    check(found, expected)
    assert found.moments.age.tolist() == expected.moments.age.tolist()
    torch.testing.assert_close(found.moments.mean.cpu().double(), expected.moments.mean, rtol=1e-3, atol=1e-8)
    if config.steps:  # the case differs from the usual settings by more than the tolerance
        usual = defined(one, OptimizeConfig(steps=config.steps))
        assert (usual.raw - expected.raw).abs().max() > 1e-2


def test_a_new_rule_is_the_cautious_adam():
    one = problem(6, 9)
    rule = LearnedRule()
    found = run(one, settings(rule, steps=2))
    check(found, defined(one, OptimizeConfig(steps=2, beta1=rule.beta1, beta2=rule.beta2, opposed_fraction=0.0)))


def test_moments_of_different_ages():
    raw, anchor, target = problem(6, 19)[:3]
    generator = torch.Generator().manual_seed(3)
    mean = 1e-3 * torch.randn(raw.shape, generator=generator)
    square = mean.square() * (1 + torch.rand(raw.shape, generator=generator))
    age = torch.tensor([0, 1, 2, 7, 40, 300, 100_000], dtype=torch.int32).repeat(len(raw))[: len(raw)]
    mean[age == 0], square[age == 0] = 0, 0
    moments = Moments(mean.to(DEVICE), square.to(DEVICE), age.to(DEVICE))
    one = Problem(raw, anchor, target, None, moments)
    for learned_steps in (41, None):
        config = settings(random_rule(), steps=2, earlier_steps=40, later_steps=3, learned_steps=learned_steps)
        found, expected = run(one, config), defined(one, config)
        check(found, expected)
        assert found.moments.age.tolist() == expected.moments.age.tolist()


@pytest.mark.parametrize("extreme", [-30.0, 30.0])
@pytest.mark.parametrize("columns", [slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 8), slice(0, 8)])
def test_saturated_raw_numbers(extreme, columns):
    raw, anchor, target = problem(5, 9)[:3]
    raw = raw[:2].clone()
    raw[0, columns] = extreme
    one = Problem(raw, anchor[:2], target)
    config = settings(random_rule(), steps=1, later_steps=5)
    check(run(one, config), defined(one, config))


def test_a_gauss_newton_step_of_infinitely_many_learning_rates_is_bounded():
    one = problem(5, 9)
    config = settings(random_rule(), steps=1, later_steps=5).scaled(1e-42)
    check(run(one, config), defined(one, config))


def test_gaussians_without_a_gradient():
    raw, anchor, target = problem(5, 9)[:3]
    anchor = anchor.clone()
    anchor[0] = 1e4
    raw = raw.clone()
    raw[1, 5:8] = 0  # black: no gradient but by colour, no energy
    one = Problem(raw, anchor, target)
    config = settings(random_rule(), steps=2, later_steps=5)
    found = run(one, config)
    check(found, defined(one, config))
    assert not found.moments.square[0].any()
    assert (found.raw[0] != raw[0]).all()  # by the free move


def test_a_ragged_batch_gives_what_the_definition_gives_for_single_images():
    config = settings(random_rule(), steps=2, squared_fraction=0.5, earlier_steps=1, later_steps=2, learned_steps=2)
    canvas = (0.3 * torch.rand(3, 6, 4, generator=torch.Generator().manual_seed(5))).to(DEVICE)
    nothing = problem(6, 4, 3)
    batch = [
        problem(11, 19, 1),
        Problem(nothing.raw[:0], nothing.anchor[:0], nothing.target, canvas),
        problem(4, 26, 2),
        problem(6, 4, 4)._replace(canvas=canvas),
    ]
    assert len(batch[0].raw) % 16  # a block of Gaussians is of two images
    results = optimize_batch(batch, PATCH, config, backend="cuda")
    for one, result in zip(batch, results, strict=True):
        assert result.raw.shape == one.raw.shape
        check(result, defined(one, config))


def test_no_gaussians_at_all():
    target = problem(5, 7).target
    empty = Problem(torch.zeros(0, 8, device=DEVICE), torch.zeros(0, 2, device=DEVICE), target)
    config = settings(random_rule(), steps=2, squared_fraction=1.0)
    (result,) = optimize_batch([empty], PATCH, config, backend="cuda")
    assert result.trajectory.loss == pytest.approx([result.trajectory.loss[0]] * 3, rel=1e-6)


def test_a_second_run_starts_afresh():
    from air.optimization.cuda import BatchOptimizer

    state = BatchOptimizer([problem(5, 9)], PATCH, settings(random_rule(), steps=2, squared_fraction=1.0))
    state.run()
    first, losses = state.raw[0].clone(), state.trajectories()[0]
    state.run()
    assert (state.raw[0] - first).abs().max() < (1e-6 if INTERPRETED else 1e-4)
    assert state.trajectories()[0] == pytest.approx(losses, rel=1e-5)


def test_a_loss_that_is_not_a_number_is_found():
    raw, anchor, target = problem(5, 9)[:3]
    target[1, 3, 4] = torch.nan
    with pytest.raises(NonFiniteLossError, match="after 0 updates"):
        run(Problem(raw, anchor, target), settings(random_rule(), steps=1, squared_fraction=0.5))


@real_gpu
@pytest.mark.parametrize("steps", [20, 47])
def test_graphs_of_many_steps_take_the_same_way(steps):
    rule = LearnedRule()  # a random rule would not converge
    config = settings(rule, steps=steps, squared_fraction=0.5, learned_steps=steps - 5).scaled(0.5)
    one = problem(37, 45)
    found, expected = run(one, config), defined(one, config)
    assert found.trajectory.loss == pytest.approx(expected.trajectory.loss, rel=2e-3)
    assert found.trajectory.psnr == pytest.approx(expected.trajectory.psnr, abs=0.05)


def test_the_least_mean_error_is_the_definitions():
    from air.loss import cuda

    assert cuda.MIN_MEAN_ERROR == MIN_MEAN_ERROR
