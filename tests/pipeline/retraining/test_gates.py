"""Gates: each one alone refuses a candidate that misses it, and says the numbers."""

from typing import Any

import pytest

from pipeline.config import build
from pipeline.errors import ConfigError
from pipeline.retraining.config import GatesConfig
from pipeline.retraining.gates import Gate, judge


def rows(predictor: str, psnr: list[float], ms_ssim: float = 0.9, seconds: float = 1.0) -> list[dict[str, Any]]:
    """Measurements of images a/0, a/1, ... and, from the eleventh on, b/10, ..."""
    return [
        {
            "predictor": predictor,
            "key": f"{'a' if number < 10 else 'b'}/{number}",
            "psnr": value,
            "ms_ssim": ms_ssim,
            "predict_seconds": seconds,
        }
        for number, value in enumerate(psnr)
    ]


def failing(measured: list[dict[str, Any]], champion: str | None = "old", **config: Any) -> dict[str, Gate]:
    """The gates that fail, by name."""
    gates = judge(measured, "new", champion, 0, "", GatesConfig.model_validate(config))
    return {gate.name: gate for gate in gates if not gate.passed}


OLD = [30.0 + number % 2 for number in range(20)]


def test_a_candidate_that_equals_the_champion_passes_by_default() -> None:
    assert failing([*rows("old", OLD), *rows("new", OLD)]) == {}


def test_the_mean_must_not_fall_and_the_gate_says_both_numbers() -> None:
    worse = [value - 0.05 for value in OLD]
    gate = failing([*rows("old", OLD), *rows("new", worse)])["psnr_change"]
    assert (gate.champion, gate.reached, gate.needed) == pytest.approx((30.5, 30.45, 30.5))
    assert gate.said == "mean PSNR, dB: 30.4500, needs >= 30.5000 (champion 30.5000)"
    assert failing([*rows("old", OLD), *rows("new", worse)], min_psnr_change=-0.06) == {}
    assert list(failing([*rows("old", OLD), *rows("new", OLD)], min_psnr_change=0.1)) == ["psnr_change"]


def test_ms_ssim_has_a_gate_of_its_own() -> None:
    measured = [*rows("old", OLD), *rows("new", OLD, ms_ssim=0.89)]
    assert list(failing(measured)) == ["ms_ssim_change"]
    assert list(failing(measured, min_ms_ssim_change=-0.02, min_ms_ssim=0.895)) == ["ms_ssim"]


def test_absolute_gates_hold_without_a_champion_and_changes_are_not_judged() -> None:
    measured = rows("new", OLD)
    assert failing(measured, champion=None) == {}
    bounds = {"min_psnr": 31, "min_ms_ssim": 0.95, "min_worst_psnr": 30.5, "max_predict_seconds": 0.5}
    found = failing(measured, champion=None, **bounds)
    assert list(found) == ["psnr", "ms_ssim", "worst_psnr", "seconds"]


def test_the_worst_images_are_those_of_each_predictor() -> None:
    """Five percent of 20 images are one image: 30 dB of the champion, 20 dB of the candidate, whose mean rises."""
    better = [value + 2 for value in OLD]
    better[7] = 20.0
    gate = failing([*rows("old", OLD), *rows("new", better)])["worst_psnr_change"]
    assert (gate.champion, gate.reached) == (30.0, 20.0)
    assert failing([*rows("old", OLD), *rows("new", better)], min_worst_psnr_change=-10) == {}
    assert "worst_psnr_change" in failing([*rows("old", OLD), *rows("new", better)], worst_share=0.06)  # two images


def test_a_slice_is_judged_by_itself() -> None:
    mixed = [value + 1 if number < 10 else value - 0.5 for number, value in enumerate(OLD)]
    measured = [*rows("old", OLD), *rows("new", mixed)]
    slices = {"first": "a/*", "second": "b/*"}
    gate = failing(measured, slices=slices, min_worst_psnr_change=-1)["slice second"]
    assert gate.said == "mean PSNR of 10 images b/*, dB: 30.0000, needs >= 30.4000 (champion 30.5000)"
    assert list(failing(measured, slices={"first": "a/*"}, min_worst_psnr_change=-1)) == []


def test_a_slice_without_images_fails() -> None:
    found = failing([*rows("old", OLD), *rows("new", OLD)], slices={"faces": "faces/*"})
    assert found["slice faces"].said == "no image of the frozen set has a key like faces/*"


def test_time_is_the_median_of_ratios() -> None:
    slow = rows("new", OLD, seconds=1.6)
    assert list(failing([*rows("old", OLD), *slow])) == ["seconds_ratio"]
    once = [*rows("new", OLD[:19]), *rows("new", OLD, seconds=50.0)[19:]]
    assert failing([*rows("old", OLD), *once]) == {}


def test_numbers_that_are_not_finite_and_files_that_cannot_be_made_fail() -> None:
    measured = [*rows("old", OLD), *rows("new", OLD)]
    gates = judge(measured, "new", "old", 3, "a.png: non_finite: scale 1", GatesConfig.model_validate({}))
    said = {gate.name: gate.said for gate in gates if not gate.passed}
    assert said == {
        "finite": "images for which its numbers are not finite: 3",
        "encodes": "encoding one image: a.png: non_finite: scale 1",
    }


def test_without_any_measurement_nothing_holds() -> None:
    found = failing([], min_psnr=1, slices={"all": "*"})
    assert {"psnr", "psnr_change", "ms_ssim_change", "worst_psnr_change", "slice all"} <= found.keys()
    assert found["psnr_change"].reached is None


@pytest.mark.parametrize(
    ("key", "value"), [("worst_share", 0), ("slices", {"a": ""}), ("min_ms_ssim", 2), ("max_predict_ratio", 0)]
)
def test_bounds_without_sense_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        build(GatesConfig, {key: value}, "gates")
