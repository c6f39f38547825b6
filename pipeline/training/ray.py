"""`pipeline.training.loop` on Ray Train (v2): a group of workers, which Ray replaces as a whole when one of them dies.

Ray starts the workers, connects them (gloo or nccl), and starts them again after a loss. Checkpoints do not go through
Ray: the loop writes them into the run's own folder with `pipeline.storage.open`, so that the same command goes on after
any stop, on any cluster, from any kind of path. Ray's checkpoints depend on the name and the storage of a Ray run.

The driver holds the lease of the run's folder, and rank 0 writes under its number. Ray's own handler of ^C ends the
process with status 0 and saves nothing, so Ray waits for the workers in a thread, and the driver asks the workers to
stop.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from air.errors import AirError, NonFiniteLossError
from pipeline import logs
from pipeline.config import RunnerConfig
from pipeline.errors import ConfigError, JobFailedError, LeaseLostError, TrainingError
from pipeline.storage.open import open_storage
from pipeline.training.group import Group
from pipeline.training.loop import Report, train
from pipeline.training.plan import TrainJob
from pipeline.work.lease import Lease, hold
from pipeline.work.ray import ray_session
from pipeline.work.room import RoomWatch
from pipeline.work.stop import Stopped

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_STOP_SECONDS = 25.0  # for the workers to end their step and write a checkpoint; schedulers often allow 30


class _Board:
    """A Ray actor where rank 0 posts its figures, and where it learns that it should stop."""

    def __init__(self) -> None:
        self._posts: list[dict[str, float]] = []
        self._stops = False
        self._asked = False

    def post(self, figures: dict[str, float]) -> None:
        self._posts.append(figures)

    def take(self) -> list[dict[str, float]]:
        posts, self._posts = self._posts, []
        return posts

    def stop(self) -> bool:
        self._stops = True
        return self._asked  # a worker is there that will hear of it

    def stops(self) -> bool:
        self._asked = True
        return self._stops


def train_on_ray(job: TrainJob, report: Report) -> dict[str, float]:
    """Trains on the configured number of workers; returns what `pipeline.training.loop.train` returns.

    Raises:
        ConfigError: ray.train is not installed, or the cluster has fewer resources than the workers need.
        JobFailedError: Workers were lost more often than `max_failures` allows, or failed for another reason; or the
            cluster lacked room for them for `max_wait_seconds`.
        LeaseHeldError: Another process works in the run's folder.
        LeaseLostError: Another process has taken over the run's folder.
        KeyboardInterrupt: ^C or SIGTERM came. The workers have written a checkpoint, if they could in time.
        AirError: An error of the training itself.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")  # the default from Ray 2.51 on
    try:
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise ConfigError(
            f"training on Ray needs ray[train] ({error}): pip install 'air-gaussians[train]', "
            "or train in this process with --executor inline"
        ) from None
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    trainer = job.trainer
    gpus = trainer.num_gpus
    resources = {"CPU": float(job.threads), **({"GPU": gpus} if gpus else {})}
    needed = RunnerConfig.model_validate(
        {"address": trainer.address, "num_cpus": job.threads * trainer.workers, "num_gpus": gpus * trainer.workers}
    )
    with (
        hold(open_storage(job.output), "train", trainer) as lease,
        ray_session(needed),
        tempfile.TemporaryDirectory(prefix="air-") as folder,
    ):
        # The board stays with the driver: otherwise it could be lost with a node whose loss it should outlive.
        here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        board = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()
        run = TorchTrainer(
            _work,
            train_loop_config={"job": job, "board": board, "fence": lease, "logs": logs.present()},
            scaling_config=ScalingConfig(num_workers=trainer.workers, use_gpu=gpus > 0, resources_per_worker=resources),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            run_config=RunConfig(
                storage_path=folder,
                failure_config=FailureConfig(max_failures=trainer.max_failures),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        room = RoomWatch(trainer.workers, resources, trainer.max_wait_seconds)
        try:
            outcome = _Driver(board, report, lease, room).run(run.fit).return_value
        except TrainingFailedError as error:
            failures = getattr(error, "worker_failures", {})
            ours = next((failure for failure in failures.values() if isinstance(failure, AirError)), None)
            if ours is not None:
                raise ours from None
            raise JobFailedError(
                f"training failed {trainer.max_failures + 1} times, the last time with: {_last_line(error)}. "
                "The same command goes on from the last checkpoint"
            ) from error
    assert outcome is not None
    if "failure" in outcome:
        raise outcome["failure"]
    return outcome


def _work(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The function that Ray Train runs in every worker."""
    import ray.train
    from ray.train.torch import get_device

    logs.configure(settings["logs"])
    context = ray.train.get_context()
    job: TrainJob = settings["job"]
    board = settings["board"]
    device = get_device() if job.trainer.num_gpus else None
    group = Group(context.get_world_rank(), context.get_world_size(), device)
    try:
        figures = train(
            job,
            group,
            lambda figures: board.post.remote(dict(figures)),
            fence=settings["fence"],
            told_to_stop=_Asking(board) if group.rank == 0 else lambda: False,
        )
    except (NonFiniteLossError, TrainingError, LeaseLostError) as error:
        return {"failure": error}  # Ray would retry after a raised error, and the retry would end the same way
    except Stopped:
        return {"failure": TrainingError("the run was told to stop, and wrote a checkpoint")}
    return dict(figures)


class _Asking:
    """Asks the board whether to stop, twice a second, and never waits for the answer."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._asked = time.monotonic()
        self._question = board.stops.remote()
        self._stops = False

    def __call__(self) -> bool:
        import ray
        from ray.exceptions import RayError

        if not self._stops and time.monotonic() - self._asked > _POLL_SECONDS:
            ready, _ = ray.wait([self._question], timeout=0)
            if ready:
                try:
                    self._stops = ray.get(ready[0])
                except RayError:  # the board is gone, and the driver with it
                    self._stops = True
                self._asked = time.monotonic()
                self._question = self._board.stops.remote()
        return self._stops


class _Driver:
    """The driver while the workers train: hands on their figures, and looks after the lease, the cluster and ^C."""

    def __init__(self, board: Any, report: Report, lease: Lease, room: RoomWatch) -> None:
        self._board = board
        self._report = report
        self._lease = lease
        self._room = room

    def run(self, fit: Callable[[], Any]) -> Any:
        """Runs Ray's `fit` in a thread; returns or raises what that does."""
        ending: Future[Any] = Future()

        def work() -> None:
            try:
                ending.set_result(fit())
            except BaseException as error:  # noqa: BLE001 - it is raised again in the driver's thread
                ending.set_exception(error)

        threading.Thread(target=work, name="ray-train", daemon=True).start()
        try:
            while not ending.done():
                self._lease.raise_if_lost()
                self._room.look()
                self._take()
                self._wait(ending, _POLL_SECONDS)
        except KeyboardInterrupt:
            self._stop(ending)
            raise
        finally:
            if not ending.done():
                self._end_board()
        self._take()
        return ending.result()

    def _stop(self, ending: Future[Any]) -> None:
        """Lets the workers write a checkpoint, if they are at work."""
        import ray
        from ray.exceptions import RayError

        with suppress(RayError):
            if ray.get(self._board.stop.remote(), timeout=10 * _POLL_SECONDS) and not self._room.is_short:
                logger.warning(
                    "stopping after this step, with a checkpoint, in %.0f s at most; once more stops at once",
                    _STOP_SECONDS,
                )
                self._wait(ending, _STOP_SECONDS)

    @staticmethod
    def _wait(ending: Future[Any], seconds: float) -> None:
        with suppress(TimeoutError):
            ending.exception(seconds)

    def _end_board(self) -> None:
        """Lets workers stop that this driver leaves behind: a Ray of the caller outlives the run."""
        import ray

        ray.kill(self._board)

    def _take(self) -> None:
        import ray
        from ray.exceptions import RayError

        try:
            for figures in ray.get(self._board.take.remote(), timeout=10):
                self._report(figures)
        except RayError:
            pass  # the display may miss figures; training goes on


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
