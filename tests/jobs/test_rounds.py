"""Two rounds of distilling and training on packaged photographs: the network beats the closed form it began with."""

import logging
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from PIL import Image

from jobs.distill import distill
from jobs.evaluate import evaluate
from jobs.shard import shard
from jobs.train import train
from pipeline.bulk.distill import DistillConfig
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.evaluation.config import EvaluateConfig
from pipeline.inputs.packaged import collect_pictures
from pipeline.training.config import TrainConfig, TrainerConfig

HELD_OUT = ("china.jpg", "chelsea.png", "coins.png")
TRAINING: dict[str, Any] = {
    "settings": {"channels": 24, "depth": 2, "passes": 1},
    "stages": 2,
    "batch": 8,
    "min_crop": 56,
    "max_crop": 56,
    "min_zoom": 1,
    "steps": 150,
    "learning_rate": 3e-3,
    "warmup_steps": 10,
    "ema_decay": 0.97,
    "psnr_weight": 1,
}
INLINE = RunnerConfig(executor="inline")
TRAINER = TrainerConfig(executor="inline", threads=2, validate_every=1000, checkpoint_every=1000)


@pytest.mark.slow
def test_two_rounds_beat_the_grid_on_pictures_that_were_held_out(tmp_path: Path) -> None:
    pytest.importorskip("skimage.data", reason="the photographs come with scikit-image")
    pytest.importorskip("sklearn.datasets", reason="two photographs come with scikit-learn")
    collect_pictures(tmp_path / "all", 12)
    for name in ("training", "held-out"):
        (tmp_path / name).mkdir()
    for path in sorted((tmp_path / "all").iterdir()):
        picture = Image.open(path).convert("RGB")
        picture.thumbnail((168, 168))
        folder = "held-out" if path.name in HELD_OUT else "training"
        picture.save(tmp_path / folder / f"{path.stem}.png")
    held_out = str(tmp_path / "held-out")
    shard([str(tmp_path / "training")], str(tmp_path / "shards"), ShardConfig(max_count=3), INLINE)

    predictor, best = "grid", None
    for number in (1, 2):
        targets, run = (str(tmp_path / f"round-{number}" / name) for name in ("targets", "run"))
        views = {"patch_size": 7, "stages": 2, "steps": 10, "min_view_pixels": 20_000, "max_view_pixels": 30_000}
        config = DistillConfig.model_validate({"predictor": predictor, **views})
        assert distill(str(tmp_path / "shards"), targets, config, INLINE).summary["views"] == 9
        train(targets, run, TrainConfig.model_validate({**TRAINING, "from": best}), TRAINER, valid=held_out)
        predictor = best = f"{run}/last.safetensors"

    rows = evaluate([held_out], EvaluateConfig(predictor=predictor, refine=(0,))).rows
    reached = {"network": "compact", "staged grid": "grid", "plain grid": "plain grid"}
    psnr, gaussians = (
        {
            name: mean(row[column] for row in rows if row["predictor"].partition(":")[0] == model)
            for name, model in reached.items()
        }
        for column in ("psnr", "num_gaussians")
    )
    stated = ", ".join(f"{name} {psnr[name]:.2f} dB with {gaussians[name]:.0f} Gaussians" for name in reached)
    logging.warning("reached: %s", stated)  # a warning, so that pytest -rA shows it
    # As many Gaussians as the network's, or more: it stops where a patch is good, and the grids get no less than it.
    assert gaussians["staged grid"] > 0.97 * gaussians["network"], stated
    assert gaussians["plain grid"] > 0.8 * gaussians["network"], stated
    assert psnr["network"] > max(psnr["staged grid"], psnr["plain grid"]) + 1, stated
