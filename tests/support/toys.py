"""A toy job that misbehaves to order, importable by Ray workers and spawned processes.

A unit with n samples has the keys `<unit>/000` to `<unit>/<n-1>`; the bytes of a sample are its key. An order for a key
is a verb; ` once` after the verb limits the order to the first attempt:

    kill            the process dies of SIGKILL
    raise           an unexpected exception
    reject          Rejected(Reason.CORRUPT, ...)
    vanish          the bytes are missing when they are read: Rejected(Reason.MISSING, ...)
    lose            the bytes cannot be read for a reason that may pass: StorageError
    damage          the input is not what the plan says: DamagedDataError
    sleep SECONDS   processing takes this long

Every start of an attempt and every processed key leaves a note, which is a file, so that tests can count them. An
attempt also notes its process and the GPUs that this process sees: `<pid>.<CUDA_VISIBLE_DEVICES>`.
"""

from __future__ import annotations

import io
import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.config import Config
from pipeline.errors import DamagedDataError, Reason, Rejected, StorageError
from pipeline.formats import tables
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.work import process
from pipeline.work.manifest import read_manifests
from pipeline.work.plan import Plan, Unit, settle_plan
from pipeline.work.process import EncodedImage, Sample, execute

SCHEMA = pa.schema([pa.field("key", pa.string(), False), pa.field("length", pa.int64(), False)])


class ToyConfig(Config):
    """Settings that make one toy plan differ from another."""

    seed: int = 0
    patch_size: int = 7


@dataclass(frozen=True)
class ToyJob:
    """One row per key: the key and its length.

    Attributes:
        notes: Folder for notes, and for marks of orders that were carried out once.
        orders: The order of each key that has one.
    """

    notes: str
    orders: Mapping[str, str] = field(default_factory=dict)

    name: ClassVar[str] = "toy"

    def prepare(self, say: Callable[[str], None]) -> None:
        """Nothing takes long."""

    def samples(self, unit: Unit, scratch: Path) -> Iterator[Sample]:
        """The keys of the unit."""
        self._note("attempt", unit.name)
        self._note("process", f"{os.getpid()}.{os.environ.get('CUDA_VISIBLE_DEVICES', '')}")
        for number in range(unit.samples or 0):
            key = f"{unit.name}/{number:03d}"
            yield Sample(key, f"toys/{key}", partial(self._read, key))

    def _read(self, key: str) -> bytes:
        match self._order(key, "vanish", "lose", "damage"):
            case "vanish":
                raise Rejected(Reason.MISSING, "the toy is gone")
            case "lose":
                raise StorageError(f"cannot read {key}: the network is down")
            case "damage":
                raise DamagedDataError(f"{key} has changed")
        return key.encode()

    def process(self, image: EncodedImage) -> dict[str, Any]:
        """A row."""
        self._note("processed", image.key)
        order = self._order(image.key, "kill", "raise", "reject", "sleep")
        if order == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif order == "raise":
            raise KeyError("nobody foresaw this")
        elif order == "reject":
            raise Rejected(Reason.CORRUPT, "the toy is ugly")
        elif order.startswith("sleep"):
            time.sleep(float(order.split()[1]))
        return {"key": image.key, "length": len(image.data)}

    def writer(self, unit: Unit, scratch: Path, metadata: Mapping[str, str]) -> ToyWriter:
        """A Parquet file."""
        return ToyWriter(scratch / f"{unit.name}.parquet", metadata)

    def _order(self, key: str, *verbs: str) -> str:
        """The key's order if it is due now and its verb is one of `verbs`; else the empty string."""
        order = self.orders.get(key, "")
        if not order.startswith(verbs) or not verbs:
            return ""
        if order.endswith(" once"):
            try:
                Path(self.notes, f"once-{key.replace('/', '-')}").touch(exist_ok=False)
            except FileExistsError:
                return ""
        return order.removesuffix(" once")

    def _note(self, what: str, about: str) -> None:
        Path(self.notes, f"note-{what}-{about.replace('/', '-')}-{uuid.uuid4().hex}").touch()

    def count(self, what: str) -> Counter[str]:
        """How often an `attempt` at each unit was begun, or each key was `processed`."""
        return Counter(
            path.name.removeprefix(f"note-{what}-").rpartition("-")[0]
            for path in Path(self.notes).glob(f"note-{what}-*")
        )


