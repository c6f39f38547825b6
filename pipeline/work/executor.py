"""Where tasks run: in this process, or on Ray. An executor knows how to run a task and nothing of retries or plans."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from air.errors import AirError
from pipeline.errors import StorageError
from pipeline.work.manifest import Manifest
from pipeline.work.plan import Unit
from pipeline.work.process import Job, Progress, execute

logger = logging.getLogger(__name__)

Handle = Hashable


@dataclass(frozen=True)
class Task:
    """One attempt at one unit; the arguments of `pipeline.work.process.execute`."""

    job: Job
    unit: Unit
    plan_hash: str
    output_uri: str
    isolate: bool


@dataclass(frozen=True)
class Failure:
    """An attempt that committed nothing.

    Attributes:
        cause: For people.
        crashed: The worker died, rather than raised.
        may_pass: Another attempt could end otherwise.
    """

    cause: str
    crashed: bool
    may_pass: bool


Report = Callable[[Progress], None]
"""Called with the last word of a unit, in the thread that waits."""


class Executor(Protocol):
    """Runs tasks."""

    def window(self) -> int:
        """How many tasks may be submitted and not ended, now."""
        ...

    def submit(self, task: Task) -> Handle:
        """Takes a task."""
        ...

    def wait(self, handles: Sequence[Handle]) -> list[tuple[Handle, Manifest | Failure]]:
        """What has ended; empty if nothing did for a while."""
        ...

    def cancel(self, handle: Handle) -> None:
        """Stops a task whose result nobody wants."""
        ...


def failure_of(error: BaseException) -> Failure:
    """An exception that a task raised. What the network did may pass, what the data is does not.

    One that is not ours came out of some image's processing: it counts as a crash, so that the image will be found.
    """
    if isinstance(error, AirError):
        return Failure(str(error), crashed=False, may_pass=isinstance(error, StorageError))
    return Failure(f"{type(error).__name__}: {error}", crashed=True, may_pass=True)


class InlineExecutor:
    """One task after another in this process, in `wait`. An image that kills its process kills this one."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._tasks: dict[Handle, Task] = {}
        self._count = 0

    def window(self) -> int:
        """Always one."""
        return 1

    def submit(self, task: Task) -> Handle:
        """Keeps the task for `wait`."""
        self._count += 1
        self._tasks[self._count] = task
        return self._count

    def wait(self, handles: Sequence[Handle]) -> list[tuple[Handle, Manifest | Failure]]:
        """Runs the first task to its end."""
        handle = handles[0]
        try:
            return [(handle, execute_attempt(self._tasks.pop(handle), self._report))]
        except Exception as error:
            logger.debug("%s", error, exc_info=True)
            return [(handle, failure_of(error))]

    def cancel(self, handle: Handle) -> None:
        """Forgets the task."""
        self._tasks.pop(handle, None)


def execute_attempt(task: Task, report: Report) -> Manifest:
    return execute(task.job, task.unit, task.plan_hash, task.output_uri, isolate=task.isolate, report=report)
