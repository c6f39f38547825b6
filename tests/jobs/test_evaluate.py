"""`air evaluate`: figures follow from their definitions, baselines stand beside them, bad images are skipped."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from air.fitting.grid import grid_initialization
from air.gaussians import activate, anchors
from air.metrics import ms_ssim, psnr
from air.optimization.optimize import optimize
from air.optimization.settings import refinement
from air.predictor.checkpoint import save_checkpoint
from air.predictor.network import build
from air.rendering.render import render
from air.stages.control import StageControl, active_patches
from jobs.cli import main
from jobs.encode import encode
from jobs.evaluate import evaluate
from jobs.shard import shard
from pipeline.bulk.encode import EncodeConfig
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.errors import ConfigError, JobFailedError, StorageError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.formats import tables
from pipeline.storage.local import LocalStorage

INLINE = RunnerConfig(executor="inline")


@pytest.fixture
def one_picture(photographs: Path) -> Path:
    return photographs / "astronaut.png"


def read_image(path: Path) -> torch.Tensor:
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = build("compact", {"patch_size": 6, "num_stages": 2, "channels": 4, "depth": 1, "passes": 1})
    save_checkpoint(tmp_path / "net.safetensors", network)
    return tmp_path / "net.safetensors"


def test_the_figures_of_a_grid_are_those_of_its_render(one_picture: Path) -> None:
    config = EvaluateConfig(predictor="grid", patch_size=6, stages=1, refine=(0, 5), baseline=False)
    predicted, refined = evaluate([str(one_picture)], config).rows
    image = read_image(one_picture)
    _, height, width = image.shape
    bad = active_patches(torch.zeros_like(image), image, 6, StageControl())  # all patches except nearly black ones
    raw, anchor = grid_initialization(image, 6)[bad], anchors(height, width, 6)[bad]
    better = optimize(raw, anchor, image, 6, refinement(5)).raw
    for row, numbers in ((predicted, raw), (refined, better)):
        drawn = render(activate(numbers, anchor, 6), height, width)
        assert row["psnr"] == pytest.approx(psnr(drawn, image), abs=1e-4)
        assert row["ms_ssim"] == pytest.approx(ms_ssim(drawn, image), abs=1e-5)
        assert row["num_gaussians"] == sum(row["gaussians"]) == len(raw)
    assert refined["psnr"] > predicted["psnr"] + 0.3
    assert predicted["refine_seconds"] == 0 < refined["refine_seconds"]


def test_refinement_moves_the_gaussians_of_all_stages(one_picture: Path) -> None:
    config = EvaluateConfig(predictor="grid", stages=3, refine=(0, 10, 40), baseline=False)
    rows = evaluate([str(one_picture)], config).rows
    assert len(rows[0]["gaussians"]) == 3
    values = [row["psnr"] for row in rows]
    assert values[1] > values[0]
    assert values[2] > values[1] + 0.5


def test_a_network_stands_beside_the_grid_and_a_plain_grid_of_as_many(one_picture: Path, checkpoint: Path) -> None:
    rows = evaluate([str(one_picture)], EvaluateConfig(predictor=str(checkpoint), refine=(0,))).rows
    network, grid, plain = rows
    assert network["predictor"].startswith("compact:")
    assert [grid["predictor"], plain["predictor"]] == ["grid", "plain grid"]
    assert (network["patch_size"], grid["patch_size"]) == (6, 6)
    assert len(network["gaussians"]) == len(grid["gaussians"]) == 2
    assert len(plain["gaussians"]) == 1
    assert 0.6 < plain["num_gaussians"] / network["num_gaussians"] < 1.6


@pytest.mark.parametrize(
    ("asked", "predictor"), [({}, "compact"), ({"patch_size": 6}, "grid"), ({"stages": 9}, "grid")]
)
def test_by_default_the_shipped_network_where_it_suits(one_picture: Path, asked: dict, predictor: str) -> None:
    rows = evaluate([str(one_picture)], EvaluateConfig(refine=(0,), **asked)).rows
    assert rows[0]["predictor"].partition(":")[0] == predictor


def test_a_budget_bounds_the_gaussians_of_an_image(one_picture: Path) -> None:
    config = EvaluateConfig(predictor="grid", gaussians=300, refine=(0,), baseline=False)
    (row,) = evaluate([str(one_picture)], config).rows
    assert row["num_gaussians"] == 300


def test_bad_images_are_named_and_passed_over(
    one_picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "good.png").write_bytes(one_picture.read_bytes())
    (folder / "broken.png").write_bytes(one_picture.read_bytes()[:500])
    (folder / "empty.jpg").write_bytes(b"")
    out = tmp_path / "figures.parquet"
    options = ["--predictor", "grid", "--refine", "0,2", "--no-baseline", "--output", str(out)]
    assert main(["evaluate", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    assert "means over 1 image " in printed
    assert "2 skipped (" in printed
    assert "empty 1" in printed
    assert {name for name in ("broken.png", "empty.jpg") if name in caplog.text} == {"broken.png", "empty.jpg"}
    table = pq.read_table(out)
    assert table.schema.equals(tables.EVALUATION, check_metadata=False)
    assert table["refine_steps"].to_pylist() == [0, 2]
    assert table.schema.metadata[b"air.model"] == b"grid"
    assert json.loads(table.schema.metadata[b"air.config"])["refine"] == [0, 2]


def test_without_a_usable_image_the_command_fails(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(JobFailedError, match=r"no image could be used: 1 skipped \(empty 1\)"):
        evaluate([str(tmp_path / "empty.jpg")], EvaluateConfig(predictor="grid"))


def test_shards_are_evaluated_as_the_pictures_in_them(photographs: Path, tmp_path: Path) -> None:
    shard([str(photographs)], str(tmp_path / "shards"), ShardConfig(max_count=3), RunnerConfig(executor="inline"))
    config = EvaluateConfig(predictor="grid", refine=(0,), baseline=False, limit=3)
    apart, packed = (evaluate([str(given)], config).rows for given in (photographs, tmp_path / "shards"))
    assert len(apart) == 3
    assert [(row["key"], row["psnr"]) for row in apart] == [(row["key"], row["psnr"]) for row in packed]


@pytest.mark.parametrize("name", ["grow", "~/grow"])
def test_an_unknown_predictor_is_named_as_it_was_typed(
    one_picture: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluation measures predictions, so it takes no "grow"."""
    assert main(["evaluate", str(one_picture), "--predictor", name]) == 1
    assert f"unknown predictor '{name}': give grid, compact or a file NAME.safetensors" in capsys.readouterr().err


