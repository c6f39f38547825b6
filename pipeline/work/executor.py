"""The interface of an executor, which runs tasks, and the executor that runs them in this process.

An executor must not know retries or plans, which are the runner's. The executor on Ray is in `pipeline.work.ray`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from air.errors import AirError
from pipeline import logs
from pipeline.errors import StorageError
from pipeline.work.lease import Fence, Lease
from pipeline.work.manifest import Manifest
from pipeline.work.plan import Unit
from pipeline.work.process import Job, Progress, execute
from pipeline.work.tally import Tally

logger = logging.getLogger(__name__)

Handle = Hashable


@dataclass(frozen=True)
class Task:
    """One attempt at one unit: the arguments of `pipeline.work.process.execute`, and the attempt's number from 1."""

    job: Job
    unit: Unit
    plan_hash: str
    output_uri: str
    fence: Lease | Fence
    isolate: bool
    attempt: int = 1


@dataclass(frozen=True)
class Failure:
    """An attempt that committed nothing.

    Attributes:
        cause: What went wrong, for people.
        crashed: The worker died, or an unexpected exception ended the attempt.
        may_pass: Another attempt may succeed.
    """

    cause: str
    crashed: bool
    may_pass: bool


Report = Callable[[Progress], None]
"""Called with a unit's latest progress, in the thread that calls `wait`."""


class Executor(Protocol):
    """Runs tasks, one or many at a time."""

    def window(self) -> int:
        """The number of tasks that may be running or waiting at present."""
        ...

    def submit(self, task: Task) -> Handle:
        """Accepts a task; returns its handle."""
        ...

    def wait(self, handles: Sequence[Handle]) -> list[tuple[Handle, Manifest | Failure]]:
        """The outcomes of tasks that have ended; empty if no task ends for a while."""
        ...

    def cancel(self, handle: Handle) -> None:
        """Stops a task. Its outcome is lost."""
        ...

    def publish(self, tally: Tally) -> None:
        """Shows the state of the run to who watches the cluster. Called often."""
        ...


def failure_of(error: BaseException) -> Failure:
    """The failure for an exception that a task raised.

    A StorageError may pass; other errors of this project will not. Any other exception came from processing an image:
    it counts as a crash, so that the runner isolates the images and finds that one.
    """
    if isinstance(error, AirError):
        return Failure(str(error), crashed=False, may_pass=isinstance(error, StorageError))
    return Failure(f"{type(error).__name__}: {error}", crashed=True, may_pass=True)


class InlineExecutor:
    """Runs one task after another in this process, in `wait`. An image that kills its process kills the whole run."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._tasks: dict[Handle, Task] = {}
        self._count = 0

    def window(self) -> int:
        """Always 1."""
        return 1

    def submit(self, task: Task) -> Handle:
        """Keeps the task for `wait`."""
        self._count += 1
        self._tasks[self._count] = task
        return self._count

    def wait(self, handles: Sequence[Handle]) -> list[tuple[Handle, Manifest | Failure]]:
        """Runs the first of the tasks to its end."""
        handle = handles[0]
        try:
            return [(handle, execute_attempt(self._tasks.pop(handle), self._report))]
        except Exception as error:
            logger.debug("%s", error, exc_info=True)
            return [(handle, failure_of(error))]

    def cancel(self, handle: Handle) -> None:
        """Forgets the task."""
        self._tasks.pop(handle, None)

    def publish(self, tally: Tally) -> None:
        """Does nothing: there is no cluster."""


def execute_attempt(task: Task, report: Report) -> Manifest:
    """Runs a task in the process that calls this; returns the manifest that is committed."""
    with logs.about(job=task.job.name, unit=task.unit.name, attempt=task.attempt):
        logger.info("%s: attempt %d begins", task.unit.name, task.attempt)
        return execute(
            task.job, task.unit, task.plan_hash, task.output_uri, fence=task.fence, isolate=task.isolate, report=report
        )
