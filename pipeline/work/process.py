"""Works on one unit in the worker: reads the samples, processes each, writes the results, commits.

A `Job` says what the result of a sample is; the rest is here and the same for all jobs. This module must not know Ray,
retries or other units.
"""

from __future__ import annotations

import hashlib
import logging
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
from pipeline import logs
from pipeline.errors import Reason, Rejected
from pipeline.formats import tables
from pipeline.identity import checksum_of, printable
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.work.lease import Fence, Lease
from pipeline.work.manifest import DataFile, Manifest, commit
from pipeline.work.plan import Unit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One input image whose bytes are not read yet, so listing costs no I/O and a failed read is told of its sample.

    Attributes:
        key: Identifies the image; stable.
        source: Where the image came from, for people.
        read: Returns the encoded bytes. Raises Rejected if there are none to read.
    """

    key: str
    source: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class EncodedImage:
    """A sample with its bytes. Together with the job's configuration, it determines the result of `Job.process`."""

    unit: str
    key: str
    source: str
    data: bytes


class Writer(Protocol):
    """Writes the results of one unit to local files in a scratch folder, in bounded memory.

    The first file's name is `<unit>.<ending>`; further files are `<unit>-<n>.<ending>`.
    """

    def add(self, result: Any) -> Mapping[str, float]:
        """Appends the result of one sample; returns its contributions to the summary."""
        ...

    def finish(self) -> list[tuple[Path, int]]:
        """Closes the files; returns each with its number of rows."""
        ...


class Job(Protocol):
    """A bulk job. Jobs travel to workers, so they must pickle; workers keep models and kernels in module state."""

    name: ClassVar[str]

    def prepare(self, say: Callable[[str], None]) -> None:
        """Gets the worker ready before the first sample. Calls `say` with what takes long."""
        ...

    def samples(self, unit: Unit, scratch: Path) -> Iterator[Sample]:
        """The unit's samples in order. Raises DamagedDataError if the input is not what the plan says."""
        ...

    def process(self, image: EncodedImage) -> Any:
        """The result for one image; depends on the image and the configuration alone. Raises Rejected."""
        ...

    def writer(self, unit: Unit, scratch: Path, metadata: Mapping[str, str]) -> Writer:
        """A new writer for the unit's results. `metadata` goes into the files if their format has room for it."""
        ...


@runtime_checkable
class BatchJob(Job, Protocol):
    """A job that is faster with several images at once, such as a job on a GPU. Results stay independent."""

    def batch_size(self) -> int:
        """The number of images per call of `process_many` on this worker. Called after `prepare`."""
        ...

    def process_many(self, encoded: Sequence[EncodedImage]) -> list[Any]:
        """For each image the value that `process` returns, or the Rejected that `process` raises."""
        ...


@dataclass(frozen=True)
class Progress:
    """The progress of one attempt.

    Attributes:
        unit: Name of the unit.
        samples: Samples done, rejected ones included.
        rejected: Samples rejected.
        summary: The job's sums so far.
        note: The present work if it is not a sample, such as compiling.
    """

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
    fence: Lease | Fence | None = None,
    isolate: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Manifest:
    """Makes one attempt at a unit, from reading its samples to the commit.

    Args:
        job: The job.
        unit: The unit.
        plan_hash: Hash of the plan, written into every file.
        output_uri: The output folder.
        fence: The lease under which the attempt works. Once it is lost, nothing more is written or committed.
        isolate: Process every image in a child process. An image that kills its process or raises an unexpected error
            is then quarantined, instead of ending the attempt.
        report: Called when the work begins and after every sample.

    Returns:
        The committed manifest: this attempt's, or that of another attempt that committed first.

    Raises:
        LeaseLostError: Another process has taken over the output folder.
    """
    output = open_storage(output_uri)
    if fence is not None:
        output = output.guarded(fence.check)
    attempt = uuid.uuid4().hex[:12]
    clock = _Clock()
    metadata = {"air.plan": plan_hash, "air.code_version": __version__, "air.job": job.name, "air.unit": unit.name}
    rejections = []
    summary: Counter[str] = Counter()
    count = 0
    with tempfile.TemporaryDirectory(prefix="air-") as folder, _Caller(job, isolate) as call:
        scratch = Path(folder)
        job.prepare(lambda note: report(Progress(unit.name, note=note)))
        report(Progress(unit.name))  # so that an attempt that hangs in its first sample counts as begun
        writer = job.writer(unit, scratch, metadata)
        clock.end("prepare")
        for samples in batched(job.samples(unit, scratch), call.batch_size()):
            contents = [_content(sample) for sample in samples]
            images = [
                EncodedImage(unit.name, sample.key, sample.source, content)
                for sample, content in zip(samples, contents, strict=True)
                if isinstance(content, bytes)
            ]
            clock.end("read")
            outcomes = iter(call(images))
            clock.end("process")
            for sample, content in zip(samples, contents, strict=True):
                outcome = next(outcomes) if isinstance(content, bytes) else content
                count += 1
                if isinstance(outcome, Rejected):
                    rejections.append(_quarantine_row(job, unit, sample, content, outcome))
                else:
                    summary.update(writer.add(outcome))
                report(Progress(unit.name, count, len(rejections), dict(summary)))
            clock.end("write")
        clock.end("read")
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
        clock.end("write")
        manifest = Manifest(
            unit=unit.name,
            attempt=attempt,
            plan=plan_hash,
            files=tuple(files),
            quarantine=quarantine,
            samples=count,
            rejected=dict(sorted(Counter(row["reason"] for row in rejections).items())),
            seconds=round(sum(clock.seconds.values()), 3),
            seconds_by_part={part: round(seconds, 3) for part, seconds in clock.seconds.items()},
            summary={key: float(value) for key, value in sorted(summary.items())},
            fence=fence.number if fence is not None else None,
        )
    return commit(output, manifest)


class _Clock:
    """Divides an attempt's time: that since the last call belongs to the part that the next call names.

    Attributes:
        seconds: Seconds of each part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


T = TypeVar("T")


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last list possibly shorter. Takes an item only when its list is due."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


def _content(sample: Sample) -> bytes | Rejected:
    """The sample's bytes, or the rejection that reading raised."""
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
    logger.info("%s is quarantined: %s (%s)", sample.key, rejection.message, rejection.reason.value)
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
    """Lets the job process images, in this process or each alone in a child process, which an image may kill."""

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
        """The number of images to pass at once."""
        return self._job.batch_size() if isinstance(self._job, BatchJob) and not self._isolate else 1

    def __call__(self, images: Sequence[EncodedImage]) -> list[Any]:
        """For each image its result, or the Rejected."""
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
            return self._in_child(image)  # the first death may be the machine's fault, such as too little memory
        except BrokenProcessPool:
            message = "it killed its process twice: a crash, or too little memory"
            raise Rejected(Reason.KILLED_WORKER, message) from None

    def _in_child(self, image: EncodedImage) -> Any:
        if self._pool is None:
            pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=logs.configure, initargs=(logs.present(),))
            pool.submit(os.getpid).result()  # if the child cannot start, this raises here and blames no image
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
