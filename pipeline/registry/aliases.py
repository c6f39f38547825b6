"""Aliases of a registry, such as `champion`: they move by compare-and-swap, and keep who moved them, when and why.

An alias is a journal. Its newest entry says where it points; older entries are its history. A promotion and a removal
of the same version (`pipeline.registry.gc`) may happen at once: a promotion looks again after it has appended, so that
no alias goes on pointing to nothing.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from air.defaults import ADAM, AUTO, COMPACT, GRID, GROW, SHIPPED
from pipeline.config import Config, build, suggestion
from pipeline.errors import AliasMovedError, ConfigError, DamagedDataError, RegistryError
from pipeline.registry.versions import SHOWN_DIGITS, Version, find_version, this_user
from pipeline.storage.base import Storage
from pipeline.storage.journal import Journal, JournalEntry
from pipeline.work.holder import spoken, utc_now

CHAMPION = "champion"
"""The alias of the weights that are in use."""

CANDIDATE = "candidate"
"""The alias of the weights that the last round of retraining made."""

FOLDER = "aliases"

NONE = "none"
"""In place of a version: the alias does not exist yet."""

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_RESERVED = frozenset({GRID, COMPACT, GROW, AUTO, ADAM, SHIPPED, NONE})


class Move(Config):
    """One entry of an alias's history.

    Attributes:
        number: Its place in the history, from 1; not stored.
        version: Id of the version that the alias points to since then.
        before: Id of the version that it pointed to before; None for the first entry.
        who: User and machine.
        when: UTC, ISO 8601.
        why: The reason.
        origin: For a promotion its own number. For a rollback the number of the promotion that it went back to.
        round: The round of retraining that promoted; empty for a person.
        id: Drawn at random, so that no two entries are equal.
    """

    number: int
    version: str
    before: str | None
    who: str
    when: str
    why: str
    origin: int
    round: str = ""
    id: str = ""

    def __str__(self) -> str:
        return f"{self.version[:SHOWN_DIGITS]} ({spoken(self.when)} by {self.who}: {self.why})"


@dataclass(frozen=True)
class Promotion:
    """What a promotion or a rollback did.

    Attributes:
        move: The newest entry of the alias.
        moved: Whether it is new; False if the alias pointed there already.
    """

    move: Move
    moved: bool


def alias_names(registry: Storage) -> list[str]:
    """Names of all aliases, sorted."""
    return sorted({path.split("/")[1] for path, _ in registry.list(FOLDER) if path.count("/") == 2})


def history(registry: Storage, alias: str) -> list[Move]:
    """All entries of an alias, the oldest first; none if there is no such alias.

    Raises:
        DamagedDataError: An entry is not valid.
    """
    return [_parse(registry, alias, entry) for entry in _journal(registry, alias).entries()]


def newest_move(registry: Storage, alias: str) -> Move | None:
    """Where an alias points, and since when; None if there is no such alias.

    Raises:
        DamagedDataError: The entry is not valid.
    """
    entry = _journal(registry, alias).newest()
    return _parse(registry, alias, entry) if entry else None


def existing_move(registry: Storage, alias: str) -> Move:
    """Where an alias points.

    Raises:
        RegistryError: There is no such alias. The message lists those that exist.
    """
    move = newest_move(registry, alias)
    if move is None:
        names = alias_names(registry)
        listed = f"it has {', '.join(names)}" if names else "it has no alias"
        raise RegistryError(f"{registry.uri()} has no alias '{alias}'{suggestion(alias, names)}; {listed}")
    return move


def promote(
    registry: Storage, alias: str, version: Version, reason: str, expect: str | None = None, round_id: str = ""
) -> Promotion:
    """Lets an alias point to a version.

    Args:
        registry: The registry.
        alias: A new or existing alias.
        version: A version of the registry.
        reason: Why, for the history.
        expect: Id, or its first digits, of the version that the alias must point to now; `NONE` if it must not exist.
            By default the alias moves from wherever it points.
        round_id: The round of retraining that promotes. A round that has moved the alias before does not do so again.

    Raises:
        AliasMovedError: The alias points neither where it is expected to nor to the version.
        RegistryError: The version is not in the registry, the reason is empty, or the alias's name cannot be used.
    """
    check_alias(alias)

    def next_move(last: Move | None) -> dict[str, Any] | Move:
        mine = round_move(registry, alias, round_id) if round_id else None
        if mine is not None and mine.version == version.id:
            return mine
        if last is not None and last.version == version.id:
            return last
        _check_expected(registry, alias, last, expect)
        return {"version": version.id, "origin": (last.number if last else 0) + 1, "round": round_id}

    return _append(registry, alias, reason, next_move)


def roll_back(registry: Storage, alias: str, reason: str, expect: str | None = None) -> Promotion:
    """Lets an alias point where it did before its last promotion. Again, it goes back one promotion more.

    Args:
        registry: The registry.
        alias: An existing alias.
        reason: Why, for the history.
        expect: As for `promote`.

    Raises:
        AliasMovedError: The alias is not where it is expected.
        RegistryError: There is no such alias, or nothing to go back to.
    """
    existing_move(registry, alias)

    def next_move(last: Move | None) -> dict[str, Any]:
        assert last is not None
        _check_expected(registry, alias, last, expect)
        if last.origin == 1:
            raise RegistryError(
                f"{alias} of {registry.uri()} has no version before {last}: there is nothing to go back to"
            )
        journal = _journal(registry, alias)
        back = _parse(registry, alias, journal.read(last.origin - 1))
        return {"version": back.version, "origin": back.origin}

    return _append(registry, alias, reason, next_move)


def check_alias(alias: str) -> None:
    """Refuses names that cannot be told from other names of weights.

    Raises:
        RegistryError: The name is such.
    """
    if not _NAME.fullmatch(alias) or alias in _RESERVED:
        raise RegistryError(
            f"{alias!r} cannot be an alias: take a small letter, then small letters, digits, '-' and '_', and none of "
            f"{', '.join(sorted(_RESERVED))}"
        )


def round_move(registry: Storage, alias: str, round_id: str) -> Move | None:
    """The newest entry by which a round of retraining moved an alias; None if it has not done so."""
    return next((move for move in reversed(history(registry, alias)) if move.round == round_id), None)


def _check_expected(registry: Storage, alias: str, last: Move | None, expect: str | None) -> None:
    if expect is None:
        return
    now = last.version if last else NONE
    expect = expect.removeprefix("@")
    if now == expect or (last is not None and expect and now.startswith(expect[: len(now)])):
        return
    where = f"points to {last}" if last else "does not exist"
    raise AliasMovedError(
        f"{alias} of {registry.uri()} {where}, and not to {expect[:SHOWN_DIGITS]} as expected: another process has "
        "moved it; look at it with `air registry show`, and decide again"
    )


def _append(
    registry: Storage, alias: str, reason: str, next_move: Callable[[Move | None], dict[str, Any] | Move]
) -> Promotion:
    """Appends an entry; tries again whenever another process was faster.

    Args:
        registry: The registry.
        alias: The alias.
        reason: Why it moves.
        next_move: Makes fields of the new entry from the newest entry; or returns an old entry that is enough.
    """
    if not reason.strip():
        raise RegistryError("the reason is empty: say why the alias moves, for its history")
    journal = _journal(registry, alias)
    while True:
        last = newest_move(registry, alias)
        move = next_move(last)
        if isinstance(move, Move):
            return Promotion(move, moved=False)
        _check_present(registry, move["version"])
        number = last.number if last else 0
        about = {"before": last.version if last else None, "who": this_user(), "when": utc_now(), "why": reason}
        entry = Move(number=number + 1, **about, **move, id=uuid.uuid4().hex)
        if journal.append(number, entry.model_dump_json(indent=1, exclude={"number"}).encode()):
            _check_kept(registry, alias, entry, last)
            return Promotion(entry, moved=True)


def _check_present(registry: Storage, identity: str) -> None:
    if find_version(registry, identity) is None:
        raise RegistryError(
            f"{registry.uri()} no longer has the version @{identity[:SHOWN_DIGITS]}: `air registry gc` has removed it; "
            "add its weights again with `air registry add`"
        )


def _check_kept(registry: Storage, alias: str, entry: Move, last: Move | None) -> None:
    """Takes a move back whose version was removed at the same time. One of the two always sees the other."""
    if find_version(registry, entry.version) is not None:
        return
    if last is not None:
        back = entry.model_copy(
            update={
                "number": entry.number + 1,
                "version": last.version,
                "before": entry.version,
                "why": f"@{entry.version[:SHOWN_DIGITS]} was removed while {alias} moved to it",
                "origin": last.origin,
                "id": uuid.uuid4().hex,
            }
        )
        _journal(registry, alias).append(entry.number, back.model_dump_json(indent=1, exclude={"number"}).encode())
    _check_present(registry, entry.version)


def _journal(registry: Storage, alias: str) -> Journal:
    return Journal(registry, f"{FOLDER}/{alias}")


def _parse(registry: Storage, alias: str, entry: JournalEntry) -> Move:
    path = _journal(registry, alias).path(entry.number)
    try:
        return build(Move, {**json.loads(entry.data), "number": entry.number}, path)
    except (ValueError, TypeError, ConfigError) as error:
        raise DamagedDataError(f"{registry.uri(path)} is not an entry of an alias: {error}") from None
