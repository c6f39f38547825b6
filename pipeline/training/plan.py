"""What a training run is to do: its plan, the pictures that it validates on, and the job that its workers get.

The driver plans before anything trains, so this module loads without torch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from air.defaults import GRID
from pipeline.errors import ConfigError, TrainingError
from pipeline.inputs.blocks import Block, find_blocks, in_input
from pipeline.inputs.pictures import fingerprint
from pipeline.inputs.sources import check_outside
from pipeline.predictors import find_predictor
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.storage.uri import normalise
from pipeline.training.config import TrainConfig, TrainerConfig
from pipeline.work.plan import Plan, Unit, read_plan, settle_plan

VALIDATION = "validation"
"""The folder of the run that holds the default validation pictures; in the plan, the key of their fingerprint."""

_PACKAGED_PICTURES = 12
"""Packaged photographs that a run validates on unless it is given others."""


@dataclass(frozen=True)
class TrainJob:
    """Everything that a worker needs to know.

    Attributes:
        config: What is trained.
        trainer: Where and how it runs.
        blocks: Where the samples lie.
        output: URI of the run's folder.
        plan: Hash of the run's plan.
        valid: URI of the validation images.
        canvas: Which Gaussians of a stage the targets' next stage was built on, "target" or "predicted"; None where
            training needs images alone.
        threads: CPU threads of this worker.
    """

    config: TrainConfig
    trainer: TrainerConfig
    blocks: tuple[Block, ...]
    output: str
    plan: str
    valid: str
    canvas: str | None
    threads: int


def plan_training(
    inputs: str | Sequence[str], output_uri: str, config: TrainConfig, trainer: TrainerConfig, valid: str | None = None
) -> TrainJob:
    """Checks everything that can be checked beforehand, and writes the plan or compares it with the folder's plan.

    Args:
        inputs: Output of `air shard` or `air distill`, or several of them.
        output_uri: The run's folder.
        config: What to train.
        trainer: Where and how it runs.
        valid: Images or shards to validate on; packaged photographs if not given.

    Raises:
        ConfigError: The configuration contradicts itself, or the packaged photographs are not installed.
        TrainingError: The input, the checkpoint or the validation images do not fit the configuration.
        PlanMismatchError: The folder belongs to another plan.
    """
    from pipeline.training.start import check_start
    from pipeline.training.validation import check_images

    if trainer.executor == "inline" and trainer.workers > 1:
        raise ConfigError("--executor inline is one worker in this process; several workers need --executor ray")
    sources = [open_storage(given) for given in ([inputs] if isinstance(inputs, str) else inputs)]
    output = open_storage(output_uri)
    check_outside(output, [source.uri() for source in sources])
    units, blocks, canvas = _find_samples(sources, config)
    plan = Plan.make("train", config, units, [source.uri() for source in sources])
    if config.from_:
        if config.from_ == GRID:
            raise ConfigError("from = grid: the grid has no weights to begin with; leave it out for fresh weights")
        begin = find_predictor(config.from_, output=output, key="from_")
        config = config.model_copy(update={"from_": begin.name})
        plan = begin.hold(plan, "from_")
    check_start(config, trainer)
    with validation_pictures(output, valid) as pictures:
        check_images(pictures, config.valid_images)
        validation = {VALIDATION: fingerprint(pictures)}
        plan = settle_plan(output, plan.model_copy(update={"config": {**plan.config, **validation}}))
        if not valid:
            pictures = keep_validation(output, pictures)
    return TrainJob(
        config=config,
        trainer=trainer,
        blocks=tuple(blocks),
        output=output.uri(),
        plan=plan.hash,
        valid=pictures,
        canvas=canvas,
        threads=trainer.threads or max(1, (os.cpu_count() or 1) // trainer.workers),
    )


def _find_samples(sources: Sequence[Storage], config: TrainConfig) -> tuple[list[Unit], list[Block], str | None]:
    """The committed files of all inputs as units, their blocks, and the canvas of the targets if these are needed.

    Raises:
        TrainingError: An input does not fit, is not finished or has no samples; or two have targets of two kinds.
    """
    units: list[Unit] = []
    blocks: list[Block] = []
    canvases: dict[str, str] = {}  # the first input of each
    for number, source in enumerate(sources):
        kind, found, inside = find_blocks(source)
        units += [in_input(unit, number, len(sources)) for unit in found]
        blocks += inside
        if config.uses_targets:
            canvases.setdefault(canvas_of_targets(source, kind, config), source.uri())
    if len(canvases) > 1:
        (first, here), (second, there) = canvases.items()
        raise TrainingError(
            f"the targets in {here} were made on the {first} canvas, those in {there} on the {second} canvas: give "
            "targets of one kind"
        )
    return units, blocks, next(iter(canvases), None)


def canvas_of_targets(source: Storage, kind: str, config: TrainConfig) -> str:
    """Which Gaussians of a stage the targets' next stage was built on: "target" or "predicted".

    Args:
        source: The samples.
        kind: "targets" or "images", as `find_blocks` found them.
        config: What to train.

    Raises:
        TrainingError: The samples are images, or the targets have another patch size.
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
            f"set patch_size to {made['patch_size']}, or run `air distill` again with patch_size {config.patch_size}"
        )
    return str(made["canvas"])


@contextmanager
def validation_pictures(output: Storage, valid: str | None) -> Iterator[str]:
    """The URI of the pictures to validate on: the given ones, or packaged ones.

    Packaged pictures lie in a temporary folder until `keep_validation` has copied them into the run's folder.

    Raises:
        ConfigError: None are given, and the packages that ship some are not installed.
    """
    from pipeline.inputs.packaged import collect_pictures

    if valid:
        yield normalise(valid)
        return
    kept = output.uri(VALIDATION)
    # If a stop cut the copying short, the pictures in the folder do not have the fingerprint that the plan holds.
    if next(output.list(VALIDATION), None) and read_plan(output).config.get(VALIDATION) == fingerprint(kept):
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="air-") as folder:
        try:
            collect_pictures(Path(folder), _PACKAGED_PICTURES)
        except ConfigError as error:
            raise ConfigError(f"{error}; or name pictures to validate on with --valid") from None
        yield folder


def keep_validation(output: Storage, pictures: str) -> str:
    """Copies pictures into the run's folder, where all workers find them; returns their URI there."""
    kept = output.uri(VALIDATION)
    if pictures != kept:
        for picture in sorted(Path(pictures).iterdir()):
            output.upload(picture, f"{VALIDATION}/{picture.name}")
    return kept
