"""Bulk decoding: pictures of .air files, in tars with one image and one JSON member per sample, as in shards.

This module knows nothing of Ray; torch and the kernels load with the first file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow.parquet as pq
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import DamagedDataError, Reason, Rejected
from pipeline.formats import images
from pipeline.formats.tars import MAX_SHARD_BYTES, TarWriter, make_sample
from pipeline.identity import checksum_of
from pipeline.inputs.shards import foreign_shard, list_shards, read_samples
from pipeline.storage.base import Storage
from pipeline.storage.open import open_parent, open_storage
from pipeline.work.plan import PLAN_PATH, Plan, Unit, read_plan
from pipeline.work.process import EncodedImage, Sample

AIR_ENDING = ".air"


class DecodeConfig(Config):
    """How `air decode` draws a file."""

    format: Literal["png", "webp", "jpeg"] = Field("png", description="format of the pictures")
    quality: int = Field(90, ge=1, le=100, description="quality of WebP and JPEG")
    scale: float = Field(1.0, gt=0, le=1000, description="factor on the height and width of the pictures")
    stages: int | None = Field(None, ge=0, le=255, description="number of stages to draw; default: all of the file")
    max_pixels: int = Field(images.MAX_PIXELS, ge=1, description="pictures with more pixels are refused before drawing")


def draw_file(blob: bytes, config: DecodeConfig, threads: int = 1) -> tuple[bytes, images.ImageInfo]:
    """Draws an .air file.

    Args:
        blob: The .air file; it may end after the last stage that is drawn.
        config: How to draw it.
        threads: Number of CPU threads, at most.

    Returns:
        The bytes of the image file, and its format and size.

    Raises:
        Rejected: `damaged`: the file cannot be read; `too_many_pixels`: the picture would be larger than allowed;
            `unsupported`: the format cannot hold a picture of this size.
    """
    from air.codec.bitstream import MAX_SIDE
    from air.codec.file import decode, read_header
    from air.errors import CodecError
    from air.pillow import draw, scaled_size

    largest = MAX_SIDE**2  # config.max_pixels limits the drawn picture, not the size in the header
    try:
        header = read_header(blob, max_pixels=largest)
        height, width = scaled_size(header.height, header.width, config.scale)
        images.check_sides(config.format, height, width)
        if height * width > config.max_pixels:
            raise Rejected(
                Reason.TOO_MANY_PIXELS,
                f"the picture would have {width} x {height} pixels, above max_pixels = {config.max_pixels}",
            )
        stages = None if config.stages is None else min(config.stages, header.num_stages)
        gaussians = decode(blob, stages, max_pixels=largest)
    except CodecError as error:
        raise Rejected(Reason.DAMAGED, str(error)) from None
    picture = draw(gaussians, header.height, header.width, scale=config.scale, threads=threads)
    file = io.BytesIO()
    options = {} if config.format == "png" else {"quality": config.quality}
    picture.save(file, config.format, **options)
    return file.getvalue(), images.ImageInfo(config.format.upper(), "RGB", width, height, 1)


def prepare_decoder(say: Callable[[str], None]) -> None:
    """Compiles the kernels of `draw_file`, and says so if that takes long."""
    from air.warmup import warm_up

    warm_up("decode", say)


def plan_decode(config: DecodeConfig, given: str) -> tuple[Plan, Callable[[Unit], Iterator[Sample]]]:
    """The plan, and a function that reads the files of a unit.

    Args:
        config: How to draw.
        given: The output of `air encode`, a tar with .air files, or a folder of such tars; a local path or a URI.

    Raises:
        JobFailedError: `air encode` has not finished there, or there is no tar.
    """
    if given.endswith(".tar"):
        source, name = open_parent(given)
        return Plan.make("decode", config, [foreign_shard(source, name)], [given]), partial(_read_tar, source)
    source = open_storage(given)
    embedded = False
    if source.exists(PLAN_PATH):
        plan = read_plan(source)
        embedded = plan.job == "encode" and plan.config["embed"]
    units = list_shards(source, "encode", ".parquet" if embedded else ".tar")
    return Plan.make("decode", config, units, [source.uri()]), partial(_read_rows if embedded else _read_tar, source)


def _read_tar(source: Storage, unit: Unit) -> Iterator[Sample]:
    return read_samples(source, unit, frozenset({AIR_ENDING}))


def _read_rows(source: Storage, unit: Unit) -> Iterator[Sample]:
    """The files in the column `air` of a Parquet file."""
    with source.local_file(unit.input) as local:
        if checksum_of(local) != unit.sha256:
            raise DamagedDataError(f"input {source.uri(unit.input)} has changed since the plan was made")
        for batch in pq.ParquetFile(local).iter_batches(batch_size=64, columns=["key", "air"]):
            for row in batch.to_pylist():
                yield Sample(row["key"], f"{unit.name}/{row['key']}", lambda row=row: row["air"])


class DecodeJob:
    """Turns .air files into pictures.

    Args:
        config: How to draw.
        read: Reads the files of a unit.
    """

    name: ClassVar[str] = "decode"

    def __init__(self, config: DecodeConfig, read: Callable[[Unit], Iterator[Sample]]) -> None:
        self._config = config
        self._read = read

    def prepare(self, say: Callable[[str], None]) -> None:
        """Compiles the kernels, once per machine and version."""
        prepare_decoder(say)

    def samples(self, unit: Unit, scratch: Path) -> Iterator[Sample]:
        """The unit's files."""
        return self._read(unit)

    def process(self, image: EncodedImage) -> dict[str, Any]:
        """The WebDataset sample of the picture. Raises Rejected as `draw_file` does."""
        picture, info = draw_file(image.data, self._config)
        return make_sample(image.key, image.source, info, picture)

    def writer(self, unit: Unit, scratch: Path, metadata: Mapping[str, str]) -> TarWriter:
        """A writer of tars with the default size limit of shards."""
        return TarWriter(unit.name, scratch, MAX_SHARD_BYTES)
