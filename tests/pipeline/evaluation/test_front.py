"""The front: figures follow from their definitions, counts are equal, means and the front are arithmetic."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import air
from air.arguments import image_tensor
from air.defaults import COMPACT, GRID
from air.errors import CheckpointError
from air.gaussians import Gaussians, grid_shape
from air.loss.reference import loss
from air.metrics import HIGHEST_PSNR
from air.optimization.optimize import optimize
from air.optimization.rule_file import save_rule
from air.optimization.settings import refinement
from air.predictor.load import load_predictor
from air.stages.loop import all_predicted
from air.stages.predict import predict
from pipeline.errors import ConfigError
from pipeline.evaluation.config import FrontConfig
from pipeline.evaluation.front import (
    Front,
    GrowingRule,
    Method,
    clock_of,
    evaluate_front,
    means,
    measure_methods,
    on_front,
)
from pipeline.inputs.pictures import find_pictures
from pipeline.predictors import find_predictor
from pipeline.rules.reference import fresh_rule


def exact_figures(gaussians: Gaussians, image: torch.Tensor) -> tuple[float, float]:
    """PSNR and loss of the reference renderer's picture, in float64."""
    _, height, width = image.shape
    drawn = air.render(gaussians.to(torch.float64), height, width, backend="reference")
    error = float((drawn.clamp(0, 1) - image.double()).square().mean())
    return -10 * np.log10(error), float(loss(drawn, image.double()))


def read_image(path: Path) -> torch.Tensor:
    return image_tensor(np.asarray(Image.open(path).convert("RGB")))


def test_figures_are_those_of_the_fits_and_refinements_that_the_methods_name(photographs: Path) -> None:
    config = FrontConfig(steps=(0, 6), rules=("adam", "shipped"), gaussians=400, limit=1)
    path = photographs / "astronaut.png"
    rows = evaluate_front(find_pictures([str(path)]), Front.find(find_predictor(COMPACT), config)).rows
    network = rows[0]["method"]
    assert network.startswith("compact:")
    methods = [network, "growing, adam", "growing, shipped", "plain grid"]
    assert [(row["steps"], row["method"]) for row in rows] == [(steps, name) for steps in (0, 6) for name in methods]

    image = read_image(path)
    predictor = load_predictor(COMPACT)
    raw, anchor = all_predicted(predict(image, predictor, 4, budget=400))
    assert 0 < len(raw) <= 400
    for row in rows:
        steps = row["steps"]
        if row["method"] == network:
            refined = raw
            if steps:
                refined = optimize(raw, anchor, image, predictor.patch_size, refinement(steps)).raw
            expected = air.gaussians.activate(refined, anchor, predictor.patch_size)
        elif row["method"] == "plain grid":
            expected = air.fit(image, steps, patch_size=patch_of(row, image)).gaussians
        else:
            rule = row["method"].removeprefix("growing, ")
            expected = air.fit(image, steps, num_gaussians=len(raw), rule=rule).gaussians
            assert row["num_gaussians"] == len(raw)
        psnr, exact_loss = exact_figures(expected, image)
        assert row["num_gaussians"] == len(expected)
        assert row["psnr"] == pytest.approx(psnr, abs=2e-3)
        assert row["loss"] == pytest.approx(exact_loss, rel=1e-3)
        assert 0 < row["ms_ssim"] < 1
        assert row["seconds"] > 0
        assert row["cpu_seconds"] > 0


def patch_of(row: dict, image: torch.Tensor) -> int:
    """The patch size whose grid has as many patches as the row has Gaussians."""
    (found,) = (size for size in range(2, 40) if np.prod(grid_shape(*image.shape[1:], size)) == row["num_gaussians"])
    return found


