"""How bulk work is planned and committed, exactly once whatever dies (architecture: plan, process, commit).

An output folder holds

    plan.json                          what is to be done; another plan in the same folder is refused
    plan/<unit>.json                   listings that the plan names by checksum, where a unit is many input files
    data/<unit>-<attempt>.*            results, invisible until a manifest names them
    quarantine/<unit>-<attempt>.parquet
    manifest/<unit>.json               created with put-if-absent: the commit

A unit is the work of one task: an input shard, or a list of input files. This module knows nothing of Ray or of images.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import air
from pipeline.config import Config, ConfigT, build
from pipeline.errors import ConfigError, DamagedDataError, PlanMismatchError, StorageError
from pipeline.formats import tables
from pipeline.storage.open import Storage

PLAN_PATH = "plan.json"
MAX_DIFFERENCES_SHOWN = 8


class Unit(Config):
    """The work of one task.

    Attributes:
        name: Unique in the plan, safe as a file name; outputs are named after it.
        input: Path of the input shard or of the listing of input files, below the plan's source or output.
        bytes: Size of the input.
        sha256: Checksum of that shard or listing.
        samples: How many samples it holds, where that is known beforehand.
    """

    name: str
    input: str
    bytes: int
    sha256: str
    samples: int | None = None


class Plan(Config):
    """What a job is to do in an output folder. Equal plans give equal results.

    `source` tells where the input lies now; it may move, so it is not compared.
    """

    job: str
    schema_version: int
    code_version: str
    config: dict[str, Any]
    units: tuple[Unit, ...]
    source: tuple[str, ...]

    @property
    def hash(self) -> str:
        """SHA-256 over all that results depend on, hexadecimal."""
        return hashlib.sha256(self.model_dump_json(exclude={"source"}).encode()).hexdigest()

    @staticmethod
    def make(job: str, config: Config, units: Iterable[Unit], source: Iterable[str]) -> Plan:
        """The plan of `job` with this version of the code."""
        return Plan(
            job=job,
            schema_version=tables.SCHEMA_VERSION,
            code_version=air.__version__,
            config=config.model_dump(mode="json"),
            units=tuple(sorted(units, key=lambda unit: unit.name)),
            source=tuple(map(printable, source)),
        )

    def differences(self, other: Plan) -> list[str]:
        """What distinguishes `other` from this plan, one line each: `key: ours -> theirs`."""
        found = []
        for name in ("job", "schema_version", "code_version"):
            if getattr(self, name) != getattr(other, name):
                found.append(f"{name}: {getattr(self, name)} -> {getattr(other, name)}")
        for key in sorted(self.config.keys() | other.config.keys()):
            ours, theirs = self.config.get(key), other.config.get(key)
            if ours != theirs:
                found.append(f"{key}: {ours} -> {theirs}")
        our_units = {unit.name: unit for unit in self.units}
        their_units = {unit.name: unit for unit in other.units}
        found += [f"input {name} is gone" for name in sorted(our_units.keys() - their_units.keys())]
        found += [f"input {name} is new" for name in sorted(their_units.keys() - our_units.keys())]
        for name in sorted(our_units.keys() & their_units.keys()):
            ours, theirs = our_units[name], their_units[name]
            if ours != theirs:
                found.append(
                    f"input {name} has changed ({ours.bytes} bytes, sha256 {ours.sha256[:12]} -> "
                    f"{theirs.bytes} bytes, sha256 {theirs.sha256[:12]})"
                )
        return found


def settle_plan(output: Storage, plan: Plan, listings: Mapping[str, bytes] | None = None) -> Plan:
    """Writes the plan into a fresh folder, or holds it against the one that is there.

    Args:
        output: The output folder.
        plan: What is to be done.
        listings: Files that units name as their input, by path below the output.

    Returns:
        The plan, now that of the folder.

    Raises:
        PlanMismatchError: The folder belongs to another plan; the message lists what differs.
        StorageError: The folder holds files but no plan.
    """
    if not output.exists(PLAN_PATH):
        # Listings come first, so a plan never names one that is missing; they may be left of a run that died here.
        stranger = next((path for path, _ in output.list("") if not path.startswith("plan/")), None)
        if stranger is not None:
            raise StorageError(
                f"{output.uri()} is not empty and has no {PLAN_PATH} (it holds {stranger}); choose a new folder"
            )
        for path, content in (listings or {}).items():
            output.write(path, content)
        if output.put_if_absent(PLAN_PATH, plan.model_dump_json(indent=1).encode()):
            return plan
    differences = read_plan(output).differences(plan)
    if differences:
        shown = "".join(f"\n  {line}" for line in differences[:MAX_DIFFERENCES_SHOWN])
        more = len(differences) - MAX_DIFFERENCES_SHOWN
        rest = f"\n  and {more} more" if more > 0 else ""
        raise PlanMismatchError(
            f"{output.uri()} belongs to another plan; it differs (there -> now) in{shown}{rest}\n"
            "Run with the plan it was begun with, or choose a new folder."
        )
    return plan


def read_plan(output: Storage) -> Plan:
    """The plan of an output folder.

    Raises:
        StorageError: There is none: the folder is not the output of a job.
        DamagedDataError: It cannot be understood.
    """
    if not output.exists(PLAN_PATH):
        raise StorageError(f"{output.uri(PLAN_PATH)} does not exist: {output.uri()} is not the output of a job")
    return _parse(Plan, output, PLAN_PATH)


class DataFile(Config):
    """A file that a manifest vouches for. `rows` are Parquet rows or WebDataset samples."""

    path: str
    bytes: int
    sha256: str
    rows: int


class Manifest(Config):
    """What one unit gave; its creation is the commit.

    `summary` holds sums that the job chooses, such as views or decibels, so that totals need no data file.
    """

    unit: str
    attempt: str
    plan: str
    files: tuple[DataFile, ...]
    quarantine: DataFile | None
    samples: int
    rejected: dict[str, int]
    seconds: float
    summary: dict[str, float]


def read_manifests(output: Storage) -> Iterator[Manifest]:
    """All commits of an output folder, by unit."""
    for path, _ in output.list("manifest"):
        yield read_manifest(output, path)


def read_manifest(output: Storage, path: str) -> Manifest:
    """One commit.

    Raises:
        DamagedDataError: It cannot be understood.
    """
    return _parse(Manifest, output, path)


def _parse(model: type[ConfigT], output: Storage, path: str) -> ConfigT:
    try:
        values = json.loads(output.read(path))
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        return build(model, values, path)
    except (ValueError, ConfigError) as error:
        raise DamagedDataError(f"{output.uri(path)} is not a {model.__name__.lower()}: {error}") from None


def read_quarantine(output: Storage) -> Iterator[dict[str, Any]]:
    """The committed rows of quarantine (`pipeline.formats.tables.QUARANTINE`), unit by unit."""
    for manifest in read_manifests(output):
        if manifest.quarantine is not None:
            with output.local_file(manifest.quarantine.path) as local:
                rows = pq.read_table(local).to_pylist()
            yield from rows


def committed_units(output: Storage) -> set[str]:
    """Names of the units that are done, from a listing alone."""
    return {Path(path).stem for path, _ in output.list("manifest")}


def commit(output: Storage, manifest: Manifest) -> Manifest:
    """Makes the manifest's files visible, unless another attempt was first; then this attempt's files are removed.

    Returns:
        The manifest in place.
    """
    path = f"manifest/{manifest.unit}.json"
    if output.put_if_absent(path, manifest.model_dump_json(indent=1).encode()):
        return manifest
    winner = read_manifest(output, path)
    for file in named_files(manifest):
        # A put that was retried after a lost answer finds its own manifest in place: then nothing is garbage.
        if winner.attempt != manifest.attempt:
            output.delete(file.path)
    return winner


def checksum_of(local: Path) -> str:
    """SHA-256 of a local file, hexadecimal; reads it in pieces."""
    with local.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def named_files(manifest: Manifest) -> list[DataFile]:
    """All files that the manifest vouches for."""
    return [*manifest.files, *([manifest.quarantine] if manifest.quarantine else [])]


def count_rows(files: Iterable[DataFile]) -> int:
    """Rows of the tables among committed files, or samples where there are tars alone."""
    files = list(files)
    tables_alone = [file for file in files if file.path.endswith(".parquet")]
    return sum(file.rows for file in tables_alone or files)


def file_safe(name: str) -> str:
    """The name with everything but letters, digits, `_`, `-` and `=` replaced, for use in output file names."""
    return re.sub(r"[^\w=-]", "_", name, flags=re.ASCII)


def printable(name: str) -> str:
    """The name as Unicode that every format can hold: a byte that is no UTF-8 becomes an escape."""
    return name.encode("utf-8", "backslashreplace").decode()


def seed_of(*parts: str | int) -> int:
    """A 64-bit seed from the plan's seed and an image's key: the same on every machine, in any order."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")
