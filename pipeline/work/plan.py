"""Plans of bulk work, and the layout of an output folder.

The commit protocol is plan, process, commit. It commits each unit exactly once, whichever process dies. An output
folder holds

    plan.json                              the work; another plan in the same folder is refused
    plan/<unit>-<checksum>.json            listings of input files, for units that are not a shard
    data/<unit>-<attempt>.*                results, invisible until a manifest names them
    quarantine/<unit>-<attempt>.parquet    rejected samples, invisible likewise
    manifest/<unit>.json                   the commit, created with put-if-absent (`pipeline.work.manifest`)
    lease/                                 who works in the folder (`pipeline.work.lease`)

A unit is the work of one task: an input shard, or a list of input files. This module must not know Ray, images or what
a job does with a unit.
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
"""Path of the plan in an output folder. A folder with this file is the output of a job."""

MAX_DIFFERENCES_SHOWN = 8
"""Differences between two plans that the message of `PlanMismatchError` lists."""


class Unit(Config):
    """The work of one task.

    Attributes:
        name: Unique in the plan and safe as a file name. Output files carry this name.
        input: Path of the input shard below the plan's source, or of the listing below the output folder.
        bytes: Size of the shard, or sum of the sizes of the listed images.
        sha256: Checksum of the shard or of the listing.
        samples: Number of samples; None if planning does not count them.
    """

    name: str
    input: str
    bytes: int
    sha256: str
    samples: int | None = None


class Plan(Config):
    """The work of a job in an output folder. Equal plans give equal results.

    `source` is the present place of the input. Inputs may move, so `hash` and `differences` leave `source` out.
    """

    job: str
    schema_version: int
    code_version: str
    config: dict[str, Any]
    units: tuple[Unit, ...]
    source: tuple[str, ...]

    @property
    def hash(self) -> str:
        """SHA-256 of everything that results depend on, hexadecimal."""
        return hashlib.sha256(self.model_dump_json(exclude={"source"}).encode()).hexdigest()

    @staticmethod
    def make(job: str, config: Config, units: Iterable[Unit], source: Iterable[str]) -> Plan:
        """The plan of a job with this version of the code."""
        return Plan(
            job=job,
            schema_version=tables.SCHEMA_VERSION,
            code_version=__version__,
            config=config.model_dump(mode="json"),
            units=tuple(sorted(units, key=lambda unit: unit.name)),
            source=tuple(map(printable, source)),
        )

    def holding(self, key: str, model: str, sha256: str) -> Plan:
        """The plan with a checksum in place of the path of weights, so that these may move but not change.

        Args:
            key: The key of the configuration that holds the path.
            model: The name of the weights in tables.
            sha256: Their checksum; empty for what has no weights, which keeps its name.
        """
        if not sha256:
            return self
        return self.model_copy(update={"config": {**self.config, key: f"{model}, sha256 {sha256}"}})

    def differences(self, other: Plan) -> list[str]:
        """The differences between this plan and `other`, one line each: `key: ours -> theirs`."""
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
    """Writes the plan into a new folder, or compares it with the folder's plan.

    Args:
        output: The output folder.
        plan: The plan of the run that begins.
        listings: Contents of the listings that units name as their input, by path below the output folder.

    Returns:
        The plan, equal to the folder's plan but for the source.

    Raises:
        PlanMismatchError: The folder belongs to another plan; the message lists what differs.
        StorageError: The folder has files but no plan.
    """
    if not output.exists(PLAN_PATH):
        # Listings are written first, so a plan never names a missing listing. A run that died here leaves listings.
        stranger = next((path for path, _ in output.list("") if not path.startswith(("plan/", "lease/"))), None)
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
            f"{output.uri()} belongs to another plan. The differences (that plan -> this run):{shown}{rest}\n"
            "Run with the settings and inputs of that plan, or choose a new folder."
        )
    return plan


def read_plan(output: Storage) -> Plan:
    """The plan of an output folder.

    Raises:
        StorageError: The folder has no plan, so it is not the output of a job.
        DamagedDataError: The file is not a valid plan.
    """
    if not output.exists(PLAN_PATH):
        raise StorageError(f"{output.uri(PLAN_PATH)} does not exist: {output.uri()} is not the output of a job")
    return parse_json(Plan, output, PLAN_PATH)


def parse_json(model: type[ConfigT], output: Storage, path: str) -> ConfigT:
    """A plan or manifest from its file.

    Raises:
        DamagedDataError: The file is not valid JSON of the model.
    """
    try:
        values = json.loads(output.read(path))
        if not isinstance(values, dict):
            raise ValueError("the file is not a JSON object")
        return build(model, values, path)
    except (ValueError, ConfigError) as error:
        raise DamagedDataError(f"{output.uri(path)} is not a {model.__name__.lower()}: {error}") from None
