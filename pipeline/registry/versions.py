"""Versions in a registry: published once, named by the checksum of their weights, never changed.

A publication writes its files under a random name, and `version.json`, which names them, last and with put-if-absent.
So a version without that file is what a killed publication left behind, and of several publications at once one
counts. This module must not know aliases.
"""

from __future__ import annotations

import math
import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from getpass import getuser
from pathlib import Path
from socket import gethostname

from pipeline.config import Config, suggestion
from pipeline.errors import RegistryError
from pipeline.identity import checksum_of, printable
from pipeline.storage.base import MissingFileError, Storage
from pipeline.storage.open import open_parent
from pipeline.weights import Kind, local_weights, read_weights
from pipeline.work.holder import utc_now
from pipeline.work.plan import parse_json

FOLDER = "versions"

ID_DIGITS = 16
"""Digits of the checksum in the id of a version."""

SHOWN_DIGITS = 12
"""Digits of a version's id that people see."""

ATTEMPT_TIME = "%Y%m%dT%H%M%SZ"
"""How the name of a publication's folder begins: with its time, UTC."""

_LEAST_DIGITS = 4  # of a checksum that a user types


class StoredFile(Config):
    """A file of a version, its path below the registry."""

    path: str
    bytes: int
    sha256: str


class Version(Config):
    """Published weights.

    Attributes:
        id: The first 16 digits of `sha256`.
        kind: What the weights are.
        model: Their name in tables.
        sha256: Checksum of the weights, hexadecimal.
        published: When, UTC, ISO 8601.
        by: User and machine.
        figures: What was measured, by name.
        weights: Path of NAME.safetensors below the registry; the card is NAME.json beside it.
        files: All files, weights and card included.
    """

    id: str
    kind: Kind
    model: str
    sha256: str
    published: str
    by: str
    figures: dict[str, float]
    weights: str
    files: tuple[StoredFile, ...]

    @property
    def short(self) -> str:
        """The id as people see it and type it after `@`."""
        return self.id[:SHOWN_DIGITS]


def version_path(identity: str) -> str:
    """The file that says that a version exists, below the registry."""
    return f"{FOLDER}/{identity}/version.json"


def publish(
    registry: Storage,
    weights: str,
    evidence: Mapping[str, str] | None = None,
    figures: Mapping[str, float] | None = None,
) -> Version:
    """Puts weights into a registry. Weights that are there already stay as they are, with their first evidence.

    Args:
        registry: The registry; a folder that does not exist becomes one.
        weights: Path or URI of NAME.safetensors, with its card beside it.
        evidence: Paths or URIs of files that say why to trust the weights, by the name that they get.
        figures: What was measured, by name, beside what the card says.

    Raises:
        CheckpointError: The weights or their card are missing, damaged or of no known kind.
        RegistryError: The registry holds other weights whose checksum begins with the same digits.
        StorageError: A file cannot be read or written.
    """
    with local_weights(weights) as local, tempfile.TemporaryDirectory(prefix="air-") as folder:
        card = read_weights(local)
        identity = card.sha256[:ID_DIGITS]
        found = find_version(registry, identity)
        if found is not None:
            return _same(found, card.sha256, registry)
        # The time in the name lets `pipeline.registry.gc` tell a publication at work from one that was killed.
        attempt = f"{FOLDER}/{identity}/{datetime.now(UTC):{ATTEMPT_TIME}}-{uuid.uuid4().hex[:8]}"
        target = f"{attempt}/{card.kind}.safetensors"
        sources = {target: local, posixpath.splitext(target)[0] + ".json": local.with_suffix(".json")}
        for name, uri in (evidence or {}).items():
            storage, path = open_parent(uri)
            copy = Path(folder) / uuid.uuid4().hex
            with storage.local_file(path) as file:
                copy.write_bytes(file.read_bytes())
            sources[f"{attempt}/evidence/{name}"] = copy
        files = [_store(registry, path, file) for path, file in sources.items()]
        measured = {**card.metrics, **(figures or {})}
        version = Version(
            id=identity,
            kind=card.kind,
            model=card.model,
            sha256=card.sha256,
            published=utc_now(),
            by=this_user(),
            figures={name: value for name, value in measured.items() if math.isfinite(value)},
            weights=target,
            files=tuple(files),
        )
    if registry.put_if_absent(version_path(identity), version.model_dump_json(indent=1).encode()):
        return version
    winner = read_version(registry, identity)
    if winner.weights != version.weights:  # else the store's answer was lost, and the version is this one
        registry.delete_folder(attempt)
    return _same(winner, card.sha256, registry)


def _store(registry: Storage, path: str, file: Path) -> StoredFile:
    registry.upload(file, path)
    return StoredFile(path=path, bytes=file.stat().st_size, sha256=checksum_of(file))


def _same(version: Version, sha256: str, registry: Storage) -> Version:
    if version.sha256 != sha256:
        raise RegistryError(
            f"{registry.uri()} holds other weights named {version.id} (sha256 {version.sha256}): the checksums "
            "begin alike; publish these weights in another registry"
        )
    return version


def find_version(registry: Storage, identity: str) -> Version | None:
    """The version with that id; None if it was never published, or removed."""
    try:
        return read_version(registry, identity)
    except MissingFileError:
        return None


def read_version(registry: Storage, identity: str) -> Version:
    """The version with that id.

    Raises:
        MissingFileError: There is none.
        DamagedDataError: Its file is not valid.
    """
    return parse_json(Version, registry, version_path(identity))


def version_ids(registry: Storage) -> list[str]:
    """The ids of all versions, sorted. Lists the folder and reads no file."""
    return [path.split("/")[1] for path, _ in registry.list(FOLDER) if path == version_path(path.split("/")[1])]


def read_versions(registry: Storage) -> Iterator[Version]:
    """All versions, sorted by id."""
    for identity in version_ids(registry):
        version = find_version(registry, identity)
        if version is not None:  # else removed meanwhile
            yield version


def version_by_digits(registry: Storage, digits: str) -> Version:
    """The version whose checksum begins with these digits.

    Args:
        registry: The registry.
        digits: At least four hexadecimal digits; more than 16 are compared, too.

    Raises:
        RegistryError: There is none, or several. The message lists what exists.
    """
    digits = digits.lower()
    ids = version_ids(registry)
    found = [identity for identity in ids if identity.startswith(digits[:ID_DIGITS])]
    if len(digits) < _LEAST_DIGITS or len(found) > 1:
        raise RegistryError(
            f"@{digits} names no single version of {registry.uri()}: give more digits of {listed_versions(ids)}"
        )
    version = find_version(registry, found[0]) if found else None
    if version is None or not version.sha256.startswith(digits):
        hint = suggestion(digits, [identity[: len(digits)] for identity in ids])
        raise RegistryError(f"{registry.uri()} has no version @{digits}{hint}; it has {listed_versions(ids)}")
    return version


def listed_versions(ids: list[str]) -> str:
    """The versions as a message lists them."""
    most = 12
    shown = ", ".join(f"@{identity[:SHOWN_DIGITS]}" for identity in ids[:most])
    return (shown + (f" and {len(ids) - most} more" if len(ids) > most else "")) or "no version"


def weights_uri(registry: Storage, version: Version) -> str:
    """The location of a version's weights, for everything that takes a file NAME.safetensors."""
    return registry.uri(version.weights)


def this_user() -> str:
    """Who works here, as user@machine."""
    user = str(os.getuid())
    with suppress(OSError, KeyError):  # a container may have no entry for the number
        user = getuser()
    return printable(f"{user}@{gethostname()}")
