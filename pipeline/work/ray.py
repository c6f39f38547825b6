"""The executor on Ray, and the Ray session that it needs.

Ray is imported at first use, so that inline work does not need it. This module must not know retries or plans, which
are the runner's, nor what a job does.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.config import RunnerConfig
from pipeline.errors import ConfigError, JobFailedError
from pipeline.work.executor import Failure, Handle, Report, Task
from pipeline.work.manifest import Manifest
from pipeline.work.metrics import Recorder
from pipeline.work.process import Progress
from pipeline.work.ray_workers import ActorWorkers, TaskWorkers, Workers
from pipeline.work.tally import Tally

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5  # between looks at the board, and for a task to end
_PUBLISH_SECONDS = 2.0  # between two publications of metrics
_CONNECT_SECONDS = 10.0  # for the head of a cluster to answer
_MEGABYTE = 1_000_000


class RayExecutor:
    """Runs tasks on a Ray cluster. Ray must be initialised."""

    def __init__(self, config: RunnerConfig, report: Report, job: str, output: str) -> None:
        import ray
        import ray.exceptions

        self._ray: Any = ray
        self._config = config
        self._report = report
        self._board = self._ray.remote(num_cpus=0, max_restarts=-1)(_Board).remote(job, output)
        resources: dict[str, Any] = {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus}
        if config.memory_mb:
            resources["memory"] = config.memory_mb * _MEGABYTE
        kind = ActorWorkers if config.num_gpus else TaskWorkers
        self._workers: Workers = kind(resources, self._board)
        self._asked = self._published = 0.0
        self._durations: list[float] = []  # of units committed since the last publication

    def window(self) -> int:
        """`workers` of the configuration, else twice what the cluster can run now, so that workers never wait."""
        if self._config.workers:
            return self._config.workers
        resources = self._ray.cluster_resources()
        slots = resources.get("CPU", 1.0) / self._config.num_cpus
        if self._config.num_gpus:
            slots = min(slots, resources.get("GPU", 0.0) / self._config.num_gpus)
        if self._config.memory_mb:
            slots = min(slots, resources.get("memory", 0.0) / (self._config.memory_mb * _MEGABYTE))
        return max(1, 2 * math.floor(slots))

    def submit(self, task: Task) -> Handle:
        """Hands the task to a worker, now or when one is free."""
        return self._workers.submit(task)

    def wait(self, handles: Sequence[Handle]) -> list[tuple[Handle, Manifest | Failure]]:
        """Waits half a second at most, and reports the progress that workers posted meanwhile."""
        self._pass_on()
        ended = self._workers.wait(handles, _POLL_SECONDS)
        self._durations += [outcome.seconds for _, outcome in ended if isinstance(outcome, Manifest)]
        return ended

    def _pass_on(self) -> None:
        if time.monotonic() - self._asked < _POLL_SECONDS:
            return
        self._asked = time.monotonic()
        try:
            posts = self._ray.get(self._board.take.remote(), timeout=10 * _POLL_SECONDS)
        except self._ray.exceptions.RayError:
            return  # Ray is restarting the board, and a display can wait
        for progress in posts:
            self._report(progress)

    def cancel(self, handle: Handle) -> None:
        """Kills the worker of the task."""
        self._workers.cancel(handle)

    def publish(self, tally: Tally) -> None:
        """Records metrics on the cluster, every few seconds."""
        if time.monotonic() - self._published >= _PUBLISH_SECONDS:
            self._published = time.monotonic()
            self._board.publish.remote(tally, self._durations)
            self._durations = []

    def close(self) -> None:
        """Ends workers that would hold GPUs."""
        self._workers.close()


class _Board:
    """A Ray actor on which workers post their progress, which the driver takes; and the driver posts the run's.

    Args:
        job: Name of the job.
        output: URI of the output folder.
    """

    def __init__(self, job: str, output: str) -> None:
        self._posts: dict[str, Progress] = {}
        self._recorder = Recorder(job, output)

    def publish(self, tally: Tally, durations: Sequence[float]) -> None:
        self._recorder.record(tally, durations)

    def post(self, progress: Progress) -> None:
        self._posts[progress.unit] = progress

    def take(self) -> list[Progress]:
        posts, self._posts = self._posts, {}
        return list(posts.values())


@contextmanager
def ray_session(config: RunnerConfig) -> Iterator[None]:
    """Initialises Ray for the block, unless Ray is initialised already.

    Connects to the cluster of the configuration or of RAY_ADDRESS, or starts Ray on this machine until the block ends.

    Raises:
        ConfigError: The cluster cannot be reached, or this machine lacks the resources that a task asks for.
        JobFailedError: Ray did not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    # A new local cluster makes a token for itself and logs so at every start. Users need not know.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    ours = not ray.is_initialized()
    if ours:
        local = config.address is None and "RAY_ADDRESS" not in os.environ
        # Without `local`, Ray would join the cluster of another job on this machine and die with that job.
        options: dict[str, Any] = (
            {"address": "local", "include_dashboard": False} if local else {"address": config.address}
        )
        if config.address:
            _check_reachable(config.address)
        try:
            with _own_termination():
                ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(f"cannot reach the Ray cluster {config.address or ''}: {error}") from None
        except Exception as error:  # Ray raises bare exceptions, among others if its start times out
            raise JobFailedError(f"Ray did not start: {error}") from error
        _check_fits(config, ray.cluster_resources(), can_grow=not local)
    try:
        yield
    finally:
        if ours:
            with _own_termination():
                ray.shutdown()


@contextmanager
def _own_termination() -> Iterator[None]:
    """Restores this process's handler of SIGTERM after the block.

    Ray's start replaces the handler by an exit that looks like a crash, and Ray's end by the system's default.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _check_reachable(address: str) -> None:
    """Checks that the cluster's head answers. Ray itself would try for many minutes.

    Raises:
        ConfigError: The head does not answer.
    """
    match = re.fullmatch(r"(?:ray://)?([^/:]+|\[[^]]+\]):(\d+)", address)
    if match is None:
        return  # with `auto` and the like, Ray looks on this machine and fails at once if there is no cluster
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"cannot reach the Ray cluster {address}: {error.strerror or error}") from None


def _check_fits(config: RunnerConfig, resources: Mapping[str, float], can_grow: bool) -> None:
    """Checks that the cluster can run a task. Otherwise tasks would wait for ever, unless the cluster grows.

    Raises:
        ConfigError: A cluster that cannot grow lacks the resources of one task.
    """
    asked = (
        ("num_cpus", config.num_cpus, resources.get("CPU", 0.0)),
        ("num_gpus", config.num_gpus, resources.get("GPU", 0.0)),
        ("memory_mb", config.memory_mb or 0, resources.get("memory", 0.0) / _MEGABYTE),
    )
    for name, wanted, there in asked:
        if wanted > there and can_grow:
            logger.warning("%s = %g, but the cluster has %g; waiting for the cluster to grow", name, wanted, there)
        elif wanted > there:
            raise ConfigError(f"{name} = {wanted:g}, but this machine has {there:.0f}; name a cluster with --address")
