"""Finds the shards that are there, in folders and globs, and tells new ones from those that a round has seen.

A shard of `air shard` is known by its checksum, from the manifest. A tar of another program is known by its place and
size, and is read only if these are new; then its checksum says whether it is a copy. This module must not know rounds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import accumulate

from pipeline.config import Config
from pipeline.errors import ConfigError, DamagedDataError
from pipeline.inputs.shards import foreign_shard, list_shards
from pipeline.inputs.sources import missing_input, split_glob
from pipeline.storage.base import Entry, Storage
from pipeline.storage.open import open_storage
from pipeline.storage.uri import normalise
from pipeline.work.manifest import committed_units
from pipeline.work.plan import PLAN_PATH, Unit, read_plan

logger = logging.getLogger(__name__)


class Source(Config):
    """Shards of one folder.

    Attributes:
        uri: The folder.
        units: The shards.
    """

    uri: str
    units: tuple[Unit, ...]


class Seen:
    """The shards that earlier rounds have seen."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self._checksums: set[str] = set()
        self._places: set[tuple[str, int]] = set()
        for source in sources:
            folder = open_storage(source.uri)
            for unit in source.units:
                self._checksums.add(unit.sha256)
                self._places.add((folder.uri(unit.input), unit.bytes))

    def has_place(self, uri: str, size: int) -> bool:
        """Whether a tar of that size was seen at that place."""
        return (uri, size) in self._places

    def add(self, unit: Unit) -> bool:
        """Whether the shard is new; it is not new again."""
        is_new = unit.sha256 not in self._checksums
        self._checksums.add(unit.sha256)
        return is_new


def find_new_shards(given: Iterable[str], seen: Seen) -> list[Source]:
    """The shards of folders and globs that were not seen, by folder, sorted. A shard that is there twice counts once.

    What is still being written waits for a later round: an `air shard` that has not finished, a tar that is not whole.

    Args:
        given: Outputs of `air shard`, folders of tars, or globs of either, or of tars.
        seen: What does not count; the found shards are added.

    Raises:
        ConfigError: A folder does not exist or holds no shards. A glob may match nothing.
        JobFailedError: A folder is the output of another job.
    """
    found: dict[str, dict[str, Unit]] = {}
    for folder, tars in _places(given):
        for unit in _committed(folder) if tars is None else _whole(folder, tars, seen):
            if seen.add(unit):
                found.setdefault(folder.uri(), {})[unit.name] = unit
    return [Source(uri=uri, units=tuple(units[name] for name in sorted(units))) for uri, units in sorted(found.items())]


def _places(given: Iterable[str]) -> Iterator[tuple[Storage, list[Entry] | None]]:
    """Folders, each with its tars; None in place of these if the folder is the output of a job."""
    for location in map(normalise, given):
        folder = open_storage(location)
        glob = split_glob(location)
        if glob is None or next(folder.list(), None):  # a folder may have the name `day [1]`
            if (place := _place(folder)) is None:
                files = next(folder.list(), None)
                advice = f"{location} holds no shards: no file ends in .tar; make shards with `air shard`"
                raise ConfigError(advice) if files else missing_input(location)
            yield place
            continue
        above, matches = glob
        outputs, tars = set(), []
        for entry in above.list():
            names = entry.path.split("/")
            inside = next((name for name in accumulate(names[:-1], "{}/{}".format) if matches(name)), None)
            if inside is not None:
                outputs.add(inside)
            elif entry.path.endswith(".tar") and matches(entry.path):
                tars.append(entry)
        yield from filter(None, (_place(open_storage(above.uri(name))) for name in sorted(outputs)))
        if tars:
            yield above, tars


def _place(folder: Storage) -> tuple[Storage, list[Entry] | None] | None:
    """A folder with its tars, or without them if it is the output of a job; None if it has neither."""
    if folder.exists(PLAN_PATH):
        return folder, None
    tars = [entry for entry in folder.list() if entry.path.endswith(".tar")]
    return (folder, tars) if tars else None


def _committed(folder: Storage) -> Iterator[Unit]:
    plan = read_plan(folder)
    if plan.job == "shard" and {unit.name for unit in plan.units} - committed_units(folder):
        logger.warning("%s is not finished: its shards wait for a later round", folder.uri())
        return
    yield from list_shards(folder)


def _whole(folder: Storage, tars: Iterable[Entry], seen: Seen) -> Iterator[Unit]:
    for path, size in tars:
        if seen.has_place(folder.uri(path), size):
            continue
        try:
            yield foreign_shard(folder, path)
        except DamagedDataError as error:
            logger.warning("%s: it waits for a later round", error)
