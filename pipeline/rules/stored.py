"""Stored roll-outs: finds them, checks that one rule made them, and reads minibatches of their samples in any order.

No image and no renderer takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.errors import DamagedDataError, TrainingError
from pipeline.formats import tables
from pipeline.inputs.blocks import RecentlyUsed, committed_files, in_input
from pipeline.rules.learn import Samples
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.training.order import FeedConfig, GlobalOrder
from pipeline.work.plan import Unit

_SIZES = {"features": tables.RULE_FEATURES, "move": tables.RAW_NUMBERS, "credit": tables.RAW_NUMBERS}
_SIZES["curvature"] = tables.RAW_NUMBERS


@dataclass(frozen=True)
class StoredBlock:
    """A row group of roll-outs.

    Attributes:
        source: URI of the folder.
        path: The file's path below it.
        group: Number of the row group in the file.
        samples: Samples of all its roll-outs.
    """

    source: str
    path: str
    group: int
    samples: int


class StoredRollOuts(NamedTuple):
    """Roll-outs of one rule.

    Attributes:
        units: The committed files as units of a plan.
        blocks: The row groups that have samples.
        rule: Name of the rule that made the moves, as in the column `rule`.
    """

    units: list[Unit]
    blocks: list[StoredBlock]
    rule: str

    @property
    def samples(self) -> int:
        """Number of all samples."""
        return sum(block.samples for block in self.blocks)


def find_roll_outs(sources: Sequence[Storage]) -> StoredRollOuts:
    """The roll-outs of folders that `air distill --rule` has filled.

    Raises:
        TrainingError: A folder is not finished, a file has another schema, different rules made the moves, or there is
            no sample. The message names the file.
        DamagedDataError: A file cannot be read.
    """
    units, blocks = [], []
    rules: dict[str, str] = {}  # the first file of each rule
    for number, source in enumerate(sources):
        for unit in committed_files(source):
            units.append(in_input(unit, number, len(sources)))
            for group, rows in enumerate(_overview(source, unit)):
                samples = sum(rows.column("samples").to_pylist())
                for rule in sorted(set(rows.column("rule").to_pylist())):
                    rules.setdefault(rule, source.uri(unit.input))
                if samples:
                    blocks.append(StoredBlock(source.uri(), unit.input, group, samples))
    if not blocks:
        listed = ", ".join(source.uri() for source in sources)
        raise TrainingError(f"{listed} has no samples; look into its quarantine folder")
    if len(rules) > 1:
        (first, here), (second, there), *_ = rules.items()
        raise TrainingError(
            f"the roll-outs are of different rules: {first} in {here}, {second} in {there}; give those of one rule"
        )
    return StoredRollOuts(units, blocks, next(iter(rules)))


def _overview(source: Storage, unit: Unit) -> list[pa.Table]:
    """The columns `rule` and `samples` of each row group of a file."""
    uri = source.uri(unit.input)
    try:
        with source.open(unit.input) as stream:
            file = pq.ParquetFile(stream)
            version = (file.schema_arrow.metadata or {}).get(b"air.schema_version", b"none").decode()
            if version != str(tables.SCHEMA_VERSION):
                raise TrainingError(
                    f"{uri} has version {version} of the schema, and this code reads version {tables.SCHEMA_VERSION}: "
                    "roll out again with this version"
                )
            if not file.schema_arrow.equals(tables.ROLL_OUTS):
                raise TrainingError(f"{uri} does not have the columns of roll-outs (docs/tables.md): roll out again")
            columns = ["rule", "samples"]
            return [file.read_row_group(group, columns=columns) for group in range(file.metadata.num_row_groups)]
    except (ValueError, OSError) as error:
        raise _damaged(uri, error) from None


def _damaged(uri: str, error: Exception) -> DamagedDataError:
    return DamagedDataError(f"{uri} is not a whole file of roll-outs: {error}; run `air verify`")


def read_vectors(block: StoredBlock, columns: Sequence[str]) -> list[np.ndarray]:
    """Columns of a row group, the samples of all its roll-outs joined: each of shape (samples, size), float32.

    Raises:
        DamagedDataError: The file cannot be read, or has changed since it was found.
    """
    source = open_storage(block.source)
    try:
        with source.open(block.path) as stream:
            table = pq.ParquetFile(stream).read_row_group(block.group, columns=list(columns))
        arrays = []
        for name in columns:
            lists = table.column(name).combine_chunks()
            flat = lists.flatten().flatten().to_numpy(zero_copy_only=False)
            arrays.append(flat.reshape(-1, _SIZES[name]))
    except (ValueError, OSError) as error:
        raise _damaged(source.uri(block.path), error) from None
    if any(len(array) != block.samples for array in arrays):
        raise DamagedDataError(
            f"{source.uri(block.path)} has lists of {sorted({len(array) for array in arrays})} samples in row group "
            f"{block.group}, expected {block.samples}; run `air verify`"
        )
    return arrays


def mean_curvature(blocks: Sequence[StoredBlock]) -> float:
    """The mean over all samples and raw numbers; one pass over this column."""
    arrays = (read_vectors(block, ("curvature",))[0] for block in blocks)
    total = sum(float(array.sum(dtype=np.float64)) for array in arrays)
    return total / (tables.RAW_NUMBERS * sum(block.samples for block in blocks))


class SampleFeed:
    """Minibatches of stored samples, in an order that the step number alone determines.

    Args:
        blocks: Where the samples lie.
        config: Seed and size of a minibatch, and how many blocks are mixed at a time.
    """

    def __init__(self, blocks: Sequence[StoredBlock], config: FeedConfig) -> None:
        self._blocks = blocks
        self._order = GlobalOrder([block.samples for block in blocks], config)
        # One more than the window: a batch may reach from one window into the next.
        self._open: RecentlyUsed[int, list[np.ndarray]] = RecentlyUsed(config.window + 1, lambda block: 1)

    def batch(self, step: int) -> Samples:
        """The minibatch of a step.

        Raises:
            DamagedDataError: A file cannot be read, or has changed since it was found.
        """
        taken: list[list[np.ndarray]] = []
        for blocks, rows in self._order.parts(step):
            for block in np.unique(blocks).tolist():
                arrays = self._open.get(block, lambda block=block: read_vectors(self._blocks[block], tuple(_SIZES)))
                chosen = rows[blocks == block]
                taken.append([array[chosen] for array in arrays])
        return Samples(*(torch.from_numpy(np.concatenate(parts)) for parts in zip(*taken, strict=True)))
