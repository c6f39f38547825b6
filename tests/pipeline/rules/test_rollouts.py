"""`air distill --rule`: rows have their documented meaning, depend on image and plan alone, and any tool reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from air.fitting.grow import GrowthConfig
from air.fitting.rollout import CreditConfig
from air.optimization.rule import Adam, directions_of
from air.optimization.rule_file import save_rule
from jobs.cli import main
from jobs.distill_rule import distill_rule
from jobs.shard import shard
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.errors import PlanMismatchError, Reason
from pipeline.formats import tables
from pipeline.rules.config import DistillRuleConfig, RollOutConfig
from pipeline.rules.draw import cut, draw_fit, fraction_for, run_fit
from pipeline.rules.reference import fresh_rule
from pipeline.storage.open import open_storage
from pipeline.work.audit import verify
from pipeline.work.manifest import read_manifests, read_quarantine

INLINE = RunnerConfig(executor="inline")
QUICK = DistillRuleConfig(fits=2, max_steps=20, min_pixels_per_gaussian=20, samples=300, crop=64)


def read_rows(folder: Path) -> pa.Table:
    """All rows that manifests name, in a fixed order."""
    files = [folder / file.path for manifest in read_manifests(open_storage(folder)) for file in manifest.files]
    return pa.concat_tables([pq.read_table(file) for file in sorted(files)]).sort_by(
        [("key", "ascending"), ("fit", "ascending")]
    )


@pytest.fixture(scope="module")
def roll_outs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rule") / "roll-outs"
    distill_rule(str(shards), str(folder), QUICK, INLINE)
    return folder


def test_a_row_is_the_fit_that_its_columns_describe(roll_outs: Path, photographs: Path) -> None:
    """Directions follow from the stored features, and the untrained rule's moves are Adam's cautious direction."""
    table = read_rows(roll_outs)
    assert table.schema.equals(tables.ROLL_OUTS, check_metadata=False)
    assert table.num_rows == 8
    for row in table.to_pylist():
        assert 8 <= row["steps"] <= 20
        assert len(row["loss"]) == len(row["psnr"]) == row["steps"] + 1
        assert row["psnr"][-1] > row["psnr"][0]
        assert row["num_gaussians"] <= row["height"] * row["width"] / 20 + 1
        lists = [np.array(row[name], np.float32) for name in ("features", "move", "credit", "curvature")]
        assert [array.shape for array in lists] == [(row["samples"], size) for size in (52, 8, 8, 8)]
        assert len(row["update"]) == row["samples"]
        assert set(row["update"]) <= set(range(row["steps"]))
        cautious, _, _ = directions_of(torch.from_numpy(lists[0]))
        torch.testing.assert_close(torch.from_numpy(lists[1]), cautious)
    assert len(set(table["seed"].to_pylist())) == 8


def test_the_untrained_rule_takes_the_trajectory_of_the_cautious_adam(photographs: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (40, 56, 3)).astype(np.uint8)
    draw = draw_fit(40, 56, QUICK, 5)
    by_rule, by_adam = (run_fit(rgb, draw, rule, QUICK, 1.0).psnr for rule in (fresh_rule(0), Adam(0.0)))
    np.testing.assert_allclose(by_rule, by_adam, atol=1e-3)


def test_another_run_and_other_shards_give_the_same_values(
    shards: Path, photographs: Path, roll_outs: Path, tmp_path: Path
) -> None:
    distill_rule(str(shards), str(tmp_path / "again"), QUICK, INLINE)
    assert read_rows(tmp_path / "again").equals(read_rows(roll_outs))
    shard([str(photographs)], str(tmp_path / "shards"), ShardConfig(max_count=3), INLINE)
    distill_rule(str(tmp_path / "shards"), str(tmp_path / "other"), QUICK, INLINE)
    assert read_rows(tmp_path / "other").drop_columns("shard").equals(read_rows(roll_outs).drop_columns("shard"))


def test_ray_gives_the_same_values(shards: Path, roll_outs: Path, tmp_path: Path, local_ray: None) -> None:
    distill_rule(str(shards), str(tmp_path / "ray"), QUICK, RunnerConfig(executor="ray", workers=2))
    assert read_rows(tmp_path / "ray").equals(read_rows(roll_outs))


def test_a_rule_from_a_file_is_held_to_its_checksum(shards: Path, tmp_path: Path) -> None:
    rule = fresh_rule(1)
    torch.nn.init.normal_(rule.last.bias, std=0.1)
    card = save_rule(tmp_path / "rule.safetensors", rule)
    config = QUICK.model_copy(update={"rule": str(tmp_path / "rule.safetensors"), "fits": 1})
    distill_rule(str(shards), str(tmp_path / "out"), config, INLINE)
    assert set(read_rows(tmp_path / "out")["rule"].to_pylist()) == {f"rule:{card.sha256[:12]}"}
    torch.nn.init.normal_(rule.last.bias, std=0.1)
    save_rule(tmp_path / "rule.safetensors", rule)
    with pytest.raises(PlanMismatchError, match=f"rule: rule:{card.sha256[:12]}"):
        distill_rule(str(shards), str(tmp_path / "out"), config, INLINE)


def test_an_image_that_teaches_nothing_is_quarantined_with_a_reason(pictures: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(pictures / "black.png")
    Image.new("RGB", (40, 3), (9, 200, 1)).save(pictures / "thin.png")
    shard([str(pictures)], str(tmp_path / "shards"), ShardConfig(), INLINE)
    tally = distill_rule(str(tmp_path / "shards"), str(tmp_path / "out"), QUICK, INLINE)
    assert tally.summary["images"] == 6
    reasons = {row["reason"] for row in read_quarantine(open_storage(tmp_path / "out"))}
    assert reasons == {Reason.NON_FINITE, Reason.TOO_SMALL}
    assert not list(verify(open_storage(tmp_path / "out")))


def test_every_command_about_folders_knows_roll_outs(roll_outs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = {}
    for command in ("verify", "status", "gc", "stats"):
        assert main([command, str(roll_outs)]) == 0
        said[command] = capfd.readouterr().out
    assert "8 rows" in said["verify"]
    assert "complete" in said["status"]
    assert "removed 0 files" in said["gc"]
    assert "roll-outs" in said["stats"]
    assert main(["stats", str(roll_outs), "--sql", "select count(*) as n from samples", "--format", "csv"]) == 0
    assert capfd.readouterr().out.split() == ["n", str(sum(read_rows(roll_outs)["samples"].to_pylist()))]
    assert main(["train", str(roll_outs), str(roll_outs.parent / "run"), "--executor", "inline"]) == 1
    assert "is the output of `air distill --rule`" in capfd.readouterr().err


def test_duckdb_reads_the_vectors(roll_outs: Path) -> None:
    (file, *_) = sorted((roll_outs / "data").glob("*.parquet"))
    features, moves = duckdb.sql(f"select len(features[1]), len(move[1]) from '{file}'").fetchall()[0]
    assert (features, moves) == (52, 8)


@pytest.mark.parametrize("turn", range(8))
def test_a_turn_is_what_its_bits_say(turn: int) -> None:
    rgb = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)
    draw = replace(draw_fit(16, 16, RollOutConfig(crop=8), 0), top=1, left=2, height=4, width=5, turn=turn)
    turned = cut(rgb, draw)
    y, x = 3, 1  # a pixel of the crop
    row, column = (3 - y if turn & 2 else y), (4 - x if turn & 1 else x)
    row, column = (column, row) if turn & 4 else (row, column)
    assert (turned[row, column] == rgb[1 + y, 2 + x]).all()


def test_fits_are_drawn_within_their_bounds_and_store_about_as_many_samples_as_asked_for() -> None:
    config = RollOutConfig()
    draws = [draw_fit(512, 768, config, seed) for seed in range(300)]
    assert {draw.height for draw in draws} == {128}
    assert min(draw.steps for draw in draws) >= 8
    assert max(draw.steps for draw in draws) <= 100
    gaussians = [draw.num_gaussians for draw in draws]
    assert min(gaussians) >= 83
    assert max(gaussians) <= 2926
    # Log-uniform: half of them lie below the geometric mean.
    assert abs(np.mean(np.array(gaussians) < np.sqrt(83 * 2926)) - 0.5) < 0.1
    assert abs(np.mean([draw.steps < np.sqrt(8 * 150) for draw in draws]) - 0.5) < 0.1
    rgb = np.random.default_rng(0).integers(0, 255, (512, 768, 3)).astype(np.uint8)
    draw = next(draw for draw in draws if draw.steps * draw.num_gaussians > 20_000)
    result = run_fit(rgb, draw, fresh_rule(0), config, fraction_for(4000, draw, config.growth()))
    assert len(result) == pytest.approx(4000, rel=0.1)


def test_the_defaults_are_those_of_the_library() -> None:
    assert RollOutConfig().growth() == GrowthConfig()
    assert RollOutConfig().credit() == CreditConfig()


def test_roll_outs_grow_and_give_credit_as_the_library_does_by_default() -> None:
    assert RollOutConfig().growth() == GrowthConfig()
    assert RollOutConfig().credit() == CreditConfig()