def encode_picture(seed: int, height: int = 24, width: int = 32, kind: str = "PNG") -> bytes:
    """An image file with smooth colours; another seed gives other bytes."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR).save(buffer, kind)
    return buffer.getvalue()


class ToyWriter:
    """Writes rows to one Parquet file; the summary counts rows and adds up lengths."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._path = path
        self._schema = tables.stamped(SCHEMA, metadata)
        self._rows: list[dict[str, Any]] = []

    def add(self, result: dict[str, Any]) -> Mapping[str, float]:
        """Keeps a row."""
        self._rows.append(result)
        return {"rows": 1, "length": result["length"]}

    def finish(self) -> list[tuple[Path, int]]:
        """Writes the file."""
        pq.write_table(pa.Table.from_pylist(self._rows, schema=self._schema), self._path)
        return [(self._path, len(self._rows))]


@dataclass(frozen=True)
class BatchToyJob(ToyJob):
    """A toy job that takes `size` keys at a time. Every batch leaves a note with the number of its keys."""

    size: int = 4

    def batch_size(self) -> int:
        """`size`."""
        return self.size

    def process_many(self, encoded: Sequence[EncodedImage]) -> list[Any]:
        """A row for each, or its rejection."""
        self._note("batch", str(len(encoded)))
        return [self._row_or_rejection(image) for image in encoded]

    def _row_or_rejection(self, image: EncodedImage) -> Any:
        try:
            return self.process(image)
        except Rejected as rejection:
            return rejection


def make_units(count: int, samples: int = 3) -> list[Unit]:
    """Units `unit-0` and so on."""
    return [
        Unit(name=f"unit-{n}", input=f"{n}.tar", bytes=10, sha256=f"{n:064x}", samples=samples) for n in range(count)
    ]


def make_plan(output: Storage, count: int, samples: int = 3) -> Plan:
    """A plan of `count` units, settled in the output folder."""
    return settle_plan(output, Plan.make("toy", ToyConfig(), make_units(count, samples), ["toys"]))


def keys_of(units: Sequence[Unit]) -> list[str]:
    """All keys, in order."""
    return [f"{unit.name}/{number:03d}" for unit in units for number in range(unit.samples or 0)]


def read_rows(output: Storage) -> list[dict[str, Any]]:
    """The rows that a reader sees: of all files that manifests name, sorted by key."""
    return _rows(output, [file.path for manifest in read_manifests(output) for file in manifest.files])


def read_quarantine(output: Storage) -> list[dict[str, Any]]:
    """The quarantine rows that manifests name, sorted by key."""
    return _rows(output, [manifest.quarantine.path for manifest in read_manifests(output) if manifest.quarantine])


def _rows(output: Storage, paths: Sequence[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path in paths:
        with output.open(path) as stream:
            found += pq.read_table(stream).to_pylist()
    return sorted(found, key=lambda row: row["key"])


def execute_toy(job: ToyJob, unit: Unit, plan_hash: str, output_uri: str) -> str:
    """Makes one attempt in the process that calls this; returns the name of the attempt that committed."""
    return execute(job, unit, plan_hash, output_uri).attempt


def die_before_commit(job: ToyJob, unit: Unit, plan_hash: str, output_uri: str) -> None:
    """Makes one attempt that is killed after it has written its data and before it commits."""
    kill: Callable[..., Any] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    process.commit = kill
    execute(job, unit, plan_hash, output_uri)


def open_output(folder: Path) -> tuple[Storage, str]:
    """An output folder, and a folder for notes beside it."""
    notes = folder / "notes"
    notes.mkdir(parents=True, exist_ok=True)
    return open_storage(folder / "out"), str(notes)


def committed_bytes(folder: Path) -> dict[str, bytes]:
    """The bytes of all committed files, by unit and ending. The names of attempts, drawn at random, are left out."""
    return {
        manifest.unit + Path(file.path).suffix: (folder / file.path).read_bytes()
        for manifest in read_manifests(open_storage(folder))
        for file in manifest.files
    }


def times_without_lease(folder: Path) -> dict[Path, int]:
    """When each file of an output folder and below last changed, in nanoseconds, but those of leases."""
    files = (path for path in folder.rglob("*") if path.is_file() and "lease" not in path.parts)
    return {path: path.stat().st_mtime_ns for path in files}


def bytes_without_lease(folder: Path) -> dict[str, bytes]:
    """The bytes of all files of an output folder, by path, but those of its lease."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("lease/")}
