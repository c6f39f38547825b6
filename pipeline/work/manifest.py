"""Manifests: what exists, as far as readers are concerned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.config import Config
from pipeline.storage.base import Storage
from pipeline.work.plan import parse_json


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
    return parse_json(Manifest, output, path)


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


def named_files(manifest: Manifest) -> list[DataFile]:
    """All files that the manifest vouches for."""
    return [*manifest.files, *([manifest.quarantine] if manifest.quarantine else [])]


def count_rows(files: Iterable[DataFile]) -> int:
    """Rows of the tables among committed files, or samples where there are tars alone."""
    files = list(files)
    tables_alone = [file for file in files if file.path.endswith(".parquet")]
    return sum(file.rows for file in tables_alone or files)
