"""`pipeline.training.loop` on Ray Train (v2): a group of workers, which Ray replaces as a whole when one of them dies.

Ray starts the workers, connects them (gloo or nccl), and starts them again after a loss. Checkpoints do not go through
Ray: the loop writes them into the run's own folder with `pipeline.storage.open`, so that the same command goes on after
any stop, on any cluster, from any kind of path. Ray's checkpoints depend on the name and the storage of a Ray run.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from air.errors import AirError, NonFiniteLossError
from pipeline.config import RunnerConfig
from pipeline.errors import ConfigError, JobFailedError, TrainingError
from pipeline.training.group import Group
from pipeline.training.loop import Report, train
from pipeline.training.plan import TrainJob
from pipeline.work.ray import ray_session

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5


class _Board:
    """A Ray actor where rank 0 posts its figures."""

    def __init__(self) -> None:
        self._posts: list[dict[str, float]] = []

    def post(self, figures: dict[str, float]) -> None:
        self._posts.append(figures)

    def take(self) -> list[dict[str, float]]:
        posts, self._posts = self._posts, []
        return posts


def train_on_ray(job: TrainJob, report: Report) -> dict[str, float]:
    """Trains on the configured number of workers; returns what `pipeline.training.loop.train` returns.

    Raises:
        ConfigError: ray.train is not installed, or the cluster has fewer resources than the workers need.
        JobFailedError: Workers were lost more often than `max_failures` allows, or failed for another reason.
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

    trainer = job.trainer
    gpus = trainer.num_gpus
    resources = {"CPU": float(job.threads), **({"GPU": gpus} if gpus else {})}
    needed = RunnerConfig.model_validate(
        {"address": trainer.address, "num_cpus": job.threads * trainer.workers, "num_gpus": gpus * trainer.workers}
    )
    with ray_session(needed), tempfile.TemporaryDirectory(prefix="air-") as folder:
        board = ray.remote(num_cpus=0)(_Board).remote()
        run = TorchTrainer(
            _work,
            train_loop_config={"job": job, "board": board},
            scaling_config=ScalingConfig(num_workers=trainer.workers, use_gpu=gpus > 0, resources_per_worker=resources),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            run_config=RunConfig(
                storage_path=folder,
                failure_config=FailureConfig(max_failures=trainer.max_failures),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        with _Forwarding(board, report):
            try:
                outcome = run.fit().return_value
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

    context = ray.train.get_context()
    job: TrainJob = settings["job"]
    device = get_device() if job.trainer.num_gpus else None
    group = Group(context.get_world_rank(), context.get_world_size(), device)
    try:
        return dict(train(job, group, lambda figures: settings["board"].post.remote(dict(figures))))
    except (NonFiniteLossError, TrainingError) as error:
        return {"failure": error}  # Ray would retry after a raised error, and the retry would end the same way


class _Forwarding:
    """A context in which a thread hands the figures that rank 0 posts to the display."""

    def __init__(self, board: Any, report: Callable[[Mapping[str, float]], None]) -> None:
        self._board = board
        self._report = report
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._take()

    def _run(self) -> None:
        while not self._stopped.is_set():
            time.sleep(_POLL_SECONDS)
            self._take()

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
