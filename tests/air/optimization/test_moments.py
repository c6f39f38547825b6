"""Adam's moments: an optimisation goes on where another one ended, and Gaussians of any age are corrected alike."""

import math
from dataclasses import replace

import pytest
import torch

from air.fitting.grid import grid_initialization
from air.gaussians import COLUMN_GROUPS, activate, anchors
from air.loss.reference import loss
from air.optimization.config import OptimizeConfig
from air.optimization.optimize import optimize, optimize_batch
from air.optimization.problem import Moments, Problem
from air.rendering.render import render
from tests.support.cases import smooth_image

HEIGHT, WIDTH, PATCH = 21, 30, 5
CONSTANT = OptimizeConfig(steps=4, constant_fraction=1.0)


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    target = smooth_image(HEIGHT, WIDTH).to(dtype)
    raw = grid_initialization(target, PATCH)
    raw = raw + 0.2 * torch.randn(raw.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return raw, anchors(HEIGHT, WIDTH, PATCH, dtype), target


def some_moments(dtype: torch.dtype = torch.float32) -> Moments:
    """Moments of Gaussians of different ages, from optimisations of 0, 2 and 5 steps."""
    raw, anchor, target = problem(dtype)
    found = [Moments.fresh(raw)]
    for steps in (2, 5):
        moments = optimize(raw, anchor, target, PATCH, replace(CONSTANT, steps=steps), backend="reference").moments
        assert moments is not None
        found.append(moments)
    order = torch.arange(len(raw)) % 3
    return Moments.concatenate([found[age][row : row + 1] for row, age in enumerate(order.tolist())])


def test_the_definition_is_adam() -> None:
    raw, anchor, target = problem(torch.float64)
    config = OptimizeConfig(steps=6)
    result = optimize(raw, anchor, target, PATCH, config, backend="reference")
    groups = [raw[:, columns].clone().requires_grad_() for columns in COLUMN_GROUPS.values()]
    adam = torch.optim.Adam([{"params": [group]} for group in groups], betas=(config.beta1, config.beta2))
    for step in range(config.steps):
        for options, columns in zip(adam.param_groups, COLUMN_GROUPS.values(), strict=True):
            options["lr"] = float(config.learning_rates(step)[columns][0])
        adam.zero_grad()
        gaussians = activate(torch.cat(groups, dim=1), anchor, PATCH)
        loss(render(gaussians, HEIGHT, WIDTH), target).backward()
        adam.step()
    torch.testing.assert_close(result.raw, torch.cat(groups, dim=1).detach(), rtol=1e-9, atol=1e-9)
    assert result.moments is not None
    mean = torch.cat([adam.state[group]["exp_avg"] for group in groups], dim=1)
    torch.testing.assert_close(result.moments.mean, mean, rtol=1e-9, atol=1e-15)
    assert result.moments.age.tolist() == [6] * len(raw)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("opposed_fraction", [0.0, 1.0])
def test_two_halves_are_the_whole(backend: str, opposed_fraction: float) -> None:
    raw, anchor, target = problem()
    half = replace(CONSTANT, opposed_fraction=opposed_fraction)
    whole = optimize(raw, anchor, target, PATCH, replace(half, steps=8), backend=backend)
    first = optimize(raw, anchor, target, PATCH, half, backend=backend)
    second = optimize(first.raw, anchor, target, PATCH, half, moments=first.moments, backend=backend)
    forgotten = optimize(first.raw, anchor, target, PATCH, half, backend=backend)
    torch.testing.assert_close(second.raw, whole.raw, rtol=1e-3, atol=1e-3)
    assert second.moments is not None
    assert second.moments.age.tolist() == [8] * len(raw)
    assert (forgotten.raw - whole.raw).abs().max() > 0.05


def test_the_compiled_step_corrects_every_age_as_the_definition_does() -> None:
    fast = optimize(*problem(), PATCH, CONSTANT, moments=some_moments(), backend="cpu")
    slow = optimize(*problem(torch.float64), PATCH, CONSTANT, moments=some_moments(torch.float64), backend="reference")
    assert fast.trajectory.loss == pytest.approx(slow.trajectory.loss, rel=1e-4)
    torch.testing.assert_close(fast.raw.double(), slow.raw, rtol=1e-2, atol=2e-3)
    assert fast.moments is not None
    assert slow.moments is not None
    assert torch.equal(fast.moments.age, slow.moments.age)
    assert sorted(set(fast.moments.age.tolist())) == [4, 6, 9]


@pytest.mark.parametrize("threads", [1, 3])
def test_moments_do_not_depend_on_threads(threads: int) -> None:
    one = optimize(*problem(), PATCH, CONSTANT, moments=some_moments(), backend="cpu")
    other = optimize(*problem(), PATCH, CONSTANT, moments=some_moments(), backend="cpu", threads=threads)
    assert torch.equal(one.raw, other.raw)
    assert one.moments is not None
    assert other.moments is not None
    assert torch.equal(one.moments.square, other.moments.square)


def test_a_batch_takes_the_moments_of_each_problem() -> None:
    raw, anchor, target = problem()
    moments = some_moments()
    batch = optimize_batch([Problem(raw, anchor, target), Problem(raw, anchor, target, None, moments)], PATCH, CONSTANT)
    alone = optimize(raw, anchor, target, PATCH, CONSTANT, moments=moments)
    assert torch.equal(batch[1].raw, alone.raw)
    assert not torch.equal(batch[0].raw, alone.raw)


def test_moments_are_of_the_free_gaussians() -> None:
    raw, anchor, target = problem()
    free = torch.arange(len(raw)) % 2 == 0
    moments = some_moments()
    result = optimize(raw, anchor, target, PATCH, CONSTANT, free=free, moments=moments[free])
    assert result.moments is not None
    assert torch.equal(result.moments.age, moments.age[free] + CONSTANT.steps)
    with pytest.raises(ValueError, match=f"of the {int(free.sum())} free Gaussians"):
        optimize(raw, anchor, target, PATCH, CONSTANT, free=free, moments=moments)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_moments_that_do_not_fit_are_refused_and_others_are_copied(backend: str) -> None:
    raw, anchor, target = problem()
    good = some_moments()

    def run(moments: Moments, steps: int = 1) -> Moments:
        config = replace(CONSTANT, steps=steps)
        result = optimize(raw, anchor, target, PATCH, config, moments=moments, backend=backend)
        assert result.moments is not None
        return result.moments

    for bad in (
        replace(good, age=good.age[:1]),
        replace(good, square=good.square[:1]),
        replace(good, mean=good.mean * math.nan),
        replace(good, age=good.age - 6),
    ):
        with pytest.raises(ValueError, match="moments must be"):
            run(bad)
    exact = Moments(good.mean.double().requires_grad_(), good.square.double(), good.age.long())
    found, expected = run(exact), run(good)
    assert (found.mean.dtype, found.age.dtype) == (torch.float32, torch.int32)
    torch.testing.assert_close(found.mean, expected.mean)
    untouched = run(good, steps=0)
    assert torch.equal(untouched.mean, good.mean)
    untouched.mean.add_(1)
    assert not torch.equal(untouched.mean, good.mean)