def test_without_a_predictor_the_number_of_gaussians_is_the_one_given_or_follows_from_the_pixels() -> None:
    image = torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(0))
    for given, expected in ((None, 40 * 48 // 16), (77, 77)):
        front = Front.find(None, FrontConfig(gaussians=given, rules=("adam",), baseline=False))
        (row,) = measure_methods("key", image, front.methods(image), [0], 1)
        assert (row["method"], row["num_gaussians"]) == ("growing, adam", expected)


def test_a_picture_without_bad_patches_is_measured_too() -> None:
    """Nothing is predicted for a black picture; the other methods may use one Gaussian."""
    image = torch.zeros(3, 32, 32)
    front = Front.find(find_predictor(GRID), FrontConfig(rules=("adam",)))
    rows = measure_methods("black", image, front.methods(image), [0, 3], 1)
    assert [row["num_gaussians"] for row in rows if row["method"] == "grid"] == [0, 0]
    assert all(row["num_gaussians"] <= 1 for row in rows)
    assert all(row["psnr"] == HIGHEST_PSNR for row in rows if row["method"] == "grid")


def test_time_is_that_of_the_method_alone_and_cpu_time_does_not_count_waiting() -> None:
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    start = air.fit(image, 0, num_gaussians=5).gaussians

    def wait(image: torch.Tensor, steps: int) -> Gaussians:
        time.sleep(0.2)
        return start

    (row,) = measure_methods("key", image, [Method("waiting", wait)], [1], 1)
    assert 0.2 <= row["seconds"] < 2
    assert row["cpu_seconds"] < 0.1


def test_rules_are_named_by_their_weights_and_each_takes_part_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_rule(tmp_path / f"{name}.safetensors", fresh_rule(3))
    save_rule(tmp_path / "other.safetensors", fresh_rule(4))
    one, two, other = (str(tmp_path / f"{name}.safetensors") for name in ("one", "two", "other"))
    names = [GrowingRule.find(name).name for name in ("auto", "adam", "shipped", one, other)]
    assert names[:3] == ["auto", "adam", "shipped"]
    assert all(name.startswith("rule:") for name in names[3:])
    assert len(set(names)) == 5
    models = Front.find(None, FrontConfig(rules=("shipped", other), baseline=True)).models()
    assert models == {
        "growing, shipped": GrowingRule.find("shipped").model,
        f"growing, {names[4]}": names[4],
        "plain grid": "grid",
    }
    with pytest.raises(ConfigError, match=r"one\.safetensors is rule:\w{12}, and so is another"):
        Front.find(None, FrontConfig(rules=("adam", one, two)))
    with pytest.raises(CheckpointError, match=r"missing\.json"):
        Front.find(None, FrontConfig(rules=(str(tmp_path / "missing.safetensors"),)))


def row(method: str, steps: int, psnr: float, seconds: float, cpu_seconds: float = 0.1) -> dict:
    figures = {"psnr": psnr, "ms_ssim": psnr / 100, "loss": 1 / psnr}
    return {"method": method, "steps": steps, "num_gaussians": 7, **figures} | {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def test_means_are_over_images_and_keep_the_order_of_methods() -> None:
    rows = [row("z", 5, 30, 1.0), row("a", 5, 20, 2.0), row("z", 0, 10, 0.5), row("a", 5, 24, 4.0), row("z", 5, 33, 3)]
    mean = means(rows)
    assert list(mean) == [("z", 0), ("z", 5), ("a", 5)]
    assert mean["a", 5]["psnr"] == 22
    assert mean["a", 5]["seconds"] == 3
    assert mean["z", 5]["loss"] == pytest.approx((1 / 30 + 1 / 33) / 2)


def test_the_front_is_what_nothing_beats_in_both() -> None:
    rows = [
        row("a", 0, 20, 1.0, 9.0),  # first
        row("b", 0, 19, 2.0, 8.0),  # beaten in both
        row("b", 1, 20, 3.0, 7.0),  # as good as the first, later
        row("b", 2, 25, 3.0, 6.0),
        row("c", 0, 24, 3.0, 5.0),  # in the same time with less
        row("c", 1, 26, 9.0, 4.0),
    ]
    assert on_front(means(rows), "seconds") == {("a", 0), ("b", 2), ("c", 1)}
    assert on_front(means(rows), "cpu_seconds") == {("c", 1)}


def test_one_thread_is_timed_by_the_core_and_more_by_the_wall() -> None:
    assert [clock_of(threads) for threads in (1, 2)] == ["cpu_seconds", "seconds"]
