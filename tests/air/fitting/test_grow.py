"""Fitting with a budget: the budget is kept, growing pays, and the result is what it says."""

import numpy as np
import pytest
import torch

from air.fitting.fit import fit
from air.fitting.grow import GrowthConfig
from air.fitting.residual import GAIN, residual_peaks
from air.gaussians import activate
from air.metrics import psnr
from air.optimization.problem import Moments
from air.rendering.render import render


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """A crop of a photograph, 120 x 150 x 3."""
    data = pytest.importorskip("skimage.data", reason="the photograph comes with scikit-image")
    return np.ascontiguousarray(data.astronaut()[40:160, 150:300])


def test_growing_beats_a_grid_of_the_same_size_and_steps(photograph: np.ndarray) -> None:
    grid = fit(photograph, steps=60, patch_size=4)
    grown = fit(photograph, num_gaussians=len(grid.gaussians), steps=60)
    assert len(grown.gaussians) <= len(grid.gaussians)
    assert grown.trajectory.psnr[-1] > grid.trajectory.psnr[-1] + 1


def test_the_result_renders_to_its_psnr(photograph: np.ndarray) -> None:
    result = fit(photograph, num_gaussians=700, steps=20)
    target = torch.from_numpy(photograph).permute(2, 0, 1) / 255
    picture = render(result.gaussians, result.height, result.width, backend="reference")
    assert psnr(picture, target) == pytest.approx(result.trajectory.psnr[-1], abs=5e-3)
    assert len(result.gaussians) == len(result.raw) == len(result.anchor)


def test_moments_survive_growth_and_are_worth_a_decibel(
    photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = fit(photograph, num_gaussians=2000, steps=20).trajectory.psnr[-1]
    monkeypatch.setattr(Moments, "__getitem__", lambda self, order: Moments.fresh(self.mean[order]))
    forgotten = fit(photograph, num_gaussians=2000, steps=20).trajectory.psnr[-1]
    assert kept > forgotten + 1


@pytest.mark.parametrize("fraction", [0.42, 0.9, 1.0])
@pytest.mark.parametrize("growths", [0, 1, 2, 4])
def test_the_phases_have_all_steps_and_no_more(growths: int, fraction: float) -> None:
    for steps in range(40):
        phases = GrowthConfig(growths=growths, growth_fraction=fraction).phases(steps)
        assert len(phases) == growths + 1
        assert sum(phases) == steps
        assert min(phases) >= 0


@pytest.mark.parametrize("steps", [0, 1, 7, 50])
@pytest.mark.parametrize("growths", [0, 1, 4])
def test_every_step_is_reported_once(photograph: np.ndarray, steps: int, growths: int) -> None:
    seen: dict[int, float] = {}
    result = fit(
        photograph,
        steps,
        num_gaussians=300,
        growth=GrowthConfig(growths=growths),
        on_step=lambda step, loss, psnr: seen.update({step: psnr}),
    )
    assert len(result.trajectory.psnr) == steps + 1
    assert sorted(seen) == list(range(steps + 1))
    assert seen[steps] == result.trajectory.psnr[-1]


@pytest.mark.parametrize("budget", [1, 2, 5, 50, 5000])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (33, 9)])
def test_the_budget_is_never_passed(budget: int, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    result = fit(image, num_gaussians=budget, steps=4)
    assert 1 <= len(result.gaussians) <= budget
    assert np.isfinite(result.trajectory.loss).all()


def test_peaks_of_the_residual_become_gaussians_largest_first() -> None:
    start = residual_peaks(torch.ones(3, 1, 1), 7, 1)[0].repeat(4, 1)
    centres = torch.tensor([[3, 4], [5, 7], [30, 12], [32, 40]])  # two of them in one patch of 7 x 7
    colours = torch.tensor([[0.2, -0.1, 0.1], [0.5, 0.5, 0.5], [-0.4, 0.1, 0.1], [0.1, 0.0, 0.0]])
    true = activate(start, torch.zeros(4, 2), 7)
    residual = render(type(true)(centres.float(), true.scale, true.angle, colours), 47, 36)
    raw, anchor = residual_peaks(residual, 7, 4)
    found = activate(raw, anchor, 7)
    order = [1, 2, 0, 3]
    torch.testing.assert_close(found.xy, centres[order].float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.colour, GAIN * colours[order], rtol=0, atol=5e-3)


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (3, 3), (10_000, 20 * 30)])
def test_as_many_gaussians_are_added_as_asked_for_and_none_without_residual(count: int, expected: int) -> None:
    noise = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0))
    assert len(residual_peaks(noise, 5, count)[0]) == expected
    assert len(residual_peaks(torch.zeros(3, 20, 30), 5, count)[0]) == 0


def test_threads_do_not_change_the_result(photograph: np.ndarray) -> None:
    one, two = (fit(photograph, num_gaussians=500, steps=12, threads=threads) for threads in (1, 2))
    assert torch.equal(one.raw, two.raw)


def test_wrong_options_are_refused(photograph: np.ndarray) -> None:
    with pytest.raises(ValueError, match="num_gaussians"):
        fit(photograph, num_gaussians=0)
    with pytest.raises(ValueError, match="start_fraction"):
        GrowthConfig(start_fraction=0)


@pytest.mark.parametrize("growths", [1, 2, 4])
def test_the_first_growth_is_before_the_first_step(photograph: np.ndarray, growths: int) -> None:
    config = GrowthConfig(growths=growths)
    assert config.phases(30)[0] == 0
    start = fit(photograph, num_gaussians=600, steps=0, growth=GrowthConfig(growths=0)).trajectory.psnr[0]
    assert fit(photograph, num_gaussians=600, steps=30, growth=config).trajectory.psnr[0] > start + 0.5


def test_round_gaussians_become_narrower_with_every_growth() -> None:
    config = GrowthConfig(growths=4, first_raw_scale=-2.0, last_raw_scale=-5.0)
    assert [config.raw_scale(growth) for growth in (1, 2, 3, 4)] == [-2.0, -3.0, -4.0, -5.0]
    assert GrowthConfig(growths=1, first_raw_scale=-2.0).raw_scale(1) == -2.0
    with pytest.raises(ValueError, match="last_raw_scale"):
        GrowthConfig(last_raw_scale=float("nan"))


def test_a_step_is_reported_once_whether_or_not_gaussians_follow(photograph: np.ndarray) -> None:
    seen: list[int] = []
    result = fit(photograph, 20, num_gaussians=500, on_step=lambda step, loss, psnr: seen.append(step))
    assert seen == list(range(21))
    assert np.isfinite(result.trajectory.loss).all()
