"""Holding an output folder against its own manifests: verification, and the removal of what no manifest names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import pyarrow.parquet as pq

from pipeline.errors import DamagedDataError
from pipeline.formats.tars import count_samples
from pipeline.identity import checksum_of
from pipeline.storage.base import Entry, Storage
from pipeline.work.manifest import DataFile, Manifest, named_files, read_manifest, read_manifests
from pipeline.work.plan import Plan, read_plan


def remove_garbage(output: Storage) -> tuple[int, int]:
    """Removes what no manifest and no plan names: files that killed and beaten attempts left behind.

    An attempt that is still at work loses its files, so call this only when none is.

    Returns:
        How many files were removed, and their bytes.
    """
    files, total = 0, 0
    for path, size in _unnamed(output):
        output.delete(path)
        files, total = files + 1, total + size
    return files, total


def _unnamed(output: Storage) -> list[Entry]:
    """Files in the folders of the protocol that neither the plan nor a manifest names."""
    named = {file.path for manifest in read_manifests(output) for file in named_files(manifest)}
    named |= {unit.input for unit in read_plan(output).units}
    return [
        entry for folder in ("data", "quarantine", "plan") for entry in output.list(folder) if entry.path not in named
    ]


def check_present(output: Storage, manifests: Sequence[Manifest]) -> None:
    """Holds the sizes of committed files against a listing, which costs no reading.

    Raises:
        DamagedDataError: A file is missing or has another size.
    """
    sizes = {path: size for folder in ("data", "quarantine") for path, size in output.list(folder)}
    bad = [file.path for manifest in manifests for file in named_files(manifest) if sizes.get(file.path) != file.bytes]
    if bad:
        raise DamagedDataError(
            f"{output.uri()}: {len(bad)} committed files are missing or cut ({bad[0]} first). "
            f"`air verify --repair {output.uri()}` takes their commits back; then run this command again."
        )


def verify(output: Storage) -> Iterator[str]:
    """Recounts and rechecksums everything that manifests name; yields one line for each thing that is wrong.

    An output folder that is whole and intact, and holds nothing else, yields nothing.
    """
    plan = read_plan(output)
    yield from _verify_listings(output, plan)
    planned, plan_hash = {unit.name for unit in plan.units}, plan.hash
    missing = set(planned)
    sound = True
    for path, _ in output.list("manifest"):
        try:
            manifest = _read_commit(output, path)
        except DamagedDataError as error:
            sound = False
            yield str(error)
            continue
        missing.discard(manifest.unit)
        for problem in _verify_commit(output, planned, plan_hash, manifest):
            sound = False
            yield f"{path}: {problem}"
    yield from (f"unit {name} is not done" for name in sorted(missing))
    if sound and not missing:  # else a job may be at work, whose files have no names yet
        yield from (f"{path} is named by no manifest; `air gc` removes it" for path, _ in _unnamed(output))


def repair(output: Storage) -> list[str]:
    """Takes back every commit that does not verify, so that running the job again does those units anew.

    Returns:
        The manifests that were removed.
    """
    plan = read_plan(output)
    planned, plan_hash = {unit.name for unit in plan.units}, plan.hash
    broken = []
    for path, _ in list(output.list("manifest")):
        try:
            manifest = _read_commit(output, path)
        except DamagedDataError:
            broken.append(path)
            continue
        if any(_verify_commit(output, planned, plan_hash, manifest)):
            broken.append(path)
    for path in broken:
        output.delete(path)
    return broken


def _read_commit(output: Storage, path: str) -> Manifest:
    manifest = read_manifest(output, path)
    if path != f"manifest/{manifest.unit}.json":
        raise DamagedDataError(f"{path}: speaks of {manifest.unit}")
    return manifest


def _verify_commit(output: Storage, planned: set[str], plan_hash: str, manifest: Manifest) -> Iterator[str]:
    if manifest.unit not in planned:
        yield f"unit {manifest.unit} is not in the plan"
    if manifest.plan != plan_hash:
        yield f"committed under another plan ({manifest.plan[:12]}, expected {plan_hash[:12]})"
    rejected = manifest.quarantine.rows if manifest.quarantine else 0
    if rejected != sum(manifest.rejected.values()):
        yield f"{sum(manifest.rejected.values())} rejections counted, {rejected} in quarantine"
    for file in named_files(manifest):
        yield from _verify_file(output, file)


def _verify_listings(output: Storage, plan: Plan) -> Iterator[str]:
    for unit in plan.units:
        if not unit.input.startswith("plan/"):
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
        size, checksum = local.stat().st_size, checksum_of(local)
        if (size, checksum) != (file.bytes, file.sha256):
            yield (
                f"{file.path} is damaged: {size} bytes with sha256 {checksum[:12]}, "
                f"expected {file.bytes} with {file.sha256[:12]}"
            )
            return
        rows = count_samples(local) if file.path.endswith(".tar") else pq.read_metadata(local).num_rows
        if rows != file.rows:
            yield f"{file.path} holds {rows} rows, expected {file.rows}"
