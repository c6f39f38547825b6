"""The runner: whatever fails on the way, in this process or on Ray, rows come out as from an undisturbed run."""

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.config import RunnerConfig
from pipeline.errors import JobFailedError, LeaseHeldError, LeaseLostError, StorageError
from pipeline.storage.base import Storage
from pipeline.storage.journal import Journal
from pipeline.storage.open import open_storage
from pipeline.work import executor, runner
from pipeline.work.executor import Failure, Handle, Task
from pipeline.work.holder import Holder
from pipeline.work.lease import read_standing
from pipeline.work.manifest import Manifest, committed_units, read_manifests
from pipeline.work.process import Progress, execute
from pipeline.work.ray_workers import hide_unreserved_gpus
from pipeline.work.runner import CRASHES_BEFORE_ISOLATION, MIN_SAMPLES_TO_JUDGE, run
from pipeline.work.tally import Tally
from tests.support import toys

INLINE = RunnerConfig(executor="inline")
RAY = RunnerConfig(executor="ray")


class Recorder:
    """A display that remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []

    def update(self, tally: Tally) -> None:
        self.seen.append((tally.units_done, tally.samples_so_far, tally.rejected_so_far))


class Bench:
    """An output folder, a job and its plan."""

    def __init__(self, folder: Path, units: int, samples: int = 3, orders: dict[str, str] | None = None) -> None:
        self.output, notes = toys.open_output(folder)
        self.plan = toys.make_plan(self.output, units, samples)
        self.job = toys.ToyJob(notes, orders or {})
        self.keys = toys.keys_of(self.plan.units)

    def run(self, config: RunnerConfig, display: Recorder | None = None) -> Tally:
        return run(self.job, self.plan, self.output, config, display)

    def obey(self, orders: dict[str, str]) -> None:
        """Other orders for the next run."""
        self.job = toys.ToyJob(self.job.notes, orders)

    def assert_rows(self, *without: str) -> None:
        """Every key but those has its row, once, and no file is there that no manifest names."""
        expected = [{"key": key, "length": len(key)} for key in self.keys if key not in without]
        assert toys.read_rows(self.output) == expected
        named = {file.path for manifest in read_manifests(self.output) for file in runner_files(manifest)}
        assert {path for path, _ in self.output.list() if path.startswith(("data/", "quarantine/"))} == named


def runner_files(manifest: Manifest) -> list:
    return [*manifest.files, *([manifest.quarantine] if manifest.quarantine else [])]


@pytest.fixture(params=["inline", "ray"])
def config(request: pytest.FixtureRequest) -> RunnerConfig:
    if request.param == "ray":
        request.getfixturevalue("local_ray")
    return RunnerConfig(executor=request.param)


def test_an_undisturbed_run(tmp_path: Path, config: RunnerConfig):
    bench = Bench(tmp_path, 5, orders={"unit-1/001": "reject", "unit-3/000": "vanish"})
    display = Recorder()
    tally = bench.run(config, display)
    bench.assert_rows("unit-1/001", "unit-3/000")
    assert [(row["key"], row["reason"]) for row in toys.read_quarantine(bench.output)] == [
        ("unit-1/001", "corrupt"),
        ("unit-3/000", "missing"),
    ]
    assert (tally.units_done, tally.units_total) == (5, 5)
    assert (tally.samples, tally.samples_total, tally.samples_before) == (15, 15, 0)
    assert tally.rejected == {"corrupt": 1, "missing": 1}
    assert tally.summary == {"rows": 13, "length": 130}
    assert tally.running == {}
    assert tally.seconds == pytest.approx(sum(manifest.seconds for manifest in read_manifests(bench.output)))
    assert display.seen[-1] == (5, 15, 2)
    done, samples, _ = zip(*display.seen, strict=True)
    assert list(done) == sorted(done)
    assert max(samples) == 15
    assert bench.job.count("attempt") == {unit.name: 1 for unit in bench.plan.units}


def test_what_may_pass_is_tried_again(tmp_path: Path, config: RunnerConfig):
    bench = Bench(tmp_path, 3, orders={"unit-1/002": "lose once"})
    bench.run(config)
    bench.assert_rows()
    assert bench.job.count("attempt") == {"unit-0": 1, "unit-1": 2, "unit-2": 1}


def test_what_never_passes_is_given_up_and_the_rest_is_done(tmp_path: Path, config: RunnerConfig):
    bench = Bench(tmp_path, 4, orders={"unit-1/002": "lose", "unit-2/000": "damage"})
    with pytest.raises(JobFailedError) as caught:
        bench.run(config.model_copy(update={"max_attempts": 3}))
    message = str(caught.value)
    assert "2 of 4 shards failed" in message
    assert "unit-1: cannot read unit-1/002: the network is down" in message
    assert "unit-2: unit-2/000 has changed" in message
    # Damage does not heal: one attempt.
    assert bench.job.count("attempt") == {"unit-0": 1, "unit-1": 3, "unit-2": 1, "unit-3": 1}
    assert committed_units(bench.output) == {"unit-0", "unit-3"}

    bench.obey({})
    tally = bench.run(config)
    bench.assert_rows()
    assert bench.job.count("attempt") == {"unit-0": 1, "unit-1": 4, "unit-2": 2, "unit-3": 1}
    assert (tally.units_done, tally.samples, tally.samples_before) == (4, 12, 6)
    assert tally.summary["rows"] == 12


def test_a_run_that_is_done_does_nothing_but_count(tmp_path: Path):
    bench = Bench(tmp_path, 3)
    first = bench.run(INLINE)
    bench.output.write("data/unit-0-killed.parquet", b"garbage")
    again = bench.run(INLINE)
    assert bench.job.count("attempt") == {"unit-0": 1, "unit-1": 1, "unit-2": 1}
    assert (again.samples, again.samples_before, again.summary) == (first.samples, 9, first.summary)
    bench.assert_rows()


def test_an_image_that_confounds_its_job_is_isolated_and_quarantined(tmp_path: Path, config: RunnerConfig):
    bench = Bench(tmp_path, 3, orders={"unit-1/001": "raise"})
    tally = bench.run(config)
    bench.assert_rows("unit-1/001")
    (row,) = toys.read_quarantine(bench.output)
    assert (row["key"], row["reason"]) == ("unit-1/001", "failed")
    assert "nobody foresaw this" in row["message"]
    assert tally.rejected == {"failed": 1}
    assert bench.job.count("attempt")["unit-1"] == CRASHES_BEFORE_ISOLATION + 1


def test_too_few_attempts_for_isolation_fail_the_unit_with_its_cause(tmp_path: Path):
    bench = Bench(tmp_path, 2, orders={"unit-0/001": "raise"})
    with pytest.raises(JobFailedError, match="unit-0: KeyError: 'nobody foresaw this'"):
        bench.run(INLINE.model_copy(update={"max_attempts": CRASHES_BEFORE_ISOLATION}))


@pytest.mark.usefixtures("local_ray")
def test_a_worker_killed_in_the_middle_changes_nothing(tmp_path: Path):
    bench = Bench(tmp_path, 4, orders={"unit-1/001": "kill once", "unit-2/000": "kill once"})
    tally = bench.run(RAY)
    bench.assert_rows()
    assert tally.rejected == {}
    assert bench.job.count("attempt") == {"unit-0": 1, "unit-1": 2, "unit-2": 2, "unit-3": 1}


@pytest.mark.usefixtures("local_ray")
def test_an_image_that_always_kills_its_worker_is_quarantined(tmp_path: Path):
    bench = Bench(tmp_path, 3, orders={"unit-1/001": "kill"})
    tally = bench.run(RAY)
    bench.assert_rows("unit-1/001")
    (row,) = toys.read_quarantine(bench.output)
    assert (row["key"], row["reason"]) == ("unit-1/001", "killed_worker")
    assert tally.rejected == {"killed_worker": 1}


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("stuck", ["unit-6/000", "unit-6/002"])
def test_a_straggler_is_run_twice_and_the_first_commit_wins(tmp_path: Path, stuck: str):
    """Stuck in its first sample or later; the second attempt is quick."""
    bench = Bench(tmp_path, 7, orders={stuck: "sleep 120 once"})
    begin = time.monotonic()
    bench.run(RAY.model_copy(update={"straggler_factor": 3.0}))
    assert time.monotonic() - begin < 100
    assert bench.job.count("attempt")["unit-6"] == 2
    assert [row["key"] for row in toys.read_rows(bench.output)] == bench.keys


@pytest.mark.usefixtures("local_ray")
def test_a_straggler_that_was_only_slow_loses_nothing(tmp_path: Path):
    """Both attempts come to an end; whichever was first, every row is there once."""
    bench = Bench(tmp_path, 7, orders={"unit-6/001": "sleep 1"})
    bench.run(RAY.model_copy(update={"straggler_factor": 1.5}))
    assert [row["key"] for row in toys.read_rows(bench.output)] == bench.keys


def test_inline_and_ray_give_the_same(tmp_path: Path, local_ray: None):
    orders = {"unit-1/001": "reject", "unit-2/002": "vanish"}
    here, there = Bench(tmp_path / "here", 4, orders=orders), Bench(tmp_path / "there", 4, orders=orders)
    one, other = here.run(INLINE), there.run(RAY)
    assert toys.read_rows(here.output) == toys.read_rows(there.output)
    assert toys.read_quarantine(here.output) == toys.read_quarantine(there.output)
    assert (one.samples, one.rejected, one.summary) == (other.samples, other.rejected, other.summary)


def run_two_drivers(bench: Bench, config: RunnerConfig) -> list[Tally | LeaseHeldError]:
    def drive(_: int) -> Tally | LeaseHeldError:
        try:
            return bench.run(config)
        except LeaseHeldError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(drive, range(2)))


def test_of_two_drivers_of_one_folder_one_writes_and_the_other_says_who(tmp_path: Path):
    bench = Bench(tmp_path, 12, orders={"unit-0/000": "sleep 0.3"})
    outcomes = run_two_drivers(bench, INLINE)
    assert {type(outcome) for outcome in outcomes} == {Tally, LeaseHeldError}
    assert all(f"pid {os.getpid()}" in str(outcome) for outcome in outcomes if isinstance(outcome, LeaseHeldError))
    bench.assert_rows()
    assert set(bench.job.count("attempt").values()) == {1}
    assert {manifest.fence for manifest in read_manifests(bench.output)} == {1}


def test_a_second_driver_may_wait_and_then_finds_all_done(tmp_path: Path):
    bench = Bench(tmp_path, 12)
    tallies = run_two_drivers(bench, INLINE.model_copy(update={"lease_wait_seconds": 60, "lease_seconds": 2}))
    bench.assert_rows()
    assert set(bench.job.count("attempt").values()) == {1}
    assert [(t.units_done, t.samples, t.summary["rows"]) for t in tallies if isinstance(t, Tally)] == [(12, 36, 36)] * 2


@pytest.mark.parametrize("config", [INLINE, RAY])
def test_a_driver_that_lost_its_lease_ends_and_its_workers_commit_nothing(
    tmp_path: Path, config: RunnerConfig, request: pytest.FixtureRequest
):
    if config is RAY:
        request.getfixturevalue("local_ray")
    bench = Bench(tmp_path, 2, orders=dict.fromkeys(("unit-0/001", "unit-1/001"), "sleep 2"))

    class Thief(Recorder):
        """Takes the lease as if its holder had been silent for long, once a unit is at work."""

        def update(self, tally: Tally) -> None:
            super().update(tally)
            standing = read_standing(bench.output)
            if tally.running and standing is not None and standing.number == 1:
                thief = Holder.of_this_process("theft", 30).model_dump_json().encode()
                assert Journal(bench.output, "lease").append(1, thief)

    with pytest.raises(LeaseLostError, match="theft"):
        bench.run(config, Thief())
    assert committed_units(bench.output) == set()
    assert not list(bench.output.list("data"))


def bad_keys(units: int, samples: int, bad: int) -> dict[str, str]:
    return {f"unit-{unit}/{number:03d}": "reject" for unit in range(units) for number in range(bad)}


def test_too_many_bad_images_stop_the_job_early_and_keep_what_is_committed(tmp_path: Path):
    bench = Bench(tmp_path, 9, samples=50, orders=bad_keys(9, 50, bad=30))
    with pytest.raises(JobFailedError) as caught:
        bench.run(INLINE)
    message = str(caught.value)
    units = MIN_SAMPLES_TO_JUDGE // 50
    assert f"{30 * units} of {50 * units} images are bad (corrupt {30 * units})" in message
    assert "max_bad_share" in message
    assert committed_units(bench.output) == {f"unit-{number}" for number in range(units)}
    assert len(toys.read_rows(bench.output)) == 20 * units
    # As its message says: raised, the job goes on where it stopped.
    bench.run(INLINE.model_copy(update={"max_bad_share": 0.6}))
    assert set(bench.job.count("attempt").values()) == {1}
    assert len(toys.read_rows(bench.output)) == 180


@pytest.mark.usefixtures("local_ray")
def test_a_job_that_stops_on_ray_leaves_nothing_running(tmp_path: Path):
    orders = {**bad_keys(3, 50, bad=50), "unit-3/000": "sleep 3"}
    bench = Bench(tmp_path, 4, samples=50, orders=orders)
    with pytest.raises(JobFailedError, match="images are bad"):
        bench.run(RAY)
    time.sleep(4)
    assert "unit-3" not in committed_units(bench.output)


@pytest.mark.parametrize(("share", "fails"), [(0.5, False), (0.49, True), (0.0, True), (1.0, False)])
def test_few_images_are_judged_at_the_end(tmp_path: Path, share: float, fails: bool):
    bench = Bench(tmp_path, 2, samples=4, orders=bad_keys(2, 4, bad=2))
    config = INLINE.model_copy(update={"max_bad_share": share})
    if fails:
        with pytest.raises(JobFailedError, match="4 of 8 images are bad"):
            bench.run(config)
    else:
        assert bench.run(config).rejected == {"corrupt": 4}
    assert committed_units(bench.output) == {"unit-0", "unit-1"}


class FakeExecutor:
    """Ends tasks as scripted, one at a time, in this process; remembers how many were out."""

    def __init__(self, window: int) -> None:
        self._window = window
        self.out: dict[Handle, Task] = {}
        self.most = 0
        self.submitted: Counter[str] = Counter()

    def window(self) -> int:
        return self._window

    def submit(self, task: Task) -> Handle:
        self.submitted[task.unit.name] += 1
        handle = f"{task.unit.name}#{self.submitted[task.unit.name]}"
        self.out[handle] = task
        self.most = max(self.most, len(self.out))
        return handle

    def wait(self, handles: Sequence[Handle]) -> list[tuple[Handle, Manifest | Failure]]:
        assert set(handles) == set(self.out)
        handle = handles[-1]
        task = self.out.pop(handle)
        return [(handle, execute(task.job, task.unit, task.plan_hash, task.output_uri))]

    def cancel(self, handle: Handle) -> None:
        del self.out[handle]

    def publish(self, tally: Tally) -> None:
        """Nobody watches."""


def test_no_more_tasks_are_out_than_the_window_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bench, fake = Bench(tmp_path, 20), FakeExecutor(window=3)

    @contextmanager
    def open_fake(*arguments: object) -> Iterator[FakeExecutor]:
        yield fake

    monkeypatch.setattr(runner, "open_executor", open_fake)
    bench.run(INLINE)
    bench.assert_rows()
    assert fake.most == 3
    assert set(fake.submitted.values()) == {1}


@pytest.mark.usefixtures("local_ray")
def test_workers_bound_the_window_on_ray(tmp_path: Path):
    """With one worker, every attempt ends before the next begins: each key is processed in the order of units."""
    bench = Bench(tmp_path, 3, orders={f"unit-{n}/000": "sleep 0.3" for n in range(3)})
    bench.run(RAY.model_copy(update={"workers": 1}))
    notes = sorted(Path(bench.job.notes).glob("note-processed-*"), key=lambda note: note.stat().st_mtime_ns)
    order = [note.name.split("-")[3] for note in notes]
    assert order == sorted(order)


def test_a_tally_counts_what_runs_and_what_is_done():
    tally = Tally(units_total=3)
    tally.running["unit-0"] = Progress("unit-0", samples=4, rejected=1, summary={"rows": 3.0})
    tally.running["unit-1"] = Progress("unit-1", samples=2)
    assert (tally.samples_so_far, tally.rejected_so_far, tally.summary_so_far("rows")) == (6, 1, 3)
    tally.add(
        Manifest(
            unit="unit-0",
            attempt="a",
            plan="p",
            files=(),
            quarantine=None,
            samples=5,
            rejected={"corrupt": 2},
            seconds=1.5,
            summary={"rows": 3.0},
        )
    )
    assert (tally.units_done, tally.samples_so_far, tally.rejected_so_far) == (1, 7, 2)
    assert (tally.summary_so_far("rows"), tally.seconds) == (3, 1.5)
    assert list(tally.running) == ["unit-1"]


def test_output_on_another_storage_is_run_as_well(tmp_path: Path):
    output: Storage = open_storage("memory://toys/out")
    _, notes = toys.open_output(tmp_path)
    plan = toys.make_plan(output, 2)
    run(toys.ToyJob(notes, {"unit-0/000": "lose once"}), plan, output, INLINE)
    assert [row["key"] for row in toys.read_rows(output)] == toys.keys_of(plan.units)


def test_a_storage_that_failed_is_given_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second and the third attempt wait, the third twice as long."""
    monkeypatch.setattr(runner, "FIRST_PAUSE_SECONDS", 0.2)
    output, notes = toys.open_output(tmp_path)
    plan = toys.make_plan(output, 1)
    begins: list[float] = []

    def fail_twice(*arguments: object, **options: object) -> Manifest:
        begins.append(time.monotonic())
        if len(begins) < 3:
            raise StorageError("the network is down")
        return execute(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(executor, "execute", fail_twice)
    run(toys.ToyJob(notes, {}), plan, output, INLINE)
    assert begins[1] - begins[0] >= 0.2
    assert begins[2] - begins[1] >= 0.4
    assert len(committed_units(output)) == 1


def test_a_task_that_reserved_no_gpu_sees_none(local_ray: None):
    import ray

    def visible() -> str | None:
        hide_unreserved_gpus()
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    assert ray.get(ray.remote(visible).remote()) == ""
