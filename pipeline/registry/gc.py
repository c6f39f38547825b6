"""Removes versions that no alias needs, and what killed publications left behind.

A version goes if no alias points to it, none of the newest entries of any alias's history names it, and it is old. So a
rollback finds what it needs. Removing happens beside promotions and publications: `version.json` goes first, then all
aliases are read again; a version that has got an alias meanwhile comes back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from pipeline.registry.aliases import alias_names, history
from pipeline.registry.versions import ATTEMPT_TIME, FOLDER, Version, find_version, read_versions, version_path
from pipeline.storage.base import Storage
from pipeline.work.holder import seconds_since

_ATTEMPT = re.compile(r"(\d{8}T\d{6}Z)-[0-9a-f]+")


@dataclass(frozen=True)
class Garbage:
    """What nobody needs.

    Attributes:
        versions: Versions without an alias, in order of their id.
        attempts: Folders of publications that were not completed, below the registry.
    """

    versions: tuple[Version, ...]
    attempts: tuple[str, ...]


def find_garbage(registry: Storage, keep: int, min_seconds: float) -> Garbage:
    """Lists what can be removed; removes nothing.

    Args:
        registry: The registry.
        keep: The newest entries of each alias's history whose versions stay.
        min_seconds: What is younger stays: it may be about to get an alias.
    """
    needed = needed_versions(registry, keep)
    versions = list(read_versions(registry))
    published = {version.weights.rsplit("/", 1)[0] for version in versions}
    return Garbage(
        versions=tuple(
            version
            for version in versions
            if version.id not in needed and seconds_since(version.published) >= min_seconds
        ),
        attempts=tuple(
            folder
            for folder, seconds in _attempts(registry, FOLDER)
            if folder not in published and seconds >= min_seconds
        ),
    )


def needed_versions(registry: Storage, keep: int) -> set[str]:
    """Ids of the versions that an alias points to, or that one of the `keep` newest entries of its history names."""
    needed: set[str] = set()
    for alias in alias_names(registry):
        moves = history(registry, alias)
        needed.update(move.version for move in moves[-max(1, keep) :])
        needed.update(move.before for move in moves[-keep:] if keep and move.before)
    return needed


def remove_version(registry: Storage, version: Version, keep: int) -> bool:
    """Removes a version, unless an alias has moved to it meanwhile: False then.

    Args:
        registry: The registry.
        version: From `find_garbage`.
        keep: As for `find_garbage`.
    """
    path = version_path(version.id)
    registry.delete(path)
    if version.id in needed_versions(registry, keep):
        registry.put_if_absent(path, version.model_dump_json(indent=1).encode())
        return False
    registry.delete_folder(version.weights.rsplit("/", 1)[0])
    return True


def remove_attempt(registry: Storage, attempt: str) -> bool:
    """Removes the files of a publication that was not completed, unless it has been completed meanwhile: False then.

    Args:
        registry: The registry.
        attempt: From `find_garbage`.
    """
    version = find_version(registry, attempt.split("/")[1])
    if version is not None and version.weights.startswith(attempt + "/"):
        return False
    registry.delete_folder(attempt)
    return True


def _attempts(registry: Storage, folder: str) -> Iterator[tuple[str, float]]:
    """The folders of all publications, and their age in seconds."""
    seen = set()
    for path, _ in registry.list(folder):
        parts = path.split("/")
        match = _ATTEMPT.fullmatch(parts[2]) if len(parts) > 3 else None
        attempt = "/".join(parts[:3])
        if match and attempt not in seen:
            seen.add(attempt)
            begun = datetime.strptime(match[1], ATTEMPT_TIME).replace(tzinfo=UTC)
            yield attempt, seconds_since(begun.isoformat())
