"""Holding an output folder against its own manifests: verification, and the removal of what no manifest names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pyarrow.parquet as pq

from pipeline.errors import DamagedDataError
from pipeline.shards import count_samples
from pipeline.storage import Storage
from pipeline.work import DataFile, Plan, named_files, read_manifest, read_manifests, read_plan


def remove_garbage(output: Storage) -> tuple[int, int]:
    """Removes data and quarantine files that no manifest names: what killed and beaten attempts left behind.

    An attempt that is still at work loses its files, so call this only when none is.

    Returns:
        How many files were removed, and their bytes.
    """
    named = {file.path for manifest in read_manifests(output) for file in named_files(manifest)}
    files, total = 0, 0
    for folder in ("data", "quarantine"):
        for path, size in list(output.list(folder)):
            if path not in named:
                output.delete(path)
                files, total = files + 1, total + size
    return files, total


def verify(output: Storage) -> Iterator[str]:
    """Recounts and rechecksums everything that manifests name; yields one line for each thing that is wrong.

    An output folder that is whole and intact yields nothing.
    """
    plan = read_plan(output)
    yield from _verify_listings(output, plan)
    planned = {unit.name for unit in plan.units}
    for path, _ in output.list("manifest"):
        try:
            manifest = read_manifest(output, path)
        except DamagedDataError as error:
            yield str(error)
            continue
        if path != f"manifest/{manifest.unit}.json":
            yield f"{path}: speaks of {manifest.unit}"
            continue
        if manifest.unit not in planned:
            yield f"{path}: unit {manifest.unit} is not in the plan"
        planned.discard(manifest.unit)
        if manifest.plan != plan.hash:
            yield f"{path}: committed under another plan ({manifest.plan[:12]}, expected {plan.hash[:12]})"
        rejected = manifest.quarantine.rows if manifest.quarantine else 0
        if rejected != sum(manifest.rejected.values()):
            yield f"{path}: {sum(manifest.rejected.values())} rejections counted, {rejected} in quarantine"
        for file in named_files(manifest):
            yield from (f"{path}: {problem}" for problem in _verify_file(output, file))
    yield from (f"unit {name} is not done" for name in sorted(planned))


def _verify_listings(output: Storage, plan: Plan) -> Iterator[str]:
    for unit in plan.units:
        if unit.input != f"plan/{unit.name}.json":
            continue  # a shard somewhere else
        if not output.exists(unit.input):
            yield f"{unit.input} is missing"
        elif hashlib.sha256(output.read(unit.input)).hexdigest() != unit.sha256:
            yield f"{unit.input} is not the listing that the plan names"


def _verify_file(output: Storage, file: DataFile) -> Iterator[str]:
    if not output.exists(file.path):
        yield f"{file.path} is missing"
        return
    with output.local_file(file.path) as local:
        size = local.stat().st_size
        with local.open("rb") as stream:
            checksum = hashlib.file_digest(stream, "sha256").hexdigest()
        if (size, checksum) != (file.bytes, file.sha256):
            yield (
                f"{file.path} is damaged: {size} bytes with sha256 {checksum[:12]}, "
                f"expected {file.bytes} with {file.sha256[:12]}"
            )
            return
        rows = count_samples(local) if file.path.endswith(".tar") else pq.read_metadata(local).num_rows
        if rows != file.rows:
            yield f"{file.path} holds {rows} rows, expected {file.rows}"
