"""Names of weights in a registry, as commands take them wherever they take a file NAME.safetensors.

    registry://LOCATION/champion        an alias; LOCATION is a local path or a URI, such as s3://bucket/models
    registry://LOCATION/@1f3a9c0b       a version, by the first digits of its checksum
    champion, @1f3a9c0b                 in the registry that the environment variable AIR_REGISTRY names

A name is resolved once, while a job is planned. The location that comes out names one version, and the plan holds its
checksum. So a job that goes on in its folder goes on with that version, even if the alias has moved.
"""

from __future__ import annotations

import logging
import os
import re
from typing import NamedTuple

from air.defaults import ADAM, AUTO, COMPACT, GRID, GROW, SHIPPED
from air.errors import CheckpointError
from pipeline.errors import RegistryError
from pipeline.registry.aliases import alias_names, existing_move, history
from pipeline.registry.versions import (
    ID_DIGITS,
    SHOWN_DIGITS,
    Version,
    find_version,
    listed_versions,
    version_by_digits,
    version_ids,
    weights_uri,
)
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.weights import KINDS, Kind
from pipeline.work.plan import PLAN_PATH, read_plan

logger = logging.getLogger(__name__)

ENVIRONMENT = "AIR_REGISTRY"
"""The environment variable that names the registry of bare names."""

SCHEME = "registry://"

_BUILT_IN = frozenset({GRID, COMPACT, GROW, AUTO, ADAM, SHIPPED})
_HELD = re.compile(r".*, sha256 ([0-9a-f]{64})")  # as `Plan.holding` writes it


class Name(NamedTuple):
    """A name in a registry: `name` is an alias, or `@` and the first digits of a checksum."""

    registry: Storage
    name: str


def parse_name(text: str) -> Name | None:
    """The registry and the name in it; None if `text` names no registry: a built-in name or a file.

    Raises:
        RegistryError: `text` begins with registry://, but has no location or no name.
        StorageError: The location is not one.
    """
    if text.startswith(SCHEME):
        location, slash, name = text.removeprefix(SCHEME).rstrip("/").rpartition("/")
        if not slash or not name or not location.strip(":/"):
            raise RegistryError(
                f"{text}: write {SCHEME}LOCATION/NAME, such as {SCHEME}s3://bucket/models/champion, "
                f"{SCHEME}/srv/models/champion or {SCHEME}models/@1f3a9c0b"
            )
        return Name(open_storage(location), name)
    location = os.environ.get(ENVIRONMENT)
    if text in _BUILT_IN or "/" in text or text.endswith(".safetensors") or not location:
        return None
    return Name(open_storage(location), text)


def locate(text: str, kind: Kind, output: Storage | None = None, key: str = "") -> str:
    """The location of the weights that a name in a registry stands for; `text` itself if it names no registry.

    Args:
        text: As the user gave it.
        kind: What the weights must be.
        output: The output folder of the job. If its plan holds a version that the alias has pointed to, that counts.
        key: The key of the plan's configuration that holds the weights.

    Raises:
        CheckpointError: The registry has no such version or alias, or the weights are of another kind. The message
            lists what the registry has.
        StorageError: The registry cannot be read.
    """
    try:
        found = parse_name(text)
        if found is None:
            return text
        version = _find(found, output, key)
    except RegistryError as error:
        raise CheckpointError(str(error)) from None
    if version.kind != kind:
        raise CheckpointError(f"{text} is {KINDS[version.kind]} ({version.model}), and not {KINDS[kind]}")
    return weights_uri(found.registry, version)


def named_version(registry: Storage, name: str) -> Version:
    """The version that a name stands for.

    Args:
        registry: The registry.
        name: An alias, or `@` and the first digits of a checksum.

    Raises:
        RegistryError: There is no such version or alias. The message lists those that exist.
    """
    if not alias_names(registry) and not version_ids(registry):
        raise RegistryError(f"{registry.uri()} is no registry: it holds no version; `air registry add` begins one")
    if name.startswith("@"):
        return version_by_digits(registry, name[1:])
    try:
        return _present(registry, existing_move(registry, name).version, name)
    except RegistryError as error:
        raise RegistryError(f"{error}; and {listed_versions(version_ids(registry))}") from None


def describe_unknown(text: str) -> str:
    """What to add to a message about an unknown name of weights: how a registry would know it."""
    if "/" in text or os.environ.get(ENVIRONMENT):
        return ""
    return f"; a name of a registry is {SCHEME}LOCATION/NAME, or NAME with {ENVIRONMENT} set"


def _find(found: Name, output: Storage | None, key: str) -> Version:
    held = _held(output, key) if output is not None and not found.name.startswith("@") else None
    if held is not None:
        identity = held[:ID_DIGITS]
        moves = history(found.registry, found.name)
        if any(move.version == identity for move in moves):
            if moves[-1].version != identity:
                logger.warning(
                    "%s goes on with @%s, which %s was when its plan was made; it is @%s now",
                    output.uri() if output else "",
                    identity[:SHOWN_DIGITS],
                    found.name,
                    moves[-1].version[:SHOWN_DIGITS],
                )
            return _present(found.registry, identity, found.name)
    return named_version(found.registry, found.name)


def _held(output: Storage, key: str) -> str | None:
    """The checksum that the plan of an output folder holds under a key; None if there is none."""
    if not output.exists(PLAN_PATH):
        return None
    match = _HELD.fullmatch(str(read_plan(output).config.get(key)))
    return match[1] if match else None


def _present(registry: Storage, identity: str, name: str) -> Version:
    version = find_version(registry, identity)
    if version is None:
        raise RegistryError(
            f"{name} of {registry.uri()} was @{identity[:SHOWN_DIGITS]}, which is no longer there: add its weights "
            "again with `air registry add`, or choose another version"
        )
    return version
