"""Checks of the folder of a rule's run: how far it is, and which of its files are damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from air.errors import CheckpointError
from air.optimization.rule_file import load_rule
from pipeline.errors import DamagedDataError, TrainingError
from pipeline.rules.rounds import FOLDER, folder_of
from pipeline.rules.state import KINDS, RULE
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.training.audit import Standing, repair_run, verify_folder
from pipeline.training.log import read_metrics
from pipeline.training.state import checkpoints, read_state
from pipeline.weights import local_weights
from pipeline.work.audit import repair, verify
from pipeline.work.manifest import committed_units
from pipeline.work.plan import PLAN_PATH, read_plan


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


def round_at(output: Storage, step: int) -> str:
    """Which round a run in rounds is in after a step, and how far the roll-outs of that round are."""
    config = read_plan(output).config
    number = min(step // config["round_steps"] + 1, config["rounds"])
    text = f"{number} of {config['rounds']}"
    present = open_storage(output.uri(folder_of(number)))
    if not present.exists(PLAN_PATH):
        return text
    return f"{text}, {len(committed_units(present))} of {len(read_plan(present).units)} shards rolled out"


def verify_rule(output: Storage) -> Iterator[str]:
    """Checks every file of a run against its checksum and the plan; yields one line for each damage or missing part."""
    plan_hash = read_plan(output).hash
    for folder in checkpoints(output):
        yield from verify_folder(output, folder, plan_hash, KINDS)
    for number in _rounds(output):
        yield from _verify_round(output, number, plan_hash)
    try:
        found = standing(output)
    except (DamagedDataError, TrainingError) as error:
        yield str(error)
        return
    if found.finished or output.exists(RULE):
        yield from _verify_kept(output, RULE, plan_hash)
    if found.told < found.step:
        yield f"metrics.jsonl ends with step {found.told}, but the newest checkpoint is of step {found.step}"
    if not found.finished:
        yield f"the run is not finished: its newest checkpoint is of step {found.step} of {found.steps}"


def repair_rule(output: Storage) -> list[str]:
    """Removes damaged checkpoints, so that the run goes on from the newest intact one; returns what it has removed.

    Of a run in rounds it takes back the broken commits of the round that the run is in. A damaged round that the run
    has learned from is removed: no run needs it, and none would make it again.
    """
    removed = repair_run(output, KINDS)
    plan = read_plan(output)
    for number in _rounds(output):
        if not any(_verify_round(output, number, plan.hash)):
            continue
        if number * plan.config["round_steps"] <= standing(output).step:
            output.delete_folder(folder_of(number))
            removed.append(folder_of(number))
        else:
            commits = repair(open_storage(output.uri(folder_of(number))))
            removed += [f"{folder_of(number)}/{path}" for path in commits]
    return removed


def _rounds(output: Storage) -> list[int]:
    """The numbers of the rounds that a folder holds."""
    paths = (PurePosixPath(path) for path, _ in output.list(FOLDER))
    return [int(path.parent.name) for path in paths if path.name == PLAN_PATH and path.parent.name.isdecimal()]


def _verify_round(output: Storage, number: int, plan_hash: str) -> Iterator[str]:
    folder = folder_of(number)
    roll_outs = open_storage(output.uri(folder))
    try:
        yield from (f"{folder}: {problem}" for problem in verify(roll_outs))
        rolled_out = read_plan(roll_outs).config["rule"]
    except DamagedDataError as error:
        yield str(error)
        return
    yield from _verify_kept(output, f"{folder}/{RULE}", plan_hash, rolled_out)


def _verify_kept(output: Storage, path: str, plan_hash: str, rolled_out: str | None = None) -> Iterator[str]:
    """One line if a rule is damaged or of another plan; or is not the one that a round's plan names."""
    remedy = "the same `air train` writes it again"
    if rolled_out is not None:
        remedy = "`air verify --repair` removes a round that the run has learned from"
    if not output.exists(path):
        yield f"{path} is missing; {remedy}"
        return
    try:
        with local_weights(output.uri(path)) as local:
            _, card = load_rule(local)
    except CheckpointError as error:
        yield f"{error}; {remedy}"
        return
    if card.plan != plan_hash:
        yield f"{path} is of another plan ({card.plan[:12]}, expected {plan_hash[:12]})"
    if rolled_out is not None and not rolled_out.endswith(card.sha256):
        yield f"{path} is rule:{card.sha256[:12]}, and the round has rolled out {rolled_out}; {remedy}"
