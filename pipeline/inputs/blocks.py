"""Training samples in one global order that no worker, restart or number of workers changes.

A block is a row group of targets or a shard of images. Every epoch shuffles the blocks, groups them in windows and
permutes the samples of each window: a pure function of (seed, epoch, block sizes), so nothing is stored. The stream of
epochs is cut in global batches of constant size, and every rank takes its slice of each. All state is the step number.

This module knows where samples come from and in which order; what is made of their pixels is in
`pipeline.training.augment`.
"""

from __future__ import annotations

import io
import logging
import queue
import tarfile
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import DamagedDataError, TrainingError
from pipeline.formats import images
from pipeline.inputs.shards import list_shards
from pipeline.storage.open import Storage
from pipeline.work.plan import PLAN_PATH, Unit, committed_units, printable, read_manifests, read_plan, seed_of

logger = logging.getLogger(__name__)


class FeedConfig(Config):
    """In which order samples come."""

    seed: int = Field(0, ge=0, lt=2**63, description="seed of the order, of crops, of augmentation and of new weights")
    batch: int = Field(16, ge=1, le=65536, description="views in a batch, over all workers")
    window: int = Field(8, ge=1, le=4096, description="blocks (row groups, shards) whose samples are mixed at a time")


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


class Place(NamedTuple):
    """Where a sample of the stream lies: in which epoch it comes, in which block, in which row of it."""

    epoch: int
    block: int
    row: int


class GlobalOrder:
    """The stream of samples.

    Args:
        counts: Samples of every block.
        config: Seed, batch size, window.
    """

    def __init__(self, counts: Sequence[int], config: FeedConfig) -> None:
        self._counts = np.asarray(counts, np.int64)
        self._config = config
        self.samples_per_epoch = int(self._counts.sum())
        self._epoch = lru_cache(maxsize=2)(self._arrange)
        self._window = lru_cache(maxsize=4)(self._permute)

    def batch(self, step: int) -> list[Place]:
        """All places of a global batch; an epoch's last partial batch is filled up from the next epoch."""
        first = step * self._config.batch
        return [self.place(index) for index in range(first, first + self._config.batch)]

    def place(self, index: int) -> Place:
        """Where sample `index` of the endless stream lies."""
        epoch, position = divmod(index, self.samples_per_epoch)
        _, ends = self._epoch(epoch)
        window = bisect_right(ends, position)
        begin = ends[window - 1] if window else 0
        blocks, rows = self._window(epoch, window)
        return Place(epoch, int(blocks[position - begin]), int(rows[position - begin]))

    def _arrange(self, epoch: int) -> tuple[list[np.ndarray], list[int]]:
        """The windows of an epoch, each an array of blocks, and the position where each ends."""
        blocks = _generator(self._config.seed, "blocks", epoch).permutation(len(self._counts))
        windows = np.split(blocks, range(self._config.window, len(blocks), self._config.window))
        return windows, list(accumulate(int(self._counts[window].sum()) for window in windows))

    def _permute(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Block and row of every position of a window."""
        members = self._epoch(epoch)[0][window]
        blocks = np.repeat(members, self._counts[members])
        rows = np.concatenate([np.arange(int(self._counts[block])) for block in members])
        mixed = _generator(self._config.seed, "window", epoch, window).permutation(len(blocks))
        return blocks[mixed], rows[mixed]


def rank_slice(batch: int, rank: int, size: int) -> slice:
    """What of a global batch is a rank's: contiguous, and within one sample as much as any other's."""
    return slice(batch * rank // size, batch * (rank + 1) // size)


def _generator(*parts: str | int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed_of(*parts)))


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
    """What was used last, up to a total size."""

    def __init__(self, limit: int, size: Callable[[Value], int]) -> None:
        self._limit = limit
        self._size = size
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
            self._total -= self._size(self._held.popitem(last=False)[1])
        return value


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
        self._open: _Recent[int, Any] = _Recent(window + 1, lambda block: 1)
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
        if isinstance(opened, _Tar):
            key, view, values = opened.keys[row], 0, None
            data = lambda: opened.read(row)  # noqa: E731
        else:
            values = {name: opened.column(name)[row].as_py() for name in opened.column_names}
            key, view = values["key"], values["view"]
            data = lambda: values["image"]  # noqa: E731
        rgb = self._decoded.get((block, row), lambda: images.decode(data()))
        return RawSample(key, view, rgb, values if self._with_targets else None)

    def name(self, block: int, row: int) -> str:
        """What a message calls a sample: its key and its file."""
        where = self._blocks[block]
        opened = self._open.get(block, lambda: self._load(where))
        key = opened.keys[row] if isinstance(opened, _Tar) else opened.column("key")[row].as_py()
        return f"{key} in {self._source.uri(where.path)}"

    def _load(self, block: Block) -> Any:
        if block.group is None:
            opened = _Tar(self._source, block)
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


class _Tar:
    """A shard on this machine's disk, and where in it each image lies."""

    def __init__(self, source: Storage, block: Block) -> None:
        from webdataset.tariterators import base_plus_ext

        self._uri = source.uri(block.path)
        self._holding = ExitStack()
        self._stream = self._holding.enter_context(
            self._holding.enter_context(source.local_file(block.path)).open("rb")
        )
        self.keys: list[str] = []
        self._places: list[tuple[int, int] | None] = []
        try:
            with tarfile.open(fileobj=self._stream, mode="r:") as archive:
                for member in archive:
                    key, ending = base_plus_ext(member.name) if member.isreg() else (None, None)
                    if key is None or key.startswith("__"):
                        continue
                    if not self.keys or self.keys[-1] != printable(key):
                        self.keys.append(printable(key))
                        self._places.append(None)
                    if f".{ending}".lower() in images.IMAGE_EXTENSIONS and self._places[-1] is None:
                        self._places[-1] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            raise DamagedDataError(f"{self._uri} is not a whole tar: {error}; run `air verify`") from None

    def read(self, row: int) -> bytes:
        place = self._places[row]
        if place is None:
            raise images.Rejected("no_image", "the sample has no image member")
        self._stream.seek(place[0], io.SEEK_SET)
        return self._stream.read(place[1])

    def __del__(self) -> None:
        if hasattr(self, "_holding"):
            self._holding.close()


Batch = TypeVar("Batch")


class Prefetcher(Generic[Batch]):
    """Makes batches step after step in a thread, a few ahead of who takes them.

    Args:
        make: The batch of a step.
        first: Step to begin with.
        ahead: How many are kept ready.
    """

    def __init__(self, make: Callable[[int], Batch], first: int, ahead: int) -> None:
        self._make = make
        self._ready: queue.Queue[Any] = queue.Queue(max(1, ahead))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first,), name="feed", daemon=True)
        self._thread.start()

    def _run(self, step: int) -> None:
        while not self._stopped.is_set():
            try:
                item: Any = self._make(step)
            except Exception as error:  # noqa: BLE001  # raised again where the batch is taken
                item = error
            while not self._stopped.is_set():
                try:
                    self._ready.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(item, Exception):
                return
            step += 1

    def take(self) -> Batch:
        """The next batch. Raises what making it raised."""
        item = self._ready.get()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self._thread.join(timeout=10)
