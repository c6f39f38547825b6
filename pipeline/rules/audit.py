"""Checks of the folder of a rule's run: how far it is, and which of its files are damaged."""

from __future__ import annotations

from collections.abc import Iterator

from air.errors import CheckpointError
from air.optimization.rule_file import load_rule
from pipeline.errors import DamagedDataError, TrainingError
from pipeline.rules.state import KINDS, RULE
from pipeline.storage.base import Storage
from pipeline.training.audit import Standing, repair_run, verify_folder
from pipeline.training.log import read_metrics
from pipeline.training.state import checkpoints, read_state
from pipeline.weights import local_weights
from pipeline.work.plan import read_plan


def standing(output: Storage) -> Standing:
    """How far the run in a folder is, by its newest checkpoint and its metrics.

    Raises:
        DamagedDataError: The checkpoint or the metrics cannot be read.
    """
    steps = read_plan(output).config["steps"]
    saved = checkpoints(output)
    state = read_state(output, saved[-1]) if saved else {"step": 0, "seconds": 0.0, "samples": 0, "skipped": 0}
    rows = read_metrics(output)
    return Standing(
        step=state["step"],
        steps=steps,
        told=max([row["step"] for row in rows], default=0),
        seconds=state["seconds"],
        samples=state["samples"],
        skipped=state["skipped"],
        validations=[(row["step"], row["valid_psnr"]) for row in rows if "valid_psnr" in row],
        finished=state["step"] >= steps,
    )


def verify_rule(output: Storage) -> Iterator[str]:
    """Checks every file of a run against its checksum and the plan; yields one line for each damage or missing part."""
    plan_hash = read_plan(output).hash
    for folder in checkpoints(output):
        yield from verify_folder(output, folder, plan_hash, KINDS)
    try:
        found = standing(output)
    except (DamagedDataError, TrainingError) as error:
        yield str(error)
        return
    if found.finished or output.exists(RULE):
        yield from _verify_kept(output, plan_hash)
    if found.told < found.step:
        yield f"metrics.jsonl ends with step {found.told}, but the newest checkpoint is of step {found.step}"
    if not found.finished:
        yield f"the run is not finished: its newest checkpoint is of step {found.step} of {found.steps}"


def repair_rule(output: Storage) -> list[str]:
    """Removes damaged checkpoints, so that the run goes on from the newest intact one; returns the removed folders."""
    return repair_run(output, KINDS)


def _verify_kept(output: Storage, plan_hash: str) -> Iterator[str]:
    if not output.exists(RULE):
        yield f"{RULE} is missing; the same `air train` writes it again"
        return
    try:
        with local_weights(output.uri(RULE)) as path:
            _, card = load_rule(path)
    except CheckpointError as error:
        yield f"{error}; the same `air train` writes it again"
        return
    if card.plan != plan_hash:
        yield f"{RULE} is of another plan ({card.plan[:12]}, expected {plan_hash[:12]})"
