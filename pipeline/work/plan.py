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
from collections.abc import Iterable, Mapping
from typing import Any

from air.version import __version__
from pipeline.config import Config, ConfigT, build
from pipeline.errors import ConfigError, DamagedDataError, PlanMismatchError, StorageError
from pipeline.formats import tables
from pipeline.identity import printable
from pipeline.storage.base import Storage

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
            code_version=__version__,
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
    return parse_json(Plan, output, PLAN_PATH)


def parse_json(model: type[ConfigT], output: Storage, path: str) -> ConfigT:
    try:
        values = json.loads(output.read(path))
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        return build(model, values, path)
    except (ValueError, ConfigError) as error:
        raise DamagedDataError(f"{output.uri(path)} is not a {model.__name__.lower()}: {error}") from None
