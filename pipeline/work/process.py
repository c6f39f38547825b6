"""What a worker does with one unit: read its samples, process each, write the results, commit.

A job says what a sample's result is; everything around it is here and the same for all jobs. This module knows nothing
of Ray: it runs wherever it is called.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import pyarrow as pa

from air.errors import AirError
from air.version import __version__
from pipeline.errors import Reason, Rejected
from pipeline.formats import tables
from pipeline.identity import checksum_of, printable
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.work.manifest import DataFile, Manifest, commit
from pipeline.work.plan import Unit


@dataclass(frozen=True)
class Sample:
    """One input image. `read` gives its bytes, so that a listing costs no I/O and a failure has a name.

    Attributes:
        key: Identifies the image; stable.
        source: Where the image came from, for people.
        read: Its encoded bytes. Raises Rejected for one that is gone.
    """

    key: str
    source: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class EncodedImage:
    """A sample whose bytes are at hand: all that a job's `process` may depend on, beside its configuration."""

    unit: str
    key: str
    source: str
    data: bytes


class Writer(Protocol):
    """Writes the results of one unit into local files of a scratch folder, in bounded memory.

    Files are called `<unit>.<ending>`, or `<unit>-<n>.<ending>` where there are several.
    """

    def add(self, result: Any) -> Mapping[str, float]:
        """Takes the result of one sample; returns what it adds to the summary."""
        ...

    def finish(self) -> list[tuple[Path, int]]:
        """Closes and returns the files with the rows of each."""
        ...


class Job(Protocol):
    """A bulk job. It must pickle: it travels to the workers, which keep models and kernels in module state."""

    name: ClassVar[str]

    def prepare(self, say: Callable[[str], None]) -> None:
        """Gets the worker ready before its first sample; says what takes long."""
        ...

    def samples(self, unit: Unit, scratch: Path) -> Iterator[Sample]:
        """The unit's samples in order. Raises for a unit that is not what the plan says."""
        ...

    def process(self, image: EncodedImage) -> Any:
        """The result for one image; depends on nothing but the image and the configuration. Raises Rejected."""
        ...

    def writer(self, unit: Unit, scratch: Path, metadata: Mapping[str, str]) -> Writer:
        """A fresh writer for the unit's results."""
        ...


@runtime_checkable
class BatchJob(Job, Protocol):
    """A job that gains from taking several images at once, as one on a GPU does. No result depends on the others."""

    def batch_size(self) -> int:
        """How many images `process_many` is to get at once, here; asked after `prepare`."""
        ...

    def process_many(self, encoded: Sequence[EncodedImage]) -> list[Any]:
        """For each image what `process` returns, or the Rejected that it raises."""
        ...


@dataclass(frozen=True)
class Progress:
    """How far one attempt has come, and what it is busy with where that is no sample."""

    unit: str
    samples: int = 0
    rejected: int = 0
    summary: Mapping[str, float] | None = None
    note: str = ""


