"""The other phases: against optimised Gaussians, stored or made in the loop; at another patch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from air.gaussians import Gaussians, activate, anchors
from air.predictor.checkpoint import save_checkpoint
from air.predictor.network import build
from air.rendering.render import render
from jobs.cli import main
from jobs.distill import distill
from jobs.train import train
from pipeline.bulk.distill import DistillConfig
from pipeline.config import RunnerConfig
from pipeline.errors import ConfigError, TrainingError
from pipeline.formats import images, tables
from pipeline.storage.open import open_storage
from pipeline.training.config import TrainConfig, TrainerConfig
from pipeline.training.log import read_metrics
from pipeline.training.losses import distill_losses
from pipeline.training.start import check_start
from pipeline.training.targets import cut_targets
from tests.support.released_dinov3 import CHANNELS, FEATURES
from tests.support.released_dinov3 import TINY as BACKBONE

TINY: dict[str, Any] = {
    "patch_size": 8,
    "stages": 2,
    "settings": {"channels": 16, "depth": 1},
    "batch": 2,
    "min_crop": 32,
    "max_crop": 32,
    "steps": 30,
    "warmup_steps": 0,
    "learning_rate": 3e-3,
    "ema_decay": 0.0,
    "valid_images": 1,
}
INLINE: dict[str, Any] = {"executor": "inline", "threads": 1, "log_every": 1, "checkpoint_every": 1000, "cache_mb": 10}
RUNNER = RunnerConfig.model_validate({"executor": "inline"})


@pytest.fixture(scope="module")
def targets(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phases") / "targets"
    settings = {"patch_size": 8, "stages": 2, "steps": 10, "min_view_pixels": 10**6, "max_view_pixels": 10**6}
    distill(str(shards), str(folder), DistillConfig.model_validate(settings), RUNNER)
    return folder


def run(source: Path, out: Path, trainer: dict[str, Any] | None = None, **changes: Any) -> list[dict[str, float]]:
    """A tiny run; returns its metrics."""
    config = TrainConfig.model_validate({**TINY, **changes})
    train(str(source), str(out), config, TrainerConfig.model_validate({**INLINE, **(trainer or {})}), str(source))
    return read_metrics(open_storage(out))


WHOLE: dict[str, Any] = {
    "batch": 4,
    "min_crop": 96,
    "max_crop": 96,
    "min_zoom": 1,
    "steps": 16,
    **dict.fromkeys(["flip", "colour_jitter", "noise", "jpeg", "blur"], 0),
}
"""Every batch is the same four whole pictures, so that losses can be compared from step to step."""


def losses(rows: list[dict[str, float]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def test_online_pod_raises_the_psnr_of_predictions(targets: Path, tmp_path: Path) -> None:
    """Its targets move with the predictions, so that its loss says little."""
    rows = run(targets, tmp_path / "run", phase="pod", targets="online", horizon=[5], **WHOLE)
    reached = [row["psnr"] for row in rows if "psnr" in row]
    assert np.mean(reached[-4:]) > reached[0] + 0.1


def test_offline_pod_learns_stored_targets(targets: Path, tmp_path: Path) -> None:
    found = losses(run(targets, tmp_path / "run", phase="pod", **WHOLE))
    assert np.mean(found[-4:]) < 0.97 * found[0]


def test_offline_pod_needs_targets_of_its_patch_size(shards: Path, targets: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"shards holds images; phase pod trains on the output of `air distill`"):
        run(shards, tmp_path / "run", phase="pod")
    with pytest.raises(TrainingError, match=r"have patch size 8, the run 7: set patch_size to 8"):
        run(targets, tmp_path / "run", phase="pod", patch_size=7)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("canvas", ["target", "predicted"])
def test_a_crop_of_targets_is_the_crop_of_the_whole(targets: Path, canvas: str) -> None:
    """Its canvases are those of the whole view, by the reference renderer; its raw targets are the row's Gaussians."""
    row = pq.read_table(next((targets / "data").glob("*.parquet"))).to_pylist()[0]
    rgb = images.decode(row["image"])
    height, width = rgb.shape[:2]
    crop, stages = cut_targets(row, rgb, 2, 32, canvas, seed=3)
    corner = next(
        (top, left)
        for top in range(0, height - 31, 8)
        for left in range(0, width - 31, 8)
        if np.array_equal(rgb[top : top + 32, left : left + 32], crop)
    )
    columns = torch.tensor([row[f"{canvas}_{name}"] for name in tables.GAUSSIAN_QUANTITIES], dtype=torch.float64).T
    whole = Gaussians(columns[:, 0:2], columns[:, 2:4], columns[:, 4], columns[:, 5:8])
    first = torch.tensor(row["stage"]) == 0
    drawn = render(whole[first], height, width, backend="reference")
    part = drawn[:, corner[0] : corner[0] + 32, corner[1] : corner[1] + 32]
    assert not stages[0].canvas.any()
    torch.testing.assert_close(stages[1].canvas.double(), part, rtol=0, atol=3e-5)

    count = 0
    for number, stage in enumerate(stages):
        restored = activate(stage.raw, anchors(32, 32, 8), 8)[stage.active]
        count += len(restored)
        x = np.array(row["target_x"])[np.array(row["stage"]) == number]
        distance = np.abs(restored.xy[:, 0].numpy()[:, None] + corner[1] - x[None]).min(axis=1)
        assert distance.max() < 1e-3
    inside = [
        corner[0] <= patch // (width // 8) * 8 < corner[0] + 32
        and corner[1] <= patch % (width // 8) * 8 < corner[1] + 32
        for patch in row["anchor"]
    ]
    assert count == sum(inside)


def test_the_distillation_loss_is_a_mean_over_active_gaussians() -> None:
    raw, target = torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)
    target[0, 1] = 1e4  # sigmoid 1 against 1/2: smooth L1 is 1/8
    active = torch.tensor([[False, True, True], [False, False, False]])
    assert distill_losses(raw, target, active).tolist() == [100 / 8 / 2, 0.0]


