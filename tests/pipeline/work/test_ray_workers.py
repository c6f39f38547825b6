"""Workers with a GPU keep their process and their GPU for the whole job, fail one attempt alone, and let go at the end.

The GPUs of the tests' Ray exist in its books alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest

from pipeline.config import RunnerConfig
from pipeline.errors import JobFailedError
from pipeline.storage.base import Storage
from pipeline.work import ray_workers
from pipeline.work.runner import run
from tests.support import toys

pytestmark = pytest.mark.usefixtures("local_ray")

BOTH_GPUS = RunnerConfig(num_gpus=2)
"""The cluster has two GPUs, so one worker at a time."""

ONE_GPU, HALF_A_GPU = RunnerConfig(num_gpus=1), RunnerConfig(num_gpus=0.5)


class Bench:
    """A toy job of `units` shards, its output and what its attempts noted."""

    def __init__(self, folder: Path, units: int, orders: Mapping[str, str] | None = None) -> None:
        self.output: Storage
        self.output, notes = toys.open_output(folder)
        self.plan = toys.make_plan(self.output, units)
        self.job = toys.ToyJob(notes, orders or {})

    def run(self, config: RunnerConfig) -> None:
        run(self.job, self.plan, self.output, config)

    @property
    def processes(self) -> dict[int, set[str]]:
        """The processes that made attempts, each with the GPUs that it saw."""
        seen: dict[int, set[str]] = {}
        for note in self.job.count("process"):
            process, _, gpus = note.partition(".")
            seen.setdefault(int(process), set()).add(gpus)
        return seen

    def keys(self) -> list[str]:
        return [row["key"] for row in toys.read_rows(self.output)]


def free_gpus() -> float:
    import ray

    return ray.available_resources().get("GPU", 0.0)


def becomes_true(condition: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def test_ten_shards_on_one_slot_are_the_work_of_one_process(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 10)
    bench.run(BOTH_GPUS)
    assert bench.keys() == toys.keys_of(bench.plan.units)
    assert bench.job.count("process").total() == 10
    assert list(bench.processes.values()) == [{"0,1"}]


def test_a_process_keeps_its_gpu(tmp_path: Path) -> None:
    """CUDA, once initialised, stays on the GPU that the process saw first."""
    bench = Bench(tmp_path, 10, {f"unit-{number}/000": "sleep 0.3" for number in range(10)})
    bench.run(ONE_GPU)
    assert len(bench.processes) <= 2
    assert all(gpus in ({"0"}, {"1"}) for gpus in bench.processes.values())


def test_the_end_of_a_job_frees_its_gpus_on_a_cluster_that_goes_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 3)
    bench.run(HALF_A_GPU)
    assert becomes_true(lambda: free_gpus() == 2)
    assert becomes_true(lambda: not any(psutil.pid_exists(process) for process in bench.processes))


@pytest.mark.slow
def test_a_job_that_stops_frees_its_gpus_too(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 4, {"unit-0/000": "damage", "unit-1/000": "reject", "unit-1/001": "reject"})
    with pytest.raises(JobFailedError):
        bench.run(HALF_A_GPU.model_copy(update={"max_bad_share": 0.0}))
    assert becomes_true(lambda: free_gpus() == 2)


def test_a_killed_worker_is_replaced_and_its_shard_repeated(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 4, {"unit-1/001": "kill once"})
    bench.run(BOTH_GPUS)
    assert bench.keys() == toys.keys_of(bench.plan.units)
    assert bench.job.count("attempt") == {"unit-0": 1, "unit-1": 2, "unit-2": 1, "unit-3": 1}
    assert len(bench.processes) == 2


def test_a_process_is_not_used_again_after_an_unforeseen_error(tmp_path: Path) -> None:
    """After some errors of CUDA, every later call in the process fails."""
    bench = Bench(tmp_path, 3, {"unit-1/001": "raise once"})
    bench.run(BOTH_GPUS)
    assert bench.job.count("attempt") == {"unit-0": 1, "unit-1": 2, "unit-2": 1}
    assert len(bench.processes) == 2


def test_a_process_outlives_a_failure_of_the_storage(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 3, {"unit-1/001": "lose once"})
    bench.run(BOTH_GPUS)
    assert bench.job.count("attempt")["unit-1"] == 2
    assert len(bench.processes) == 1


@pytest.mark.slow
def test_an_image_that_kills_its_worker_is_quarantined_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 2, {"unit-1/001": "kill"})
    bench.run(BOTH_GPUS)
    (row,) = toys.read_quarantine(bench.output)
    assert (row["key"], row["reason"]) == ("unit-1/001", "killed_worker")
    assert len(bench.keys()) == 5


@pytest.mark.slow
def test_a_straggler_is_killed_when_its_second_attempt_commits(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 7, {"unit-6/000": "sleep 120 once"})
    begin = time.monotonic()
    bench.run(ONE_GPU.model_copy(update={"straggler_factor": 3.0}))
    assert time.monotonic() - begin < 100
    assert bench.job.count("attempt")["unit-6"] == 2
    assert becomes_true(lambda: not any(psutil.pid_exists(process) for process in bench.processes))


@pytest.mark.slow
def test_an_idle_worker_gives_its_gpu_back_while_the_job_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its GPU may be another job's, or its node an autoscaler's to remove."""
    monkeypatch.setattr(ray_workers, "IDLE_SECONDS", 0.5)
    bench = Bench(tmp_path, 2, {"unit-0/000": "sleep 12", "unit-1/000": "sleep 1"})
    free: list[float] = []

    class Watch:
        def update(self, tally: object) -> None:
            free.append(free_gpus())

    run(bench.job, bench.plan, bench.output, ONE_GPU, Watch())
    assert 1.0 in free[free.index(0.0) :]


class BrokenWorker:
    """Its process dies while it starts."""

    def start(self) -> None:
        os._exit(1)


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "_Worker", BrokenWorker)
    bench = Bench(tmp_path, 2)
    with pytest.raises(JobFailedError, match="unit-0: its worker died"):
        bench.run(BOTH_GPUS.model_copy(update={"max_attempts": 2}))
