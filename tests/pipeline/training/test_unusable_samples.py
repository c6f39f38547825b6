"""Samples that cannot be used: they are passed over, counted and named, and too many of them stop a run."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest

from jobs.train import train
from pipeline.errors import TrainingError
from pipeline.storage.open import open_storage
from pipeline.training.config import TrainConfig, TrainerConfig
from pipeline.training.log import read_metrics
from tests.support.toys import encode_picture

TINY: dict[str, Any] = {
    "patch_size": 8,
    "stages": 2,
    "settings": {"channels": 16, "depth": 1},
    "batch": 3,
    "min_crop": 32,
    "max_crop": 40,
    "steps": 6,
    "valid_images": 2,
}
INLINE: dict[str, Any] = {"executor": "inline", "threads": 1, "log_every": 1, "checkpoint_every": 2, "cache_mb": 10}


def test_an_image_that_cannot_be_used_is_passed_over(
    photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (photographs / "astronaut.png").read_bytes()
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "foreign.tar", "w") as archive:
        for number, data in enumerate([whole, whole, whole, whole, whole[: len(whole) // 2]]):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    config = TrainConfig.model_validate({**TINY, "batch": 5, "steps": 2})
    with caplog.at_level(logging.WARNING):
        figures = train(
            str(tmp_path / "shards"),
            str(tmp_path / "run"),
            config,
            TrainerConfig.model_validate(INLINE),
            str(photographs),
        )
    assert figures["samples"] == 10
    assert sum(row.get("skipped", 0) for row in read_metrics(open_storage(tmp_path / "run"))) == 2
    named = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert len(named) == 1  # of two epochs
    assert named[0].startswith(f"passed over: 4 in {tmp_path / 'shards' / 'foreign.tar'}: truncated: ")


@pytest.fixture
def dots(tmp_path: Path) -> Path:
    """A shard of four pictures of one pixel, which are too small to train on."""
    (tmp_path / "dots").mkdir()
    with tarfile.open(tmp_path / "dots" / "dots.tar", "w") as archive:
        for number in range(4):
            data = encode_picture(number, 1, 1)
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return tmp_path / "dots"


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_run_without_a_usable_sample_stops_and_keeps_nothing(
    photographs: Path, dots: Path, tmp_path: Path, share: float
) -> None:
    config, trainer = TrainConfig.model_validate(TINY), {**INLINE, "max_bad_share": share}
    message = r"6 of the 6 samples so far cannot be used, such as \d in \S+dots\.tar: too_small: "
    with pytest.raises(TrainingError, match=message):
        train(str(dots), str(tmp_path / "run"), config, TrainerConfig.model_validate(trainer), str(photographs))
    rows = read_metrics(open_storage(tmp_path / "run"))
    assert [row["skipped"] for row in rows] == [3, 3]
    assert not any(name in row for row in rows for name in ("loss", "psnr", "valid_psnr"))
    assert not list((tmp_path / "run").glob("**/*.safetensors"))


def test_a_run_stops_above_a_share_of_unusable_samples(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "mixed.tar", "w") as archive:
        for number, data in enumerate([(photographs / "astronaut.png").read_bytes(), *[encode_picture(0, 1, 1)] * 2]):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    config = TrainConfig.model_validate({**TINY, "steps": 2})
    arguments = (str(tmp_path / "shards"), str(tmp_path / "run"), config)
    with pytest.raises(TrainingError, match=r"4 of the 6 .* max_bad_share allows a fraction of 0\.5"):
        train(*arguments, TrainerConfig.model_validate(INLINE), str(photographs))
    allowing = TrainerConfig.model_validate({**INLINE, "max_bad_share": 0.7})
    assert train(*arguments, allowing, str(photographs))["step"] == 2
