"""Lists images and WebDataset shards as units of work, and reads the samples of a unit.

A shard is a tar with an image member and a JSON member per sample. `air shard` writes shards, and its committed ones
count; a folder of tars from other programs is taken as well. webdataset's iterators read them. This module must not
know which job reads the samples, nor anything of Gaussians.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from pipeline.errors import DamagedDataError, JobFailedError, Reason, Rejected
from pipeline.formats import images
from pipeline.formats.tars import count_samples, member_bytes, tar_bytes
from pipeline.identity import checksum_of, file_safe, printable
from pipeline.inputs.sources import Item, ItemReader, find_items, missing_input
from pipeline.storage.base import Storage
from pipeline.work.manifest import committed_units, read_manifests
from pipeline.work.plan import PLAN_PATH, Unit, read_plan
from pipeline.work.process import Sample

# Upper bound on the bytes of a sample's JSON member without its key and source.
_ABOUT_BYTES = 256


def list_images(
    inputs: Sequence[str], max_count: int, max_bytes: int, image_column: str | None
) -> tuple[list[Unit], dict[str, bytes]]:
    """The images of the inputs as units, each small enough for one shard.

    Args:
        inputs: As for `air shard`: folders, globs, image files, tars, Parquet files.
        max_count: Most images of a unit.
        max_bytes: Most bytes of the tar with a unit's images; an image that is larger has a unit of its own.
        image_column: Parquet column with image bytes; None takes the first known name.

    Returns:
        The units, and the content of each unit's listing by the listing's path below the output folder.

    Raises:
        ConfigError: An input has no images, or two images have one key.
        StorageError: An input cannot be read.
    """
    units: list[Unit] = []
    listings: dict[str, bytes] = {}
    for items in _cut(find_items(inputs, image_column), max_count, max_bytes):
        name = f"shard-{len(units):05d}"
        listing = json.dumps([_entry(item) for item in items], separators=(",", ":")).encode()
        checksum = hashlib.sha256(listing).hexdigest()
        # With the checksum in the name, a driver with another plan, soon refused, does not overwrite the listing.
        path = f"plan/{name}-{checksum[:12]}.json"
        listings[path] = listing
        units.append(
            Unit(
                name=name,
                input=path,
                bytes=sum(item.bytes for item in items),
                sha256=checksum,
                samples=len(items),
            )
        )
    return units, listings


def read_listing(output: Storage, reader: ItemReader, unit: Unit) -> Iterator[Sample]:
    """The images that a unit's listing names, in the listing's order.

    Raises:
        DamagedDataError: The listing has changed since the plan was made.
    """
    listing = output.read(unit.input)
    if hashlib.sha256(listing).hexdigest() != unit.sha256:
        raise DamagedDataError(f"{output.uri(unit.input)} is not the listing that the plan names")
    for entry in json.loads(listing):
        item = Item(**entry)
        yield Sample(item.key, item.source, lambda item=item: reader.read(item))


def _entry(item: Item) -> dict[str, Any]:
    """An item as JSON. Listings of inputs without lists have no positions, as they had before there were any."""
    return {name: value for name, value in asdict(item).items() if name != "position" or value is not None}


def _cut(items: Sequence[Item], max_count: int, max_bytes: int) -> Iterator[list[Item]]:
    """Cuts items into runs within both limits."""
    run: list[Item] = []
    size = 0
    for item in items:
        about = _ABOUT_BYTES + len(json.dumps([item.key, item.source]))
        cost = member_bytes(f"{item.key}.webp", item.bytes) + member_bytes(f"{item.key}.json", about)
        if run and (len(run) == max_count or tar_bytes(size + cost) > max_bytes):
            yield run
            run, size = [], 0
        run.append(item)
        size += cost
    if run:
        yield run


def list_shards(storage: Storage, job: str = "shard", ending: str = ".tar") -> list[Unit]:
    """The shards of a folder as units of another job, sorted by name.

    Args:
        storage: The output of a job, or a folder of tars.
        job: The job that must have made the output.
        ending: File name ending of the shards in the job's output.

    Raises:
        ConfigError: The folder does not exist.
        JobFailedError: The job has not finished, the folder is the output of another job, or it has no shards.
        DamagedDataError: A shard's size differs from its manifest.
    """
    if storage.exists(PLAN_PATH):
        units = list(_committed_shards(storage, job, ending))
    else:
        files = list(storage.list())
        if not files:
            raise missing_input(storage.uri())
        units = [foreign_shard(storage, path) for path, _ in files if path.endswith(".tar")]
    if not units:
        raise JobFailedError(f"{storage.uri()} holds no shards: no file ends in .tar; make shards with `air {job}`")
    return sorted(units, key=lambda unit: unit.name)


def _committed_shards(storage: Storage, job: str, ending: str) -> Iterator[Unit]:
    plan = read_plan(storage)
    if plan.job != job:
        raise JobFailedError(f"{storage.uri()} is the output of `air {plan.job}`, not of `air {job}`")
    missing = {unit.name for unit in plan.units} - committed_units(storage)
    if missing:
        raise JobFailedError(
            f"{storage.uri()} is not finished: {len(missing)} of {len(plan.units)} shards are missing "
            f"({min(missing)} first); run the same `air {job}` again"
        )
    for manifest in read_manifests(storage):
        for part, file in enumerate(file for file in manifest.files if file.path.endswith(ending)):
            if storage.size(file.path) != file.bytes:
                raise DamagedDataError(f"{storage.uri(file.path)} is not the size its manifest says; run `air verify`")
            name = f"{manifest.unit}-{part}" if part else manifest.unit
            yield Unit(name=name, input=file.path, bytes=file.bytes, sha256=file.sha256, samples=file.rows)


def foreign_shard(storage: Storage, path: str) -> Unit:
    """A tar without a manifest as a unit. Reads the whole tar.

    Raises:
        DamagedDataError: The file is not a whole tar.
    """
    stem = path.removesuffix(".tar")
    name = file_safe(stem)
    if name != stem:  # keeps `a/b` and `a_b` apart
        name += f"-{hashlib.sha256(stem.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    with storage.local_file(path) as local:
        return Unit(
            name=name,
            input=path,
            bytes=local.stat().st_size,
            sha256=checksum_of(local),
            samples=count_samples(local),
        )


def read_samples(storage: Storage, unit: Unit, endings: frozenset[str] = images.IMAGE_EXTENSIONS) -> Iterator[Sample]:
    """The samples of a shard, in the shard's order.

    Args:
        storage: The folder of the shard.
        unit: The shard.
        endings: File name endings, with dots, of the members that are images.

    Raises:
        DamagedDataError: The shard has changed since the plan was made, or is not a WebDataset tar.
    """
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    with storage.local_file(unit.input) as local:
        if checksum_of(local) != unit.sha256:
            raise DamagedDataError(f"input {storage.uri(unit.input)} has changed since the plan was made; restore it")
        with local.open("rb") as stream:
            try:
                members = ({**member, "__url__": unit.input} for member in tar_file_iterator(cast(Any, stream)))
                for sample in group_by_keys(members):
                    yield _sample(sample, unit, endings)
            except tarfile.TarError as error:
                raise DamagedDataError(f"{storage.uri(unit.input)} is not a whole tar: {error}") from None
            except ValueError as error:  # two members of a sample with one ending
                raise DamagedDataError(
                    f"{storage.uri(unit.input)} is not a WebDataset shard: {error.args[0]}"
                ) from None


def _sample(sample: Mapping[str, Any], unit: Unit, image_endings: frozenset[str]) -> Sample:
    key = printable(sample["__key__"])
    data = next((sample[name] for name in sample if f".{name}" in image_endings), None)
    endings = sorted(f".{name}" for name in sample if not name.startswith("__"))
    source = f"{unit.name}/{key}"
    if "json" in sample:
        try:
            about = json.loads(sample["json"])
            source = about.get("source", source) if isinstance(about, dict) else source
        except ValueError:
            pass  # the JSON member of a foreign sample may be anything

    def read() -> bytes:
        if data is None:
            raise Rejected(Reason.NO_IMAGE, f"the sample has no image member (its members end in {', '.join(endings)})")
        return data

    return Sample(key, source, read)
