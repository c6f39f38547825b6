"""Checks of a training run's folder: how far the run is, and which of its files are damaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from air.errors import CheckpointError
from air.predictor.checkpoint import load_checkpoint
from pipeline.errors import DamagedDataError, TrainingError
from pipeline.predictors import local_checkpoint
from pipeline.storage.base import MissingFileError, Storage
from pipeline.training.config import TrainConfig
from pipeline.training.log import read_metrics
from pipeline.training.state import KINDS, checkpoints, read_state, read_tensors, remove_checkpoint
from pipeline.work.plan import Plan, read_plan


@dataclass(frozen=True)
class Standing:
    """How far a run is.

    Attributes:
        step: The step of the newest checkpoint; the run would go on from there. 0 without a checkpoint.
        steps: Steps of the whole run.
        told: The last step in `metrics.jsonl`; 0 if there is none.
        seconds: Training time until the checkpoint.
        samples: Samples until the checkpoint.
        skipped: How many of these samples could not be used.
        validations: The step and the PSNR in dB of each validation.
        finished: Whether the run has ended.
    """

    step: int
    steps: int
    told: int
    seconds: float
    samples: int
    skipped: int
    validations: list[tuple[int, float]]
    finished: bool


def standing(output: Storage) -> Standing:
    """How far the run in a folder is, by its newest checkpoint and its metrics.

    Raises:
        DamagedDataError: The checkpoint or the metrics cannot be read.
    """
    config = _config(read_plan(output))
    saved = checkpoints(output)
    state = read_state(output, saved[-1]) if saved else {"step": 0, "seconds": 0.0, "skipped": 0}
    rows = read_metrics(output)
    return Standing(
        step=state["step"],
        steps=config.steps,
        told=max([row["step"] for row in rows], default=0),
        seconds=state["seconds"],
        samples=state["step"] * config.batch,
        skipped=state["skipped"],
        validations=[(row["step"], row["valid_psnr"]) for row in rows if "valid_psnr" in row],
        finished=config.is_over(state["step"], state["seconds"]),
    )


def _config(plan: Plan) -> TrainConfig:
    """The part of a plan's configuration that says when a run is over."""
    return TrainConfig.model_validate({key: plan.config[key] for key in ("steps", "batch", "max_seconds")})


def verify_run(output: Storage) -> Iterator[str]:
    """Checks every file of a run against its checksum and the plan; yields one line for each damage or missing part."""
    plan_hash = read_plan(output).hash
    saved = checkpoints(output)
    for folder in saved:
        yield from verify_folder(output, folder, plan_hash)
    try:
        found = standing(output)
    except (DamagedDataError, TrainingError) as error:
        yield str(error)
        return
    expected = {"last": bool(saved), "best": any(step <= found.step for step, _ in found.validations)}
    for name, is_expected in expected.items():
        file = f"{name}.safetensors"
        if is_expected or output.exists(file):
            yield from _verify_kept(output, file, plan_hash)
    if found.told < found.step:
        yield f"metrics.jsonl ends with step {found.told}, but the newest checkpoint is of step {found.step}"
    if not found.finished:
        yield f"the run is not finished: its newest checkpoint is of step {found.step} of {found.steps}"


def repair_run(output: Storage, kinds: Sequence[str] = KINDS) -> list[str]:
    """Removes damaged checkpoints, so that the run goes on from the newest intact one; returns the removed folders."""
    damaged = [folder for folder in checkpoints(output) if any(_damage(output, folder, kinds))]
    for folder in damaged:
        remove_checkpoint(output, folder)
    return damaged


def verify_folder(output: Storage, folder: str, plan_hash: str, kinds: Sequence[str] = KINDS) -> Iterator[str]:
    """One line if a checkpoint is damaged or of another plan.

    Args:
        output: The run's folder.
        folder: The checkpoint's folder in it.
        plan_hash: Hash of the run's plan.
        kinds: The sets of tensors that it must have.
    """
    damage = list(_damage(output, folder, kinds))
    yield from damage
    if not damage and (made := read_state(output, folder)["plan"]) != plan_hash:
        yield f"{folder} is of another plan ({made[:12]}, expected {plan_hash[:12]})"


def _damage(output: Storage, folder: str, kinds: Sequence[str]) -> Iterator[str]:
    """One line if the checkpoint is damaged, so that a run cannot go on from it."""
    try:
        state = read_state(output, folder)
        for kind in kinds:
            read_tensors(output, folder, kind, state)
    except DamagedDataError as error:
        yield str(error)


def _verify_kept(output: Storage, file: str, plan_hash: str) -> Iterator[str]:
    if not output.exists(file):
        yield f"{file} is missing; the same `air train` writes it again if a checkpoint of the run still holds it"
        return
    try:
        with local_checkpoint(output.uri(file)) as path:
            _, card = load_checkpoint(path)
    except (CheckpointError, MissingFileError) as error:
        yield f"{error}; the same `air train` writes it again if a checkpoint of the run still holds it"
        return
    if card.plan != plan_hash:
        yield f"{file} is of another plan ({card.plan[:12]}, expected {plan_hash[:12]})"
