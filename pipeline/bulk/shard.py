"""Sharding: packs images of any source into WebDataset tars of bounded size."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipeline.config import Config
from pipeline.formats import images
from pipeline.formats.tars import MAX_SHARD_BYTES, TarWriter, make_sample
from pipeline.inputs.shards import list_images, read_listing
from pipeline.inputs.sources import ItemReader
from pipeline.storage.base import Storage
from pipeline.work.plan import Plan, Unit
from pipeline.work.process import EncodedImage, Sample


class ShardConfig(Config):
    """How `air shard` packs images."""

    max_count: int = Field(256, ge=1, le=1_000_000, description="most images in a shard")
    max_bytes: int = Field(
        MAX_SHARD_BYTES,
        ge=tarfile.RECORDSIZE,
        description="most bytes of a shard; a larger image gets a shard of its own",
    )
    check: Literal["decode", "header"] = Field("decode", description="decode every image, or read only its header")
    max_pixels: int = Field(images.MAX_PIXELS, ge=1, description="images with more pixels are refused before decoding")
    image_column: str | None = Field(None, description="Parquet column with image bytes; default: a known name")


class ShardJob:
    """Packs images into shards without changing their bytes."""

    name: ClassVar[str] = "shard"

    def __init__(self, config: ShardConfig, inputs: Sequence[str], output: Storage) -> None:
        self._config = config
        self._output = output
        self._reader = ItemReader(inputs, config.image_column)

    def prepare(self, say: Callable[[str], None]) -> None:
        """Does nothing: the job needs no preparation."""

    def samples(self, unit: Unit, scratch: Path) -> Iterator[Sample]:
        """The images of the unit's listing."""
        return read_listing(self._output, self._reader, unit)

    def process(self, image: EncodedImage) -> dict[str, Any]:
        """The WebDataset sample: the unchanged bytes under the ending of their format, and a JSON member about them."""
        info = images.probe(image.data, max_pixels=self._config.max_pixels)
        if self._config.check == "decode":
            images.decode(image.data, max_pixels=self._config.max_pixels)
        return make_sample(image.key, image.source, info, image.data)

    def writer(self, unit: Unit, scratch: Path, metadata: Mapping[str, str]) -> TarWriter:
        """A writer of tars no larger than configured."""
        return TarWriter(unit.name, scratch, self._config.max_bytes)


def plan_shards(config: ShardConfig, inputs: Sequence[str]) -> tuple[Plan, dict[str, bytes]]:
    """The plan of `air shard`, and the listings of the images of every shard, by path.

    Raises:
        ConfigError: There are no images, or two have the same key.
        StorageError: An input cannot be read.
    """
    units, listings = list_images(inputs, config.max_count, config.max_bytes, config.image_column)
    return Plan.make("shard", config, units, inputs), listings
