"""Rounds of a cycle: what each one is to do, which shards it has seen, and how it ended.

A round's plan names its shards, the champion that it begins with and all settings. It is created once, before anything
else, so that a round that was killed goes on as it began, whatever has arrived or moved meanwhile. This module must not
know how the steps work.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from air.version import __version__
from pipeline.config import Config
from pipeline.errors import PlanMismatchError
from pipeline.retraining.gates import Gate
from pipeline.retraining.shards import Source
from pipeline.storage.base import MissingFileError, Storage
from pipeline.storage.open import open_storage
from pipeline.work.holder import utc_now
from pipeline.work.plan import MAX_DIFFERENCES_SHOWN, PLAN_PATH, parse_json

ROUNDS = "rounds"

_PLAN, _OUTCOME, _EVALUATION = "round.json", "outcome.json", "evaluation.json"
_NUMBER = re.compile(rf"{ROUNDS}/(\d{{4,}})/{re.escape(_PLAN)}")


class RoundPlan(Config):
    """What a round is to do.

    Attributes:
        id: Drawn at random. The registry's history names it, so that no round promotes twice.
        number: Number of the round, from 1.
        begun: When, UTC, ISO 8601.
        sources: The shards that no earlier round has seen.
        champion: Id of the version that the round begins with, and that the candidate must beat; None if there is none.
        older: Folders of targets of earlier rounds that the candidate is trained on, too, below the cycle's folder.
        settings: The configuration of all steps, by section and key, and the code's version.
    """

    id: str
    number: int
    begun: str
    sources: tuple[Source, ...]
    champion: str | None
    older: tuple[str, ...]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The number as folders have it."""
        return f"{self.number:04d}"

    @property
    def shards(self) -> int:
        """Number of shards."""
        return sum(len(source.units) for source in self.sources)


class Comparison(Config):
    """The commit of a round's comparison of candidate and champion.

    Attributes:
        table: The Parquet file of measurements, below the round's folder.
        candidate: Location of the candidate's weights, below the round's folder.
        model: The candidate's name in the table.
        champion: The champion's name in the table; None if there was none.
        rejected: Number of images of the frozen set that could not be used, by reason.
        diverged: Number of images for which the candidate's numbers were not finite.
        encode_error: Why the candidate could not encode an image; empty if it could.
    """

    table: str
    candidate: str
    model: str
    champion: str | None
    rejected: dict[str, int]
    diverged: int
    encode_error: str


class Outcome(Config):
    """How a round ended.

    Attributes:
        round: Id of the round.
        promoted: Whether the candidate has become the champion.
        candidate: Id of the candidate's version.
        champion: Id of the champion's version at the end.
        why: The reason in one sentence.
        gates: All gates.
        ended: When, UTC, ISO 8601.
    """

    round: str
    promoted: bool
    candidate: str
    champion: str | None
    why: str
    gates: tuple[Gate, ...]
    ended: str


def read_rounds(work: Storage) -> Iterator[RoundPlan]:
    """The plans of all rounds, in order.

    Raises:
        DamagedDataError: A plan is not valid.
    """
    numbers = sorted(int(match[1]) for match in (_NUMBER.fullmatch(path) for path, _ in work.list(ROUNDS)) if match)
    for number in numbers:
        yield parse_json(RoundPlan, work, f"{ROUNDS}/{number:04d}/{_PLAN}")


def round_folder(work: Storage, plan: RoundPlan) -> Storage:
    """The folder of a round."""
    return open_storage(work.uri(f"{ROUNDS}/{plan.name}"))


def is_over(work: Storage, plan: RoundPlan) -> bool:
    """Whether a round has ended."""
    return work.exists(f"{ROUNDS}/{plan.name}/{_OUTCOME}")


def new_round(
    rounds: list[RoundPlan], sources: list[Source], champion: str | None, older: list[str], settings: Mapping[str, Any]
) -> RoundPlan:
    """The plan of the round after `rounds`."""
    return RoundPlan(
        id=uuid.uuid4().hex[:12],
        number=rounds[-1].number + 1 if rounds else 1,
        begun=utc_now(),
        sources=tuple(sources),
        champion=champion,
        older=tuple(older),
        settings=dict(settings),
    )


def begin_round(work: Storage, plan: RoundPlan) -> RoundPlan:
    """Writes a round's plan, unless the round has one; returns the plan that counts."""
    path = f"{ROUNDS}/{plan.name}/{_PLAN}"
    if work.put_if_absent(path, plan.model_dump_json(indent=1).encode()):
        return plan
    return parse_json(RoundPlan, work, path)


def settings_of(sections: Mapping[str, Config]) -> dict[str, Any]:
    """All keys of all sections that results depend on, as a round's plan holds them, and the version of the code."""
    settings = {
        f"{section}.{key}": value
        for section, config in sections.items()
        for key, value in config.model_dump(mode="json").items()
    }
    return json.loads(json.dumps({**settings, "code_version": __version__}))


def check_settings(work: Storage, plan: RoundPlan, settings: Mapping[str, Any]) -> None:
    """Compares the settings of a round that was stopped with those of the command that is to go on.

    Raises:
        PlanMismatchError: They differ; the message lists how.
    """
    keys = sorted(plan.settings.keys() | settings.keys())
    differences = [
        f"{key}: {plan.settings.get(key)} -> {settings.get(key)}"
        for key in keys
        if plan.settings.get(key) != settings.get(key)
    ]
    if differences:
        folder = round_folder(work, plan).uri()
        shown = "".join(f"\n  {line}" for line in differences[:MAX_DIFFERENCES_SHOWN])
        more = len(differences) - MAX_DIFFERENCES_SHOWN
        raise PlanMismatchError(
            f"{folder} was begun with other settings (that round -> this run):{shown}"
            f"{f'{chr(10)}  and {more} more' if more > 0 else ''}\n"
            f"Run with the settings of that round until it ends, or delete {folder}: its shards are new again then."
        )


def older_targets(work: Storage, rounds: list[RoundPlan]) -> list[str]:
    """Folders of targets that earlier rounds made and that are still there, below the cycle's folder."""
    folders = [folder for plan in rounds for folder in targets_of(plan)]
    return [folder for folder in folders if work.exists(f"{folder}/{PLAN_PATH}")]


def targets_of(plan: RoundPlan) -> list[str]:
    """The folder of targets of each source of a round, below the cycle's folder."""
    return [f"{ROUNDS}/{plan.name}/targets/{place}" for place in range(len(plan.sources))]


def read_comparison(folder: Storage) -> Comparison | None:
    """The comparison of a round; None if it is not committed."""
    try:
        return parse_json(Comparison, folder, _EVALUATION)
    except MissingFileError:
        return None


def commit_comparison(folder: Storage, comparison: Comparison) -> Comparison:
    """Commits a comparison, unless there is one; returns the one that counts, and removes other tables."""
    folder.put_if_absent(_EVALUATION, comparison.model_dump_json(indent=1).encode())
    winner = parse_json(Comparison, folder, _EVALUATION)
    for path, _ in list(folder.list()):
        if path.startswith("evaluation-") and path != winner.table:
            folder.delete(path)
    return winner


def end_round(folder: Storage, outcome: Outcome) -> Outcome:
    """Commits the end of a round, unless it has ended; returns the outcome that counts."""
    if folder.put_if_absent(_OUTCOME, outcome.model_dump_json(indent=1).encode()):
        return outcome
    return parse_json(Outcome, folder, _OUTCOME)
