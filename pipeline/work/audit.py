"""Compares an output folder with its manifests: verifies files, takes back broken commits, removes unnamed files.

This module must not know what a job writes into its files, beyond the number of rows.
"""

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
    """Removes files that neither a manifest nor the plan names. Attempts that died leave such files behind.

    An attempt at work would lose its files, so call this only when no attempt is at work.

    Returns:
        The number of removed files, and their bytes together.
    """
    files, total = 0, 0
    for path, size in _unnamed(output):
        output.delete(path)
        files, total = files + 1, total + size
    return files, total


def _unnamed(output: Storage) -> list[Entry]:
    """Files in the folders of the commit protocol that neither a manifest nor the plan names."""
    named = {file.path for manifest in read_manifests(output) for file in named_files(manifest)}
    named |= {unit.input for unit in read_plan(output).units}
    return [
        entry for folder in ("data", "quarantine", "plan") for entry in output.list(folder) if entry.path not in named
    ]


def check_present(output: Storage, manifests: Sequence[Manifest]) -> None:
    """Compares the sizes of committed files with a listing of the folder. Reads no file.

    Raises:
        DamagedDataError: A file is missing or has another size.
    """
    sizes = {path: size for folder in ("data", "quarantine") for path, size in output.list(folder)}
    bad = [file.path for manifest in manifests for file in named_files(manifest) if sizes.get(file.path) != file.bytes]
    if bad:
        raise DamagedDataError(
            f"{output.uri()}: {len(bad)} committed files are missing or have another size ({bad[0]} first). "
            f"Run `air verify --repair {output.uri()}`, which takes their commits back; then run this command again."
        )


def verify(output: Storage) -> Iterator[str]:
    """Checks the checksum and the number of rows of every file that a manifest names.

    Yields:
        One line for each fault: a damaged, missing or unnamed file, a broken manifest, a unit that is not done.
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
    if sound and not missing:  # otherwise a job may be at work, whose files no manifest names yet
        yield from (f"no manifest names {path}; `air gc` removes it" for path, _ in _unnamed(output))


def repair(output: Storage) -> list[str]:
    """Removes every manifest that does not verify, so that the next run of the job does these units again.

    Returns:
        The paths of the removed manifests.
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
        raise DamagedDataError(f"{path}: the manifest is of {manifest.unit}")
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
            continue  # a shard in another folder
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
