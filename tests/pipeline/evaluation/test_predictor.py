"""Baselines of a predictor, and several predictors in one run."""

from pathlib import Path

import pytest
import torch

from air.predictor.checkpoint import load_checkpoint, save_checkpoint
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.predictor import evaluate, nearest_patch_size
from pipeline.inputs.pictures import find_pictures
from pipeline.predictors import find_predictor
from tests.support.networks import save_network


@pytest.mark.parametrize(("wanted", "expected"), [(1, 96), (256, 6), (9216, 1), (2304, 2), (1 << 40, 1)])
def test_the_nearest_grid_has_about_as_many_gaussians(wanted: int, expected: int) -> None:
    assert nearest_patch_size(96, 96, wanted) == expected


CONFIG = EvaluateConfig.model_validate({"refine": (0,), "baseline": False})


def test_several_predictors_take_turns_on_each_picture(photographs: Path, tmp_path: Path) -> None:
    grid, network = find_predictor("grid", 8), find_predictor(str(save_network(tmp_path / "net.safetensors")))
    rows = evaluate(find_pictures([str(photographs)]), [grid, network], CONFIG).rows
    assert [row["predictor"] for row in rows] == [grid.model, network.model] * 4
    assert [row["key"] for row in rows[::2]] == [row["key"] for row in rows[1::2]]
    (alone,) = evaluate(find_pictures([str(photographs)])[:1], [network], CONFIG).rows
    assert alone["psnr"] == rows[1]["psnr"]


def test_a_predictor_that_diverges_is_named_and_the_picture_has_no_rows(photographs: Path, tmp_path: Path) -> None:
    network, _ = load_checkpoint(save_network(tmp_path / "net.safetensors"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(float("nan"))
    save_checkpoint(tmp_path / "damaged.safetensors", network)
    damaged = find_predictor(str(tmp_path / "damaged.safetensors"))
    evaluation = evaluate(find_pictures([str(photographs)]), [find_predictor("grid", 8), damaged], CONFIG)
    assert evaluation.rows == []
    assert evaluation.diverged == {damaged.model: 4}
    assert evaluation.rejected == {"non_finite": 4}
