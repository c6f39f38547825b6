"""Fits by seconds: the model of a machine's pace."""

from __future__ import annotations

import time

import pytest
import torch

import air
from air.fitting import fit as fitting
from air.fitting.pace import Pace, measure_pace
from tests.support.cases import smooth_image


def test_steps_fill_the_seconds_and_no_more():
    pace = Pace(start=1e-7, pixel=2e-8, gaussian=3e-7)
    for seconds in (0.05, 0.3, 2.0):
        steps = pace.steps(seconds, 400_000, 28_000)
        assert steps == 1 or pace.seconds(steps, 400_000, 28_000) <= seconds
        assert pace.seconds(steps + 1, 400_000, 28_000) > seconds
    assert pace.steps(1e-9, 400_000, 28_000) == 1


def test_the_pace_of_a_fit_of_known_cost_is_found():
    """A stand-in that sleeps as the model says, so that only the clock is noisy."""
    true = Pace(start=3e-7, pixel=1e-8, gaussian=2e-7)

    def fit(picture: torch.Tensor, budget: int, steps: int) -> None:
        time.sleep(true.seconds(steps, picture.shape[1] * picture.shape[2], budget))

    found = measure_pace(fit)
    assert found.seconds(20, 65_536, 4096) == pytest.approx(true.seconds(20, 65_536, 4096), rel=0.3)
    assert found.gaussian == pytest.approx(true.gaussian, rel=0.5)


def test_a_fit_by_seconds_makes_the_steps_of_the_pace(monkeypatch: pytest.MonkeyPatch):
    image = smooth_image(48, 64)
    monkeypatch.setattr(fitting, "_pace", lambda *machine: Pace(0.0, 0.0, 1e-4))
    result = air.fit(image, seconds=0.1, num_gaussians=50)
    assert len(result.trajectory.psnr) == 20 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0.1, "steps": 3}, "seconds with num_gaussians alone"),
        ({"seconds": 0.1, "patch_size": 4}, "seconds with num_gaussians alone"),
        ({"seconds": 0.0}, "positive"),
        ({"seconds": float("nan")}, "positive"),
    ],
)
def test_seconds_that_do_not_fit_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        air.fit(smooth_image(16, 16), **options)
