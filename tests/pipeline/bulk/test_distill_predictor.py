"""Distilling with a trained predictor: rows hold its predictions, files name it, and snapshots do not mix."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from air import defaults
from air.optimization.settings import refinement
from air.predictor.checkpoint import load_checkpoint, save_checkpoint
from air.predictor.network import build
from air.rendering.render import render
from air.stages.loop import all_gaussians, run_stages
from jobs.cli import main
from jobs.distill import distill
from jobs.shard import shard
from pipeline.bulk.distill import DistillConfig
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.errors import ConfigError, PlanMismatchError
from pipeline.formats import images
from pipeline.formats.targets import gaussians_of
from pipeline.identity import checksum_of
from pipeline.storage.open import open_storage
from pipeline.work.manifest import read_manifests
from pipeline.work.plan import read_plan

INLINE = RunnerConfig(executor="inline")


def save_network(path: Path, seed: int) -> Path:
    """Saves a network whose corrections are large enough to matter."""
    torch.manual_seed(seed)
    network = build("compact", {"patch_size": 6, "num_stages": 2, "channels": 4, "depth": 1, "passes": 1})
    for head in network.heads:  # type: ignore[union-attr]
        torch.nn.init.normal_(head.weight, std=0.05)
    save_checkpoint(path, network)
    return path


@pytest.fixture(scope="module")
def shards(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill-predictor") / "shards"
    shard([str(photographs / "chelsea.jpg")], str(folder), ShardConfig(), INLINE)
    return folder


def settings(checkpoint: Path, **more) -> DistillConfig:
    return DistillConfig.model_validate({"patch_size": 6, "steps": 5, "predictor": str(checkpoint), **more})


def only_file(targets: Path) -> Path:
    (manifest,) = read_manifests(open_storage(targets))
    return targets / manifest.files[0].path


def test_targets_hold_what_the_checkpoint_predicts(shards: Path, tmp_path: Path) -> None:
    checkpoint = save_network(tmp_path / "net.safetensors", seed=0)
    distill(str(shards), str(tmp_path / "targets"), settings(checkpoint), INLINE)
    (row,) = pq.read_table(only_file(tmp_path / "targets")).to_pylist()
    image = torch.from_numpy(images.decode_png(row["image"]).astype(np.float32) / 255).permute(2, 0, 1).contiguous()
    network, _ = load_checkpoint(checkpoint)
    # In use a network sees the canvas of its own predictions, so its targets are made on that canvas.
    stages = list(run_stages(image, network, [refinement(5)] * 2, canvas="predicted"))
    assert row["gaussians"] == [len(stage) for stage in stages]
    for which in ("predicted", "target"):
        expected = all_gaussians(stages, 6, which)
        assert row[f"{which}_x"] == pytest.approx(expected.xy[:, 0].tolist(), abs=1e-4)
        assert row[f"{which}_scale_1"] == pytest.approx(expected.scale[:, 0].tolist(), abs=1e-4)


def test_files_and_plan_name_the_weights(shards: Path, tmp_path: Path) -> None:
    checkpoint = save_network(tmp_path / "net.safetensors", seed=0)
    distill(str(shards), str(tmp_path / "targets"), settings(checkpoint), INLINE)
    checksum = checksum_of(checkpoint)
    model = pq.read_metadata(only_file(tmp_path / "targets")).metadata[b"air.model"].decode()
    assert model == f"compact:{checksum[:12]}"
    plan = read_plan(open_storage(tmp_path / "targets")).config
    assert checksum in plan["predictor"]
    assert (plan["stages"], plan["canvas"]) == (2, "predicted")


def test_another_snapshot_under_the_same_name_needs_another_folder(shards: Path, tmp_path: Path) -> None:
    checkpoint = save_network(tmp_path / "net.safetensors", seed=0)
    distill(str(shards), str(tmp_path / "targets"), settings(checkpoint), INLINE)
    before = only_file(tmp_path / "targets").read_bytes()
    save_network(checkpoint, seed=1)
    with pytest.raises(PlanMismatchError, match="predictor: compact:"):
        distill(str(shards), str(tmp_path / "targets"), settings(checkpoint), INLINE)
    assert only_file(tmp_path / "targets").read_bytes() == before


def test_a_checkpoint_may_move(shards: Path, tmp_path: Path) -> None:
    checkpoint = save_network(tmp_path / "net.safetensors", seed=0)
    distill(str(shards), str(tmp_path / "targets"), settings(checkpoint), INLINE)
    (tmp_path / "elsewhere").mkdir()
    for name in ("net.safetensors", "net.json"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    moved = settings(tmp_path / "elsewhere" / "net.safetensors")
    assert distill(str(shards), str(tmp_path / "targets"), moved, INLINE).summary["views"] == 1


def test_the_shipped_network_is_the_default_where_it_suits(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settled(**settings) -> DistillConfig:
        config = DistillConfig.model_validate(settings)
        return config.settled(config.find_predictor())

    assert (settled().predictor, settled().stages, settled().canvas) == ("compact", 4, "target")
    assert settled(predictor="compact").canvas == "predicted"
    assert settled(stages=2).predictor == "compact"
    for unsuited in ({"patch_size": 8}, {"stages": 5}):
        assert (settled(**unsuited).predictor, settled(**unsuited).canvas) == ("grid", "target")
    distill(str(shards), str(tmp_path / "targets"), DistillConfig(steps=(1,), stages=1), INLINE)
    assert checksum_of(defaults.COMPACT_PATH) in read_plan(open_storage(tmp_path / "targets")).config["predictor"]
    monkeypatch.setattr(defaults, "COMPACT_PATH", tmp_path / "none.safetensors")
    assert (settled().predictor, settled().stages, settled().canvas) == ("grid", 4, "target")


def test_joint_targets_are_worth_decibels_at_equal_gaussians(shards: Path, tmp_path: Path) -> None:
    """By default, what a named network predicts stays the canvas, and the Gaussians of all stages move together."""
    checkpoint = save_network(tmp_path / "net.safetensors", seed=0)
    config = DistillConfig(patch_size=6, predictor=str(checkpoint))
    distill(str(shards), str(tmp_path / "targets"), config, INLINE)
    plan = read_plan(open_storage(tmp_path / "targets")).config
    assert (plan["canvas"], plan["steps"], plan["joint_steps"]) == ("predicted", [0], 200)
    (row,) = pq.read_table(only_file(tmp_path / "targets")).to_pylist()
    assert row["steps"] == [0, 0]
    image = images.decode_png(row["image"]).astype(np.float64) / 255
    for which in ("predicted", "target"):
        drawn = render(gaussians_of(row, which), row["height"], row["width"]).clamp(0, 1).permute(1, 2, 0).numpy()
        psnr = -10 * np.log10(np.square(drawn - image).mean())
        assert psnr == pytest.approx(row[f"psnr_{which}"][-1], abs=5e-3)
    assert row["psnr_target"][-1] > row["psnr_predicted"][-1] + 5


@pytest.mark.parametrize(
    ("given", "canvas", "steps", "joint_steps"),
    [
        ({}, "target", [50], 200),
        ({"steps": 20}, "target", [20], 200),
        ({"joint_steps": 0}, "target", [50], 0),
        ({}, "predicted", [0], 200),
        ({"steps": 20}, "predicted", [20], 0),
        ({"joint_steps": 30}, "predicted", [0], 30),
        ({"steps": 0, "joint_steps": 30}, "predicted", [0], 30),
        ({"joint_steps": 0}, "predicted", [50], 0),
    ],
)
def test_steps_of_each_stage_and_joint_steps(given: dict, canvas: str, steps: list[int], joint_steps: int) -> None:
    config = DistillConfig.model_validate({"predictor": "grid", "canvas": canvas, **given})
    settled = config.settled(config.find_predictor())
    assert (list(settled.steps), settled.joint_steps) == (steps, joint_steps)
    assert settled.settled(config.find_predictor()) == settled
    alone, jointly = settled.optimization()
    assert [each.steps for each in alone] == steps * 4
    assert jointly.steps == joint_steps


def test_steps_that_would_be_lost_are_refused() -> None:
    config = DistillConfig.model_validate({"predictor": "grid", "canvas": "predicted", "steps": 20, "joint_steps": 30})
    with pytest.raises(ConfigError, match=r"steps = \[20\] and joint_steps = 30 on a predicted canvas"):
        config.settled(config.find_predictor())


def test_the_grid_keeps_its_defaults(shards: Path, tmp_path: Path) -> None:
    distill(str(shards), str(tmp_path / "targets"), DistillConfig(predictor="grid", steps=(1,)), INLINE)
    plan = read_plan(open_storage(tmp_path / "targets")).config
    assert (plan["predictor"], plan["stages"], plan["canvas"]) == ("grid", 4, "target")


def test_what_does_not_fit_the_checkpoint_says_which_option_to_set(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_network(tmp_path / "net.safetensors", seed=0)
    command = ["distill", str(shards), str(tmp_path / "targets"), "--predictor", str(checkpoint)]
    assert main(command) == 2
    assert "set patch_size to 6" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="stages = 3"):
        distill(str(shards), str(tmp_path / "targets"), settings(checkpoint, stages=3), INLINE)
    assert not (tmp_path / "targets").exists()