def execute(
    job: Job,
    unit: Unit,
    plan_hash: str,
    output_uri: str,
    *,
    isolate: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Manifest:
    """Does one unit and commits it; the whole of what a worker does.

    Args:
        job: What to do.
        unit: With what.
        plan_hash: Hash of the plan, stamped on every file.
        output_uri: The output folder.
        isolate: Run every image in a child process, and put whatever happens there on the image: one that kills its
            process, or fails in a way that nobody foresaw, is found and quarantined.
        report: Called when the work begins and after every sample.

    Returns:
        The manifest that is now in place: this attempt's, or that of another attempt which came first.
    """
    output = open_storage(output_uri)
    attempt = uuid.uuid4().hex[:12]
    begin = time.perf_counter()
    metadata = {"air.plan": plan_hash, "air.code_version": __version__, "air.job": job.name, "air.unit": unit.name}
    rejections = []
    summary: Counter[str] = Counter()
    count = 0
    with tempfile.TemporaryDirectory(prefix="air-") as folder, _Caller(job, isolate) as call:
        scratch = Path(folder)
        job.prepare(lambda note: report(Progress(unit.name, note=note)))
        report(Progress(unit.name))  # an attempt that hangs in its first sample is known to have begun
        writer = job.writer(unit, scratch, metadata)
        for samples in batched(job.samples(unit, scratch), call.batch_size()):
            contents = [_content(sample) for sample in samples]
            images = [
                EncodedImage(unit.name, sample.key, sample.source, content)
                for sample, content in zip(samples, contents, strict=True)
                if isinstance(content, bytes)
            ]
            outcomes = iter(call(images))
            for sample, content in zip(samples, contents, strict=True):
                outcome = next(outcomes) if isinstance(content, bytes) else content
                count += 1
                if isinstance(outcome, Rejected):
                    rejections.append(_quarantine_row(job, unit, sample, content, outcome))
                else:
                    summary.update(writer.add(outcome))
                report(Progress(unit.name, count, len(rejections), dict(summary)))
        files = [
            _store(output, local, rows, f"data/{unit.name}-{attempt}{local.name.removeprefix(unit.name)}")
            for local, rows in writer.finish()
        ]
        quarantine = None
        if rejections:
            local = scratch / "quarantine.parquet"
            with tables.open_writer(str(local), tables.stamped(tables.QUARANTINE, metadata)) as parquet:
                parquet.write_table(pa.Table.from_pylist(rejections, schema=parquet.schema))
            quarantine = _store(output, local, len(rejections), f"quarantine/{unit.name}-{attempt}.parquet")
        manifest = Manifest(
            unit=unit.name,
            attempt=attempt,
            plan=plan_hash,
            files=tuple(files),
            quarantine=quarantine,
            samples=count,
            rejected=dict(sorted(Counter(row["reason"] for row in rejections).items())),
            seconds=round(time.perf_counter() - begin, 3),
            summary={key: float(value) for key, value in sorted(summary.items())},
        )
    return commit(output, manifest)


T = TypeVar("T")


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Runs of `size` items, the last one shorter; takes no item before it is needed."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


def _content(sample: Sample) -> bytes | Rejected:
    """The sample's bytes, or why there are none."""
    try:
        return sample.read()
    except Rejected as rejection:
        return rejection


def _store(output: Storage, local: Path, rows: int, path: str) -> DataFile:
    checksum, size = checksum_of(local), local.stat().st_size
    output.upload(local, path)
    return DataFile(path=path, bytes=size, sha256=checksum, rows=rows)


def _quarantine_row(
    job: Job, unit: Unit, sample: Sample, content: bytes | Rejected, rejection: Rejected
) -> dict[str, Any]:
    data = content if isinstance(content, bytes) else None
    return {
        "key": sample.key,
        "shard": unit.name,
        "stage": job.name,
        "reason": rejection.reason.value,
        "message": printable(f"{sample.source}: {rejection.message}"),
        "sha256": "" if data is None else hashlib.sha256(data).hexdigest(),
        "bytes": len(data or b""),
    }


class _Caller:
    """Has the job process images: here, or each alone in a child process that may die of it."""

    def __init__(self, job: Job, isolate: bool) -> None:
        self._job = job
        self._isolate = isolate
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Caller:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def batch_size(self) -> int:
        """How many images to pass at once."""
        return self._job.batch_size() if isinstance(self._job, BatchJob) and not self._isolate else 1

    def __call__(self, images: Sequence[EncodedImage]) -> list[Any]:
        """For each image its result, or a Rejected."""
        if isinstance(self._job, BatchJob) and len(images) > 1:
            return self._job.process_many(images)
        return [self._result(image) for image in images]

    def _result(self, image: EncodedImage) -> Any:
        try:
            return self._in_children(image) if self._isolate else self._job.process(image)
        except Rejected as rejection:
            return rejection

    def _in_children(self, image: EncodedImage) -> Any:
        try:
            return self._in_child(image)
        except BrokenProcessPool:
            pass
        try:
            return self._in_child(image)  # once may be the machine's fault, such as a neighbour that took the memory
        except BrokenProcessPool:
            raise Rejected(Reason.KILLED_WORKER, "its process died of it, twice: crash or out of memory") from None

    def _in_child(self, image: EncodedImage) -> Any:
        if self._pool is None:
            pool = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
            pool.submit(os.getpid).result()  # a child that cannot start is no image's fault
            self._pool = pool
        try:
            return self._pool.submit(self._job.process, image).result()
        except BrokenProcessPool:
            self._pool = None
            raise
        except (AirError, OSError, MemoryError):
            raise
        except Exception as error:
            raise Rejected(Reason.FAILED, f"{type(error).__name__}: {error}") from error
