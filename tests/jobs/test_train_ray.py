"""Training on Ray Train: any number of workers gives one run, and a killed worker costs nothing but time."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from air.errors import NonFiniteLossError
from air.predictor.checkpoint import load_checkpoint, save_checkpoint
from jobs.train import train
from pipeline.errors import JobFailedError
from pipeline.storage.open import open_storage
from pipeline.training.config import TrainConfig, TrainerConfig
from pipeline.training.log import read_metrics
from pipeline.training.state import checkpoints

psutil = pytest.importorskip("psutil", reason="finding a worker's process needs psutil")
pytest.importorskip("pandas", reason="ray.train needs pandas")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

TINY: dict[str, Any] = {
    "patch_size": 8,
    "stages": 2,
    "settings": {"channels": 16, "depth": 1},
    "batch": 5,
    "min_crop": 32,
    "max_crop": 40,
    "steps": 12,
    "warmup_steps": 2,
    "learning_rate": 1e-3,
    "valid_images": 3,
}


def run(
    shards: Path, out: Path, workers: int, trainer: dict[str, Any] | None = None, **changes: Any
) -> dict[str, float]:
    config = TrainConfig.model_validate({**TINY, **changes})
    where = {"workers": workers, "threads": 1, "log_every": 1, "validate_every": 6, "checkpoint_every": 3}
    where = TrainerConfig.model_validate({**where, **(trainer or {})})
    return train(str(shards), str(out), config, where, valid=str(shards))


def column(out: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(open_storage(out)) if name in row]


def test_one_and_two_workers_give_the_same_curve(shards: Path, tmp_path: Path) -> None:
    """A batch of five in slices of two and three, of pictures of several sizes."""
    for workers in (1, 2):
        assert run(shards, tmp_path / str(workers), workers)["samples"] == 60
    for name in ("loss", "psnr", "grad_norm", "valid_psnr"):
        one, two = (column(tmp_path / str(workers), name) for workers in (1, 2))
        assert len(one) == (2 if name == "valid_psnr" else 12)
        # A warning, so that pytest -rA shows it.
        logging.warning("%s: relative difference %.1e at most", name, np.max(np.abs(np.divide(two, one) - 1)))
        np.testing.assert_allclose(one, two, rtol=2e-4)


def test_another_number_of_workers_takes_a_run_up(shards: Path, tmp_path: Path) -> None:
    """One worker is killed for good in the middle; two go on."""
    run(shards, tmp_path / "whole", 1, steps=60)
    with killing_after(tmp_path / "run", 1), pytest.raises(JobFailedError, match="from the last checkpoint"):
        run(shards, tmp_path / "run", 1, {"max_failures": 0}, steps=60)
    assert run(shards, tmp_path / "run", 2, steps=60)["samples"] == 300
    np.testing.assert_allclose(column(tmp_path / "run", "loss"), column(tmp_path / "whole", "loss"), rtol=1e-3)


def training_workers() -> set[int]:
    """The processes of this process's Ray that train."""
    return {
        process.pid
        for process in psutil.Process().children(recursive=True)
        if any("RayTrainWorker" in part for part in _command_of(process))
    }


def _command_of(process: Any) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@contextmanager
def killing_after(out: Path, count: int) -> Iterator[None]:
    """Sends SIGKILL to a training worker that starts from here on, as soon as the run has so many checkpoints."""
    earlier = training_workers()  # of runs that have ended: their processes take a while to go
    killed: list[int] = []

    def kill() -> None:
        # The worker is looked for before the checkpoint is there, since the run does not wait for that.
        while not (started := training_workers() - earlier):
            time.sleep(0.05)
        while len(checkpoints(open_storage(out))) < count:
            time.sleep(0.01)
        os.kill(max(started), signal.SIGKILL)
        killed.append(max(started))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    yield
    killer.join(timeout=10)
    assert killed


def test_a_killed_worker_is_replaced_and_no_sample_is_lost(shards: Path, tmp_path: Path) -> None:
    """Beside an undisturbed run of as many workers, whose sums are in the same order: no number may differ."""
    run(shards, tmp_path / "whole", 2, steps=60)
    with killing_after(tmp_path / "run", 2):
        figures = run(shards, tmp_path / "run", 2, steps=60)
    assert figures["samples"] == 300
    steps = [row["step"] for row in read_metrics(open_storage(tmp_path / "run")) if "loss" in row]
    assert steps == list(range(1, 61))
    for name in ("loss", "psnr", "grad_norm", "valid_psnr"):
        assert column(tmp_path / "run", name) == column(tmp_path / "whole", name), name


def test_a_loss_that_is_not_a_number_is_not_tried_again(shards: Path, tmp_path: Path) -> None:
    """From a checkpoint with a weight that is no number: Ray would restart the workers three times, for nothing."""
    begun = tmp_path / "begun" / "last.safetensors"
    run(shards, begun.parent, 1, {"executor": "inline"}, steps=1)
    network, _ = load_checkpoint(begun)
    next(network.parameters()).data.view(-1)[0] = float("nan")
    save_checkpoint(begun, network)
    message = r"the loss is not a number in step 0, with the samples (photographs\S+, ){4}photographs\S+\. There is no"
    with pytest.raises(NonFiniteLossError, match=message):
        run(shards, tmp_path / "run", 2, **{"from": str(begun)})
