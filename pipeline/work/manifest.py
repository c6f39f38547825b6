"""Manifests: the commits of units, and the only files that tell readers what an output folder holds.

An attempt at a unit writes its files, then creates `manifest/<unit>.json` with put-if-absent. The first attempt to do
so has committed; another attempt removes its own files. This module must not know what made the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pydantic import Field

from pipeline.config import Config
from pipeline.storage.base import Storage
from pipeline.work.plan import parse_json


class DataFile(Config):
    """A committed file. `rows` counts Parquet rows or WebDataset samples."""

    path: str
    bytes: int
    sha256: str
    rows: int


class Manifest(Config):
    """The result of one unit. Creating this file is the commit.

    Attributes:
        unit: Name of the unit.
        attempt: Drawn at random; part of the names of the attempt's files.
        plan: Hash of the plan.
        files: The data files.
        quarantine: The file of rejected samples; None if every sample was used.
        samples: Number of samples in the unit, rejected ones included.
        rejected: Number of rejected samples by reason.
        seconds: Wall time of the attempt.
        seconds_by_part: The same by part: prepare, read, process, write. Empty in manifests of earlier versions.
        summary: Sums that the job chooses, such as views or decibels, so that totals need no data file.
        fence: Fencing number of the lease that the attempt worked under (`pipeline.work.lease`); None before there were
            leases.
    """

    unit: str
    attempt: str
    plan: str
    files: tuple[DataFile, ...]
    quarantine: DataFile | None
    samples: int
    rejected: dict[str, int]
    seconds: float
    seconds_by_part: dict[str, float] = Field(default_factory=dict)
    summary: dict[str, float]
    fence: int | None = None


def read_manifests(output: Storage) -> Iterator[Manifest]:
    """All manifests of an output folder, sorted by unit."""
    for path, _ in output.list("manifest"):
        yield read_manifest(output, path)


def read_manifest(output: Storage, path: str) -> Manifest:
    """One manifest.

    Raises:
        DamagedDataError: The file is not a valid manifest.
    """
    return parse_json(Manifest, output, path)


def read_quarantine(output: Storage) -> Iterator[dict[str, Any]]:
    """The committed rows of quarantine (`pipeline.formats.tables.QUARANTINE`), unit by unit."""
    for manifest in read_manifests(output):
        if manifest.quarantine is not None:
            with output.local_file(manifest.quarantine.path) as local:
                rows = pq.read_table(local).to_pylist()
            yield from rows


def committed_units(output: Storage) -> set[str]:
    """Names of the committed units. Lists the folder and reads no file."""
    return {Path(path).stem for path, _ in output.list("manifest")}


def commit(output: Storage, manifest: Manifest) -> Manifest:
    """Commits an attempt, or removes its files if another attempt has committed the unit.

    Returns:
        The committed manifest: `manifest`, or that of the other attempt.
    """
    path = f"manifest/{manifest.unit}.json"
    if output.put_if_absent(path, manifest.model_dump_json(indent=1).encode()):
        return manifest
    winner = read_manifest(output, path)
    for file in named_files(manifest):
        # A put that was repeated after a lost answer finds its own manifest. Then the files are committed.
        if winner.attempt != manifest.attempt:
            output.delete(file.path)
    return winner


def named_files(manifest: Manifest) -> list[DataFile]:
    """All files that the manifest names."""
    return [*manifest.files, *([manifest.quarantine] if manifest.quarantine else [])]


def count_rows(files: Iterable[DataFile]) -> int:
    """The number of rows in the Parquet files among committed files; without Parquet files, of samples in the tars."""
    files = list(files)
    tables_alone = [file for file in files if file.path.endswith(".parquet")]
    return sum(file.rows for file in tables_alone or files)
