"""WebDataset shards: tars with one image and one JSON member per sample, written by `air shard`, read by every job.

Written and read with webdataset's own tar writer and iterators; visible only through the commit protocol. This module
knows where samples come from and go to; it knows nothing of Gaussians.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, cast

from pydantic import Field

from pipeline.config import Config
from pipeline.errors import DamagedDataError, JobFailedError, Rejected
from pipeline.formats import images
from pipeline.inputs.sources import Item, ItemReader, find_items, missing_input
from pipeline.storage.open import Storage
from pipeline.work.plan import (
    PLAN_PATH,
    Plan,
    Unit,
    checksum_of,
    committed_units,
    file_safe,
    printable,
    read_manifests,
    read_plan,
)
from pipeline.work.process import EncodedImage, Sample

# Members that webdataset's iterators pass over.
_META = re.compile(r"__[^/]*__($|/)")

MAX_SHARD_BYTES = 256_000_000
"""Bytes of a shard at most, unless the configuration says otherwise."""

# Upper bound on a sample's JSON member, beside its key and source.
_ABOUT_BYTES = 256


class ShardConfig(Config):
    """What `air shard` makes of a collection of images."""

    max_count: int = Field(256, ge=1, le=1_000_000, description="most images in a shard")
    max_bytes: int = Field(
        MAX_SHARD_BYTES, ge=tarfile.RECORDSIZE, description="most bytes of a shard; one larger image stands alone"
    )
    check: Literal["decode", "header"] = Field("decode", description="decode every image, or read its header only")
    max_pixels: int = Field(images.MAX_PIXELS, ge=1, description="images with more pixels are refused before decoding")
    image_column: str | None = Field(None, description="Parquet column with image bytes; default: a known name")


class ShardJob:
    """Packs images into shards; their bytes stay as they are."""

    name: ClassVar[str] = "shard"

    def __init__(self, config: ShardConfig, inputs: Sequence[str], output: Storage) -> None:
        self._config = config
        self._output = output
        self._reader = ItemReader(inputs, config.image_column)

    def prepare(self, say: Callable[[str], None]) -> None:
        """Nothing takes long."""

    def samples(self, unit: Unit, scratch: Path) -> Iterator[Sample]:
        """The images of the unit's listing."""
        return read_listing(self._output, self._reader, unit)

    def process(self, image: EncodedImage) -> dict[str, Any]:
        """The WebDataset sample: the untouched bytes under their true ending, and a JSON member about them."""
        info = images.probe(image.data, max_pixels=self._config.max_pixels)
        if self._config.check == "decode":
            images.decode(image.data, max_pixels=self._config.max_pixels)
        return make_sample(image, info, image.data)

    def writer(self, unit: Unit, scratch: Path, metadata: Mapping[str, str]) -> TarWriter:
        """A writer of tars no larger than configured."""
        return TarWriter(unit.name, scratch, self._config.max_bytes)


