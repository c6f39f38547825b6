"""The plan of a training run, and the pictures it validates on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import ConfigError, TrainingError
from pipeline.inputs.pictures import fingerprint
from pipeline.storage.base import Storage
from pipeline.storage.uri import normalise
from pipeline.training.config import TrainConfig
from pipeline.work.plan import read_plan

VALIDATION = "validation"
"""Folder of the run with the default pictures to validate on; in the plan, what pictures they are."""


def canvas_of_targets(source: Storage, kind: str, config: TrainConfig) -> str:
    """Which of a stage's Gaussians the targets' next stage was built on.

    Raises:
        TrainingError: There are no targets, or they have another patch size.
    """
    if kind != "targets":
        raise TrainingError(
            f"{source.uri()} holds images; phase pod trains on the output of `air distill`, or makes its targets "
            "in the loop with --targets online"
        )
    made = read_plan(source).config
    if made["patch_size"] != config.patch_size:
        raise TrainingError(
            f"the targets in {source.uri()} have patch size {made['patch_size']}, the run {config.patch_size}: "
            f"set patch_size to {made['patch_size']}, or distill anew"
        )
    return str(made["canvas"])


@contextmanager
def validation_sources(output: Storage, valid: str | None) -> Iterator[str]:
    """Where the pictures to validate on lie: those given, or packaged ones; at first in a temporary folder."""
    from pipeline.inputs.packaged import collect_pictures

    if valid:
        yield normalise(valid)
        return
    kept = output.uri(VALIDATION)
    # A copy that a stop cut short does not hold what the plan says.
    if next(output.list(VALIDATION), None) and read_plan(output).config.get(VALIDATION) == fingerprint(kept):
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="air-") as folder:
        try:
            collect_pictures(Path(folder), 12)
        except ConfigError as error:
            raise ConfigError(f"{error}; or name pictures to validate on with --valid") from None
        yield folder


def keep_validation(output: Storage, pictures: str) -> str:
    """Copies pictures into the run's folder, where all workers find them."""
    kept = output.uri(VALIDATION)
    if pictures != kept:
        for picture in sorted(Path(pictures).iterdir()):
            output.upload(picture, f"{VALIDATION}/{picture.name}")
    return kept
