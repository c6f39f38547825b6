"""Blocks of training samples: finding them in a folder, and reading single samples of them.

A block is a row group of targets or a shard of images. A reader keeps a few blocks open and the images that it decoded
last. This module knows nothing of the order of samples (`pipeline.training.order`) or of what training makes of their
pixels (`pipeline.training.augment`).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DamagedDataError, TrainingError
from pipeline.formats import images
from pipeline.formats.tars import TarIndex
from pipeline.inputs.shards import list_shards
from pipeline.storage.base import Storage
from pipeline.work.manifest import committed_units, read_manifests
from pipeline.work.plan import PLAN_PATH, Unit, read_plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Block:
    """Samples that lie together.

    Attributes:
        path: The file, below the input.
        group: Its row group; None for a tar.
        count: Samples.
    """

    path: str
    group: int | None
    count: int


def find_blocks(source: Storage) -> tuple[str, list[Unit], list[Block]]:
    """What there is to train on.

    Args:
        source: Output of `air distill` or of `air shard`, or a folder of WebDataset tars.

    Returns:
        "targets" or "images", the committed files as units of a plan, and the blocks.

    Raises:
        JobFailedError: The job that fills the folder has not finished.
        TrainingError: The folder is neither, or holds no samples.
    """
    job = read_plan(source).job if source.exists(PLAN_PATH) else "shard"
    if job == "distill":
        units = _target_units(source)
        blocks = [block for unit in units for block in _row_groups(source, unit)]
        kind = "targets"
    elif job == "shard":
        units = list_shards(source)
        blocks = [Block(unit.input, None, unit.samples or 0) for unit in units]
        kind = "images"
    else:
        raise TrainingError(
            f"{source.uri()} is the output of `air {job}`; train on that of `air distill` or `air shard`"
        )
    blocks = [block for block in blocks if block.count]
    if not blocks:
        raise TrainingError(f"{source.uri()} holds no samples; see its quarantine folder")
    return kind, units, blocks


def _target_units(source: Storage) -> list[Unit]:
    plan = read_plan(source)
    missing = {unit.name for unit in plan.units} - committed_units(source)
    if missing:
        raise TrainingError(
            f"{source.uri()} is not finished: {len(missing)} of {len(plan.units)} shards are missing "
            f"({min(missing)} first); run the same `air distill` again"
        )
    return [
        Unit(
            name=f"{manifest.unit}-{part}" if part else manifest.unit,
            input=file.path,
            bytes=file.bytes,
            sha256=file.sha256,
            samples=file.rows,
        )
        for manifest in read_manifests(source)
        for part, file in enumerate(manifest.files)
    ]


def _row_groups(source: Storage, unit: Unit) -> Iterator[Block]:
    with source.open(unit.input) as stream:
        try:
            metadata = pq.ParquetFile(stream).metadata
        except (ValueError, OSError) as error:
            raise DamagedDataError(f"{source.uri(unit.input)} is no Parquet file: {error}; run `air verify`") from None
        for group in range(metadata.num_row_groups):
            yield Block(unit.input, group, metadata.row_group(group).num_rows)


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class _Recent(Generic[Key, Value]):
    """What was used last, up to a total size.

    Args:
        limit: Of the sizes together; the last one is kept however large it is.
        size: Of a value.
        drop: Called with each value that is given up.
    """

    def __init__(
        self, limit: int, size: Callable[[Value], int], drop: Callable[[Value], None] = lambda value: None
    ) -> None:
        self._limit = limit
        self._size = size
        self._drop = drop
        self._held: OrderedDict[Key, Value] = OrderedDict()
        self._total = 0

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        value = make()
        self._total += self._size(value)
        self._held[key] = value
        while self._total > self._limit and len(self._held) > 1:
            _, oldest = self._held.popitem(last=False)
            self._total -= self._size(oldest)
            self._drop(oldest)
        return value

    def clear(self) -> None:
        """Gives up all of it."""
        while self._held:
            self._drop(self._held.popitem(last=False)[1])
        self._total = 0


class RawSample(NamedTuple):
    """A sample before augmentation.

    Attributes:
        key: Identifies the image.
        view: Number of its view; 0 where samples are images.
        rgb: Shape (H, W, 3), uint8.
        row: All columns of its row of targets; None where samples are images.
    """

    key: str
    view: int
    rgb: np.ndarray
    row: dict[str, Any] | None


class BlockReader:
    """Reads samples of blocks. Keeps the blocks of a window open, and images decoded up to a number of bytes.

    Args:
        source: Where the blocks are.
        blocks: All of them.
        window: How many are read at a time.
        cache_bytes: Memory for decoded images.
        with_targets: Read the Gaussians, too.
    """

    def __init__(
        self, source: Storage, blocks: Sequence[Block], window: int, cache_bytes: int, with_targets: bool = False
    ) -> None:
        self._source = source
        self._blocks = blocks
        self._columns = None if with_targets else ["key", "view", "image"]
        # A batch can reach from one window into the next.
        self._open: _Recent[int, TarIndex | pa.Table] = _Recent(window + 1, lambda block: 1, _close)
        self._decoded: _Recent[tuple[int, int], np.ndarray] = _Recent(cache_bytes, lambda rgb: rgb.nbytes)
        self._with_targets = with_targets

    def read(self, block: int, row: int) -> RawSample:
        """One sample.

        Raises:
            Rejected: Its image cannot be used.
            DamagedDataError: The block is not what it was.
        """
        where = self._blocks[block]
        opened = self._open.get(block, lambda: self._load(where))
        if isinstance(opened, TarIndex):
            rgb = self._decoded.get((block, row), lambda: images.decode(opened.read(row)))
            return RawSample(opened.keys[row], 0, rgb, None)
        values = {name: opened.column(name)[row].as_py() for name in opened.column_names}
        rgb = self._decoded.get((block, row), lambda: images.decode(values["image"]))
        return RawSample(values["key"], values["view"], rgb, values if self._with_targets else None)

    def name(self, block: int, row: int) -> str:
        """What a message calls a sample: its key and its file."""
        where = self._blocks[block]
        opened = self._open.get(block, lambda: self._load(where))
        key = opened.keys[row] if isinstance(opened, TarIndex) else opened.column("key")[row].as_py()
        return f"{key} in {self._source.uri(where.path)}"

    def _load(self, block: Block) -> Any:
        if block.group is None:
            with self._source.local_file(block.path) as local:
                opened = TarIndex(local, self._source.uri(block.path))
            count = len(opened.keys)
        else:
            with self._source.open(block.path) as stream:
                opened = pq.ParquetFile(stream).read_row_group(block.group, columns=self._columns)
            count = opened.num_rows
        if count != block.count:
            raise DamagedDataError(
                f"{self._source.uri(block.path)} holds {count} samples where there were {block.count}; run `air verify`"
            )
        return opened

    def close(self) -> None:
        """Closes the blocks that are open, and forgets the images."""
        self._open.clear()
        self._decoded.clear()


def _close(block: TarIndex | pa.Table) -> None:
    if isinstance(block, TarIndex):
        block.close()
