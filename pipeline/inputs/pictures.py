"""The pictures of inputs in a fixed order, for validation and evaluation, which look at single pictures.

This module must not know what the pictures are compared with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from pipeline.errors import ConfigError
from pipeline.formats import images
from pipeline.inputs.blocks import BlockReader, find_blocks
from pipeline.inputs.sources import Item, ItemReader, find_items
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.work.plan import PLAN_PATH, read_plan


class Picture(NamedTuple):
    """A picture that is not read yet.

    Attributes:
        source: Where the picture comes from, for people.
        read: Returns the key and the pixels, shape (H, W, 3), uint8. Raises Rejected if the picture cannot be used.
    """

    source: str
    read: Callable[[], tuple[str, np.ndarray]]


def find_pictures(inputs: Sequence[str], max_pixels: int = images.MAX_PIXELS) -> list[Picture]:
    """All pictures of the inputs.

    Args:
        inputs: Folders, globs, image files, tars and Parquet files as for `air shard`, and outputs of `air shard` and
            `air distill`, whose committed files alone count; local paths or URIs.
        max_pixels: Larger images are rejected before they are decoded.

    Raises:
        ConfigError: An input has no images, or is the output of another job.
        StorageError: An input cannot be read.
    """
    folders = [given for given in inputs if open_storage(given).exists(PLAN_PATH)]
    files = [given for given in inputs if given not in folders]
    pictures = [picture for given in folders for picture in _committed(open_storage(given))]
    if files:
        reader = ItemReader(files)
        pictures += [Picture(item.source, partial(_decode, reader, item, max_pixels)) for item in find_items(files)]
    return pictures


def fingerprint(given: str) -> str:
    """The number of pictures of an input and a checksum of their names and sizes. Copies of the input have the same.

    Args:
        given: One input as for `find_pictures`. No picture is read.

    Raises:
        ConfigError: The input has no images.
        StorageError: The input cannot be read.
    """
    storage = open_storage(given)
    if storage.exists(PLAN_PATH):
        _, units, _ = find_blocks(storage)
        held = [(unit.name, unit.sha256) for unit in units]
        count = sum(unit.samples or 0 for unit in units)
    else:
        items = find_items([given])
        held = [(item.path, item.bytes, item.offset, item.row) for item in items]
        count = len(items)
    digest = hashlib.sha256(json.dumps(held).encode()).hexdigest()
    return f"{count} pictures, names and sizes {digest[:12]}"


def _decode(reader: ItemReader, item: Item, max_pixels: int) -> tuple[str, np.ndarray]:
    return item.key, images.decode(reader.read(item), max_pixels=max_pixels)


def _committed(folder: Storage) -> list[Picture]:
    """The pictures of a job's output, shard by shard."""
    job = read_plan(folder).job
    if job not in ("shard", "distill"):
        raise ConfigError(
            f"{folder.uri()} is the output of `air {job}`, which has no original images; give the images, or the "
            "output of `air shard` or `air distill`"
        )
    kind, _, blocks = find_blocks(folder)
    reader = BlockReader(blocks, window=1, cache_bytes=0)

    def read(block: int, row: int) -> tuple[str, np.ndarray]:
        sample = reader.read(block, row)
        return f"{sample.key}, view {sample.view}" if kind == "targets" else sample.key, sample.rgb

    return [
        Picture(f"{folder.uri(block.path)}, image {row}", partial(read, number, row))
        for number, block in enumerate(blocks)
        for row in range(block.count)
    ]
