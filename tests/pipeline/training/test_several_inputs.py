"""A run on several inputs: all their samples take part, and the plan names the files of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.distill import distill
from jobs.train import train
from pipeline.bulk.distill import DistillConfig
from pipeline.config import RunnerConfig
from pipeline.errors import TrainingError
from pipeline.storage.open import open_storage
from pipeline.training.batches import Feed
from pipeline.training.config import TrainConfig, TrainerConfig
from pipeline.training.group import Group
from pipeline.training.plan import plan_training
from pipeline.work.plan import read_plan

TINY: dict[str, Any] = {
    "patch_size": 8,
    "stages": 1,
    "settings": {"channels": 8, "depth": 1},
    "batch": 2,
    "min_crop": 32,
    "max_crop": 32,
    "steps": 6,
    "valid_images": 1,
}
TRAINER = TrainerConfig.model_validate({"executor": "inline", "threads": 1})


@pytest.fixture(scope="module")
def targets(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Targets of the same shards, made on each canvas."""
    folder = tmp_path_factory.mktemp("several")
    for canvas in ("target", "predicted"):
        settings = {"predictor": "grid", "patch_size": 8, "stages": 1, "steps": 2, "joint_steps": 0, "canvas": canvas}
        config = DistillConfig.model_validate({**settings, "min_view_pixels": 10**6, "max_view_pixels": 10**6})
        distill(str(shards), str(folder / canvas), config, RunnerConfig.model_validate({"executor": "inline"}))
    return {canvas: folder / canvas for canvas in ("target", "predicted")}


def test_all_samples_of_all_inputs_take_part(shards: Path, targets: dict[str, Path], tmp_path: Path) -> None:
    config = TrainConfig.model_validate(TINY)
    inputs = [str(shards), str(targets["target"])]
    job = plan_training(inputs, str(tmp_path / "run"), config, TRAINER, str(shards))
    assert {block.source for block in job.blocks} == set(inputs)
    feed = Feed(job, Group())
    names = [key for step in range(4) for key in feed.batch(step).keys]
    feed.close()
    assert len(names) == 8
    assert len(set(names)) == 4  # an epoch has each photograph twice: from its shard and from its targets
    units = [unit.name for unit in read_plan(open_storage(tmp_path / "run")).units]
    assert units == [f"input-{number}-shard-{unit:05d}" for number in (0, 1) for unit in (0, 1)]
    assert train(inputs, str(tmp_path / "run"), config, TRAINER, str(shards))["step"] == 6


def test_targets_of_two_kinds_are_not_mixed(targets: dict[str, Path], tmp_path: Path) -> None:
    config = TrainConfig.model_validate({**TINY, "phase": "pod"})
    inputs = [str(folder) for folder in targets.values()]
    with pytest.raises(TrainingError, match=r"on the target canvas, those in .*predicted on the predicted canvas"):
        plan_training(inputs, str(tmp_path / "run"), config, TRAINER, inputs[0])
    assert not (tmp_path / "run").exists()