def test_the_output_of_another_job_is_refused(photographs: Path, tmp_path: Path) -> None:
    encode([str(photographs / "china.jpg")], str(tmp_path / "out"), EncodeConfig(steps=0, stored_steps=0), INLINE)
    with pytest.raises(ConfigError, match=r"output of `air encode`, which has no original images; give the images"):
        evaluate([str(tmp_path / "out")], EvaluateConfig(predictor="grid"))


@pytest.mark.parametrize("output", ["astronaut.png/x.parquet", "folder.parquet"])
def test_an_output_that_cannot_be_written_is_found_before_measuring(
    one_picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    shutil.copy(one_picture, tmp_path)
    (tmp_path / "folder.parquet").mkdir()
    monkeypatch.setattr("jobs.measuring.find_pictures", lambda *_: pytest.fail("it measures"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StorageError, match=output):
        evaluate([str(one_picture)], EvaluateConfig(predictor="grid"), str(tmp_path / output))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_table_that_cannot_be_delivered_is_printed_and_kept(
    one_picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: LocalStorage, local_file: Path, path: str) -> None:
        raise StorageError(f"cannot copy {local_file} to {self.uri(path)}: No space left on device")

    monkeypatch.setattr(LocalStorage, "upload", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options = ["--predictor", "grid", "--refine", "0", "--no-baseline", "--output", str(tmp_path / "out" / "x.parquet")]
    assert main(["evaluate", str(one_picture), *options]) == 1
    said = capsys.readouterr()
    assert "means over 1 image " in said.out
    assert "No space left" in said.err
    kept = re.search(r"The file is kept as (\S+)", said.err)
    assert kept is not None
    assert len(pq.read_table(kept[1])) == 1


def test_the_output_is_a_parquet_file(one_picture: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.parquet"):
        evaluate([str(one_picture)], EvaluateConfig(predictor="grid"), str(tmp_path / "out"))
