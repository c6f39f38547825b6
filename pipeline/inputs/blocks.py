"""Finds and reads samples of targets and shards in any order: for training and for jobs that look at single pictures.

A block is a row group of targets or a whole shard of images. A few blocks are open at a time, so a reader that moves
from block to block has bounded memory. This module must not know the order in which samples are read, which is in
`pipeline.training.order`, nor what becomes of their pixels, which is in `pipeline.training.augment`.
"""

from __future__ import annotations

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
from pipeline.storage.open import open_storage
from pipeline.work.manifest import committed_units, read_manifests
from pipeline.work.plan import PLAN_PATH, Unit, read_plan


@dataclass(frozen=True)
class Block:
    """Samples that are stored and read together.

    Attributes:
        source: URI of the input.
        path: The file's path below it.
        group: The row group in the file; None for a tar.
        count: Number of samples.
    """

    source: str
    path: str
    group: int | None
    count: int


def find_blocks(source: Storage) -> tuple[str, list[Unit], list[Block]]:
    """The blocks of a folder.

    Args:
        source: The output of `air distill` or `air shard`, or a folder of WebDataset tars.

    Returns:
        "targets" or "images", the committed files as units of a plan, and the blocks that have samples.

    Raises:
        JobFailedError: The `air shard` that fills the folder has not finished.
        TrainingError: The `air distill` that fills the folder has not finished, the folder is the output of another
            job, or it has no samples.
    """
    job = read_plan(source).job if source.exists(PLAN_PATH) else "shard"
    if job == "distill":
        units = committed_files(source)
        blocks = [block for unit in units for block in row_groups(source, unit)]
        kind = "targets"
    elif job == "shard":
        units = list_shards(source)
        blocks = [Block(source.uri(), unit.input, None, unit.samples or 0) for unit in units]
        kind = "images"
    else:
        raise TrainingError(
            f"{source.uri()} is the output of `air {job}`; give the output of `air distill` or `air shard`"
        )
    blocks = [block for block in blocks if block.count]
    if not blocks:
        raise TrainingError(f"{source.uri()} has no samples; look into its quarantine folder")
    return kind, units, blocks


def committed_files(source: Storage) -> list[Unit]:
    """The files of a job that has finished, as units of a plan.

    Raises:
        TrainingError: Some units of the job's plan are not committed.
    """
    plan = read_plan(source)
    missing = {unit.name for unit in plan.units} - committed_units(source)
    if missing:
        raise TrainingError(
            f"{source.uri()} is not finished: {len(missing)} of {len(plan.units)} shards are missing "
            f"({min(missing)} first); run the same `air {plan.job}` again"
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


def in_input(unit: Unit, number: int, count: int) -> Unit:
    """A unit of one of several inputs, under a name that no unit of another input has."""
    return unit if count == 1 else unit.model_copy(update={"name": f"input-{number}-{unit.name}"})


def row_groups(source: Storage, unit: Unit) -> Iterator[Block]:
    """The row groups of a Parquet file as blocks of rows.

    Raises:
        DamagedDataError: The file is not a whole Parquet file.
    """
    with source.open(unit.input) as stream:
        try:
            metadata = pq.ParquetFile(stream).metadata
        except (ValueError, OSError) as error:
            raise DamagedDataError(
                f"{source.uri(unit.input)} is not a Parquet file: {error}; run `air verify`"
            ) from None
        for group in range(metadata.num_row_groups):
            yield Block(source.uri(), unit.input, group, metadata.row_group(group).num_rows)


class RawSample(NamedTuple):
    """A sample before augmentation.

    Attributes:
        key: Identifies the image.
        view: Number of the view of the image; 0 if the source holds images.
        rgb: Shape (H, W, 3), uint8.
        row: All columns of the row of targets; None if the source holds images, or targets are not asked for.
    """

    key: str
    view: int
    rgb: np.ndarray
    row: dict[str, Any] | None


class BlockReader:
    """Reads single samples. Keeps the blocks of a window open, and decoded images up to a number of bytes.

    Args:
        blocks: All blocks, as `find_blocks` gives them, of one input or several.
        window: Number of blocks among which the caller moves back and forth.
        cache_bytes: Memory for decoded images.
        with_targets: Read all columns of targets, Gaussians included.
    """

    def __init__(self, blocks: Sequence[Block], window: int, cache_bytes: int, with_targets: bool = False) -> None:
        self._sources = {uri: open_storage(uri) for uri in {block.source for block in blocks}}
        self._blocks = blocks
        self._columns = None if with_targets else ["key", "view", "image"]
        # One more than the window: a batch may reach from one window into the next.
        self._open: RecentlyUsed[int, TarIndex | pa.Table] = RecentlyUsed(window + 1, lambda block: 1, _close)
        self._decoded: RecentlyUsed[tuple[int, int], np.ndarray] = RecentlyUsed(cache_bytes, lambda rgb: rgb.nbytes)
        self._with_targets = with_targets

    def read(self, block: int, row: int) -> RawSample:
        """One sample.

        Args:
            block: Position in `blocks`.
            row: Position in the block.

        Raises:
            Rejected: The image cannot be used.
            DamagedDataError: The block has changed since it was found.
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
        """The name of a sample in messages: its key and its file."""
        where = self._blocks[block]
        opened = self._open.get(block, lambda: self._load(where))
        key = opened.keys[row] if isinstance(opened, TarIndex) else opened.column("key")[row].as_py()
        return f"{key} in {self._sources[where.source].uri(where.path)}"

    def close(self) -> None:
        """Closes the open blocks and drops the decoded images. A later `read` opens its block again."""
        self._open.clear()
        self._decoded.clear()

    def _load(self, block: Block) -> TarIndex | pa.Table:
        source = self._sources[block.source]
        if block.group is None:
            with source.local_file(block.path) as local:
                opened = TarIndex(local, source.uri(block.path))
            count = len(opened.keys)
        else:
            with source.open(block.path) as stream:
                opened = pq.ParquetFile(stream).read_row_group(block.group, columns=self._columns)
            count = opened.num_rows
        if count != block.count:
            _close(opened)
            raise DamagedDataError(
                f"{source.uri(block.path)} has {count} samples, expected {block.count}; run `air verify`"
            )
        return opened


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class RecentlyUsed(Generic[Key, Value]):
    """A cache of the values used last, up to a total size.

    Args:
        limit: Upper bound of the sum of the sizes. The value used last stays even if it alone is larger.
        size: The size of a value.
        drop: Called with each value that leaves the cache.
    """

    def __init__(self, limit: int, size: Callable[[Value], int], drop: Callable[[Value], None] | None = None) -> None:
        self._limit = limit
        self._size = size
        self._drop = drop
        self._held: OrderedDict[Key, Value] = OrderedDict()
        self._total = 0

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of `key`, made by `make` if the cache does not hold it."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        value = make()
        self._held[key] = value
        self._total += self._size(value)
        while self._total > self._limit and len(self._held) > 1:
            self._drop_oldest()
        return value

    def clear(self) -> None:
        """Drops all values."""
        while self._held:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, value = self._held.popitem(last=False)
        self._total -= self._size(value)
        if self._drop is not None:
            self._drop(value)


def _close(block: TarIndex | pa.Table) -> None:
    if isinstance(block, TarIndex):
        block.close()