def test_another_patch_size_trains_what_it_replaced_first(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "eight", steps=2)
    begun = str(tmp_path / "eight" / "last.safetensors")
    other = {"from": begun, "phase": "patch", "patch_size": 6, "steps": 2}
    run(shards, tmp_path / "first", **other, patch_warmup_steps=2)
    run(shards, tmp_path / "both", **other, patch_warmup_steps=1)
    before, first, both = (
        safetensors.torch.load_file(file)
        for file in (begun, tmp_path / "first" / "last.safetensors", tmp_path / "both" / "last.safetensors")
    )
    fitting = [name for name in before if before[name].shape == first[name].shape]
    assert 0 < len(fitting) < len(before)
    assert all(torch.equal(before[name], first[name]) for name in fitting)
    assert not all(torch.equal(before[name], both[name]) for name in fitting)
    with pytest.raises(TrainingError, match="has patch size 8 already"):
        run(shards, tmp_path / "same", **{**other, "patch_size": 8})


def test_gradient_checkpointing_reaches_the_network_and_changes_no_loss(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="the backbone comes with transformers")
    from air.predictor.dinov3 import network as dinov3

    recomputed = []

    def checkpoint(module: Any, *inputs: Any, **options: Any) -> Any:
        recomputed.append(module)
        return torch.utils.checkpoint.checkpoint(module, *inputs, **options)

    monkeypatch.setattr(dinov3, "checkpoint", checkpoint)
    network = {
        "architecture": "dinov3",
        "settings": {"backbone": BACKBONE, "channels": CHANNELS, "features": FEATURES},
    }
    kept = losses(run(shards, tmp_path / "kept", **network, steps=2))
    assert not recomputed
    again = losses(run(shards, tmp_path / "again", {"gradient_checkpointing": True}, **network, steps=2))
    assert recomputed
    np.testing.assert_allclose(again, kept, rtol=1e-5)


def test_a_backbone_without_learned_weights_is_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("transformers", reason="the backbone comes with transformers")
    check_start(TrainConfig.model_validate(TINY), TrainerConfig())
    assert not caplog.text
    settings = {"backbone": BACKBONE, "channels": CHANNELS, "features": FEATURES}
    check_start(TrainConfig.model_validate({**TINY, "architecture": "dinov3", "settings": settings}), TrainerConfig())
    assert "the backbone of dinov3 starts from random weights" in caplog.text
    assert "--from" in caplog.text


def test_gradient_checkpointing_is_refused_where_there_is_none(shards: Path, tmp_path: Path) -> None:
    for network in ({}, {"from": "compact", "patch_size": 7}):
        with pytest.raises(TrainingError, match="the architecture compact has no gradient_checkpointing: leave it off"):
            run(shards, tmp_path / "run", {"gradient_checkpointing": True}, **network)
    assert not (tmp_path / "run").exists()


def test_stored_targets_are_refused_for_stretched_centres(targets: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the backbone comes with transformers")
    settings = {"backbone": BACKBONE, "channels": CHANNELS, "features": FEATURES, "pixel_stretch": True}
    network = build("dinov3", {"patch_size": 8, "num_stages": 2, **settings})
    save_checkpoint(tmp_path / "stretched.safetensors", network)
    begun = {"from": str(tmp_path / "stretched.safetensors")}
    with pytest.raises(TrainingError, match=r"stretches centres \(pixel_stretch\), .* or --targets online"):
        run(targets, tmp_path / "run", phase="pod", **begun)
    assert losses(run(targets, tmp_path / "run", phase="pod", targets="online", horizon=[2], steps=1, **begun))


def test_refine_needs_a_checkpoint(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(shards), str(tmp_path / "run"), "--phase", "refine"]) == 2
    assert "phase = 'refine' needs a checkpoint to begin with: set from" in capsys.readouterr().err


def test_without_ray_train_the_way_out_is_named(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray.train", None)
    config = TrainConfig.model_validate(TINY)
    with pytest.raises(ConfigError, match=r"pip install 'air-gaussians\[train\]'.*--executor inline"):
        train(str(shards), str(tmp_path / "run"), config, TrainerConfig(), valid=str(shards))
