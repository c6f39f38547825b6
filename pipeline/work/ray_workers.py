"""The processes on a Ray cluster that work on tasks: one for each task at work, or one for each reserved GPU.

On CPUs, a task is a Ray task, and Ray reuses processes as it sees fit. On GPUs, it is a call of an actor that lives for
the whole job. Ray ends the process of a GPU task after the task, so each shard would pay for imports, a CUDA context
and the loading of kernels; told to keep the process (`max_calls=0`), Ray gives it another GPU from task to task, which
CUDA, once initialised, does not follow.

This module must not know windows, retries or plans.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol

from pipeline import logs
from pipeline.logs import LogSettings
from pipeline.work.executor import Failure, Handle, Task, execute_attempt, failure_of
from pipeline.work.manifest import Manifest
from pipeline.work.process import Progress

logger = logging.getLogger(__name__)

Outcome = Manifest | Failure
IDLE_SECONDS = 60.0
"""A process without a task gives its GPU back after this time: another job may need the GPU, or nobody the node."""

_REPORT_SECONDS = 0.5  # between two posts of a worker


class Workers(Protocol):
    """Processes that work on tasks."""

    def submit(self, task: Task) -> Handle:
        """Accepts a task; returns its handle."""
        ...

    def wait(self, handles: Sequence[Handle], seconds: float) -> list[tuple[Handle, Outcome]]:
        """The outcomes of tasks that have ended; waits so long if there are none."""
        ...

    def cancel(self, handle: Handle) -> None:
        """Kills the process that works on the task."""
        ...

    def close(self) -> None:
        """Ends the processes."""
        ...


class TaskWorkers:
    """Runs each task as a Ray task.

    Args:
        resources: What Ray reserves for each task, as options of `ray.remote`.
        board: The actor whose method `post` takes progress.
    """

    def __init__(self, resources: dict[str, Any], board: Any) -> None:
        import ray

        # Ray itself repeats no task, because the runner must see and count attempts and crashes.
        self._work: Any = ray.remote(**resources, max_retries=0)(_work)
        self._board = board

    def submit(self, task: Task) -> Handle:
        """Hands the task to Ray."""
        return self._work.remote(task, self._board, logs.present())

    def wait(self, handles: Sequence[Handle], seconds: float) -> list[tuple[Handle, Outcome]]:
        """All tasks that have ended, else the first that ends in time."""
        return [(handle, _outcome(handle)) for handle in _ended(list(handles), seconds)]

    def cancel(self, handle: Handle) -> None:
        """Kills the worker of the task."""
        import ray

        ray.cancel(handle, force=True)  # type: ignore[arg-type]

    def close(self) -> None:
        """Does nothing: Ray ends the processes of tasks."""


class ActorWorkers:
    """Runs tasks in actors, each of which keeps its GPU and its process for the whole job.

    - A task waits here until an actor is free. As many actors are asked for as tasks wait, so that an autoscaling
      cluster grows.
    - An actor whose attempt crashed is replaced, because a GPU may be in a bad state: it harms one attempt.
    - An actor without a task ends after `IDLE_SECONDS`.

    Args:
        resources: What Ray reserves for each actor, as options of `ray.remote`.
        board: The actor whose method `post` takes progress.
    """

    def __init__(self, resources: dict[str, Any], board: Any) -> None:
        import ray

        self._ray: Any = ray
        self._actors: Any = ray.remote(**resources, max_restarts=0, max_task_retries=0)(_Worker)
        self._board = board
        self._numbers = count(1)
        self._waiting: deque[tuple[Handle, Task]] = deque()
        self._starting: dict[Any, Any] = {}  # the reference that becomes ready with the actor -> the actor
        self._busy: dict[Any, tuple[Handle, Any]] = {}  # the reference of the attempt -> its task, and the actor
        self._idle: list[tuple[Any, float]] = []  # actors, and since when they are idle

    def submit(self, task: Task) -> Handle:
        """Gives the task to an idle actor, or keeps it until one is."""
        handle = next(self._numbers)
        self._waiting.append((handle, task))
        self._assign()
        return handle

    def wait(self, handles: Sequence[Handle], seconds: float) -> list[tuple[Handle, Outcome]]:
        """All tasks that have ended, else those that end with the first change in time."""
        self._let_go()
        ended: list[tuple[Handle, Outcome]] = []
        for reference in _ended([*self._starting, *self._busy], seconds):
            outcome = _outcome(reference)
            failed = isinstance(outcome, Failure)
            if reference in self._starting:
                actor = self._starting.pop(reference)
                if failed and self._waiting:  # an attempt, so that actors that cannot start do not begin for ever
                    ended.append((self._waiting.popleft()[0], outcome))
                keep = not failed
            else:
                handle, actor = self._busy.pop(reference)
                ended.append((handle, outcome))
                keep = not (failed and outcome.crashed)
            if keep:
                self._idle.append((actor, time.monotonic()))
            else:
                self._ray.kill(actor)
        self._assign()
        return ended

    def cancel(self, handle: Handle) -> None:
        """Kills the actor that works on the task, or forgets a task that waits."""
        self._waiting = deque(pair for pair in self._waiting if pair[0] != handle)
        for reference, (other, actor) in list(self._busy.items()):
            if other == handle:
                del self._busy[reference]
                self._ray.kill(actor)

    def close(self) -> None:
        """Kills all actors, so that none holds a GPU of a cluster that outlives the job."""
        busy = [actor for _, actor in self._busy.values()]
        for actor in [*self._starting.values(), *busy, *(actor for actor, _ in self._idle)]:
            self._ray.kill(actor)

    def _assign(self) -> None:
        """Gives waiting tasks to idle actors, and asks for an actor for each task that is left."""
        while self._waiting and self._idle:
            handle, task = self._waiting.popleft()
            actor, _ = self._idle.pop()
            self._busy[actor.work.remote(task, self._board, logs.present())] = (handle, actor)
        while len(self._starting) < len(self._waiting):
            actor = self._actors.remote()
            self._starting[actor.start.remote()] = actor

    def _let_go(self) -> None:
        """Withdraws requests for actors that no task waits for, and ends actors that were idle for long."""
        while len(self._starting) > len(self._waiting):
            _, actor = self._starting.popitem()
            self._ray.kill(actor)
        old = time.monotonic() - IDLE_SECONDS
        for actor, since in self._idle:
            if since < old:
                self._ray.kill(actor)
        self._idle = [(actor, since) for actor, since in self._idle if since >= old]


class _Worker:
    """The actor of `ActorWorkers`: a process that holds a GPU."""

    def start(self) -> None:
        """Does nothing: its end says that the process runs."""

    def work(self, task: Task, board: Any, log_settings: LogSettings) -> Manifest:
        return _work(task, board, log_settings)


def _work(task: Task, board: Any, log_settings: LogSettings) -> Manifest:
    """Makes an attempt in a process of Ray, and posts its progress now and then."""
    logs.configure(log_settings)
    hide_unreserved_gpus()
    posted = 0.0

    def report(progress: Progress) -> None:
        nonlocal posted
        if time.monotonic() - posted > _REPORT_SECONDS:
            posted = time.monotonic()
            board.post.remote(progress)

    return execute_attempt(task, report)


def hide_unreserved_gpus() -> None:
    """Hides the node's GPUs from a task that reserved none. Otherwise all such tasks would use the first GPU.

    Ray shows a task the GPUs that the task reserved. In some versions and settings, a task that reserved none sees all.
    """
    import ray

    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _ended(references: list[Any], seconds: float) -> list[Any]:
    """The references that are ready, else the first that becomes ready in time."""
    import ray

    if not references:
        return []
    ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
    if not ready:
        ready, _ = ray.wait(references, num_returns=1, timeout=seconds)
    return ready


def _outcome(reference: Any) -> Any:
    """What a reference that is ready holds; a Failure if there is an error in its place."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        logger.debug("%s", error)
        return failure_of(error.cause)  # type: ignore[arg-type]
    except RayError as error:
        # The task did not raise this: its process died, its node is lost, or memory ran out.
        first_line = str(error).strip().splitlines()[0][:120]
        return Failure(f"its worker died ({type(error).__name__}: {first_line})", crashed=True, may_pass=True)