def make_sample(image: EncodedImage, info: images.ImageInfo, data: bytes) -> dict[str, Any]:
    """The WebDataset sample of an image file `data`: its bytes under its format's ending, and a JSON member."""
    about = {
        "key": image.key,
        "source": image.source,
        "format": info.format,
        "width": info.width,
        "height": info.height,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return {"__key__": image.key, info.extension: data, "json": json.dumps(about).encode()}


class TarWriter:
    """Writes samples to `<unit>.tar`, then `<unit>-1.tar` and so on where one would grow beyond the limit.

    Equal samples give equal bytes: times and owners are fixed.
    """

    def __init__(self, unit: str, scratch: Path, max_bytes: int) -> None:
        self._unit = unit
        self._scratch = scratch
        self._max_bytes = max_bytes
        self._files: list[tuple[Path, int]] = []
        self._stream: BinaryIO | None = None
        self._tar: Any = None
        self._count = 0
        self._bytes = 0

    def add(self, result: dict[str, Any]) -> Mapping[str, float]:
        """Appends a sample; counts images, bytes and pixels."""
        key = result["__key__"]
        size = sum(_member_bytes(f"{key}.{name}", len(value)) for name, value in result.items() if name != "__key__")
        if self._tar is not None and _tar_bytes(self._bytes + size) > self._max_bytes:
            self._close()
        if self._tar is None:
            self._tar = self._open()
        self._tar.write(result)
        self._count += 1
        self._bytes += size
        about = json.loads(result["json"])
        return {"images": 1, "image_bytes": about["bytes"], "pixels": about["width"] * about["height"]}

    def finish(self) -> list[tuple[Path, int]]:
        """Closes the last tar. A unit without samples gives none."""
        self._close()
        return self._files

    def _open(self) -> Any:
        part = f"-{len(self._files)}" if self._files else ""
        path = self._scratch / f"{self._unit}{part}.tar"
        self._stream = path.open("wb")
        self._files.append((path, 0))
        self._count, self._bytes = 0, 0
        return open_tar(self._stream)

    def _close(self) -> None:
        if self._tar is None or self._stream is None:
            return
        self._tar.close()
        self._stream.close()
        self._files[-1] = (self._files[-1][0], self._count)
        self._tar = self._stream = None


def open_tar(stream: BinaryIO) -> Any:
    """A writer of WebDataset samples {"__key__": key, ending: bytes} to a tar; equal samples give equal bytes."""
    from webdataset.writer import TarWriter as WebDatasetWriter  # imports torch: only workers pay for it

    return WebDatasetWriter(stream, encoder=False, mtime=0, format="GNU_FORMAT")


def _member_bytes(name: str, size: int) -> int:
    """What a tar member takes: a header and its content in whole blocks, and as much again for a long name."""
    length = len(name.encode("utf-8", "surrogateescape"))
    long_name = tarfile.BLOCKSIZE + _whole(length + 1, tarfile.BLOCKSIZE) if length > tarfile.LENGTH_NAME else 0
    return long_name + tarfile.BLOCKSIZE + _whole(size, tarfile.BLOCKSIZE)


def _tar_bytes(members: int) -> int:
    """The size of a tar: its members and two empty blocks, in whole records."""
    return _whole(members + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def plan_shards(config: ShardConfig, inputs: Sequence[str]) -> tuple[Plan, dict[str, bytes]]:
    """The plan of `air shard`, and the listing of every shard's images by path.

    Raises:
        ConfigError: No images, or two with one key.
        StorageError: An input cannot be read.
    """
    units, listings = list_images(config, inputs)
    return Plan.make("shard", config, units, inputs), listings


def list_images(config: ShardConfig, inputs: Sequence[str]) -> tuple[list[Unit], dict[str, bytes]]:
    """The images of the inputs as units, no larger than a shard is to be, and the listing of each by its path.

    Raises:
        ConfigError: No images, or two with one key.
        StorageError: An input cannot be read.
    """
    units: list[Unit] = []
    listings: dict[str, bytes] = {}
    for items in _cut(find_items(inputs, config.image_column), config):
        name = f"shard-{len(units):05d}"
        listing = json.dumps([asdict(item) for item in items], separators=(",", ":")).encode()
        checksum = hashlib.sha256(listing).hexdigest()
        # Named by its content: a driver with another plan, that will lose, cannot overwrite it.
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
    """The images that a unit's listing names, in its order.

    Raises:
        DamagedDataError: The listing is not the one that the plan names.
    """
    listing = output.read(unit.input)
    if hashlib.sha256(listing).hexdigest() != unit.sha256:
        raise DamagedDataError(f"{output.uri(unit.input)} is not the listing that the plan names")
    for entry in json.loads(listing):
        item = Item(**entry)
        yield Sample(item.key, item.source, lambda item=item: reader.read(item))


def _cut(items: Sequence[Item], config: ShardConfig) -> Iterator[list[Item]]:
    """Runs of items within both limits."""
    run: list[Item] = []
    size = 0
    for item in items:
        about = _ABOUT_BYTES + len(json.dumps([item.key, item.source]))
        cost = _member_bytes(f"{item.key}.webp", item.bytes) + _member_bytes(f"{item.key}.json", about)
        if run and (len(run) == config.max_count or _tar_bytes(size + cost) > config.max_bytes):
            yield run
            run, size = [], 0
        run.append(item)
        size += cost
    if run:
        yield run


def list_shards(storage: Storage, job: str = "shard", ending: str = ".tar") -> list[Unit]:
    """The shards of a folder as units of another job, sorted by name: the output of a job, or any tars.

    Args:
        storage: The folder.
        job: Whose output it is to be, if it is one.
        ending: Of the job's files that are the shards.

    Raises:
        ConfigError: The folder does not exist.
        JobFailedError: The job has not finished there, it is the output of another one, or there are no shards.
        DamagedDataError: A shard has another size than its manifest says.
    """
    if storage.exists(PLAN_PATH):
        units = list(_committed_shards(storage, job, ending))
    else:
        files = list(storage.list())
        if not files:
            raise missing_input(storage.uri())
        units = [foreign_shard(storage, path) for path, _ in files if path.endswith(".tar")]
    if not units:
        raise JobFailedError(f"{storage.uri()} holds no shards: no file ends in .tar; make them with `air {job}`")
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
    """A tar that no job vouches for, as a unit. Reads all of it.

    Raises:
        DamagedDataError: It is not a whole tar.
    """
    stem = path.removesuffix(".tar")
    name = file_safe(stem)
    if name != stem:  # `a/b` and `a_b` are two shards
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
    """The samples of a shard, in its order.

    Args:
        storage: Where the shard is.
        unit: The shard.
        endings: Of the members that are the samples' images, with their dots.

    Raises:
        DamagedDataError: The shard is not what the plan says it is, or is no tar.
    """
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    with storage.local_file(unit.input) as local:
        if checksum_of(local) != unit.sha256:
            raise DamagedDataError(f"input {storage.uri(unit.input)} has changed since the plan was made")
        with local.open("rb") as stream:
            try:
                members = ({**member, "__url__": unit.input} for member in tar_file_iterator(cast(Any, stream)))
                for sample in group_by_keys(members):
                    yield _sample(sample, unit, endings)
            except tarfile.TarError as error:
                raise DamagedDataError(f"{storage.uri(unit.input)} is not a whole tar: {error}") from None
            except ValueError as error:  # two members of a sample with one ending
                raise DamagedDataError(f"{storage.uri(unit.input)} is no WebDataset shard: {error.args[0]}") from None


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
            pass  # a foreign sample's JSON is its own affair

    def read() -> bytes:
        if data is None:
            raise Rejected("no_image", f"the sample has no image member (its members end in {', '.join(endings)})")
        return data

    return Sample(key, source, read)


def count_samples(local: Path) -> int:
    """Samples of a local shard: distinct runs of members with one key, as webdataset groups them.

    Raises:
        DamagedDataError: It is not a whole tar.
    """
    from webdataset.tariterators import base_plus_ext

    count, last = 0, None
    try:
        with tarfile.open(local, mode="r:") as archive:
            for member in archive:
                taken = member.isreg() and not _META.match(member.name)
                key, _ = base_plus_ext(member.name) if taken else (None, None)
                if key is not None and key != last:
                    count, last = count + 1, key
                archive.members = []  # type: ignore[attr-defined]  # a million headers would stay in memory
    except tarfile.TarError as error:
        raise DamagedDataError(f"{local} is not a whole tar: {error}") from None
    return count
