"""One process at a time holds an output folder: others are refused, the dead taken over, the stopped fenced off."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.config import LeaseConfig
from pipeline.errors import DamagedDataError, LeaseHeldError, LeaseLostError, StorageError
from pipeline.storage.base import Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.open import open_storage
from pipeline.work import holder, lease
from pipeline.work.holder import Holder
from pipeline.work.lease import Fence, Lease, acquire, describe, hold, read_standing

CONFIG = LeaseConfig(lease_seconds=30)


class Clock:
    """A clock that runs only while somebody sleeps; `between` is called with the time after each sleep."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.between = lambda time: None

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.between(self.time)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In place of the machine's clock."""
    clock = Clock()
    monkeypatch.setattr(lease, "now", lambda: clock.time)
    monkeypatch.setattr(lease.time, "sleep", clock.sleep)
    return clock


@pytest.fixture(params=["local", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty folder."""
    return open_storage(tmp_path / "out" if request.param == "local" else f"memory://bucket/{uuid.uuid4().hex}")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes a lease seems to be on another machine than whoever looks at it."""
    machines = iter(range(10**9))
    monkeypatch.setattr(holder, "_this_machine", lambda: f"machine {next(machines)}")


def test_a_free_folder_is_taken_at_once_and_given_back(output: Storage, clock: Clock) -> None:
    for number in (1, 2, 3):
        with hold(output, "distill", CONFIG) as held:
            assert held.number == number
            held.check()
            standing = read_standing(output)
            assert standing is not None
            assert not standing.is_free
            assert (standing.number, standing.holder.pid) == (number, os.getpid())
        assert describe(read_standing(output)) == "no holder"
    assert clock.time == 1000


def test_a_lease_is_given_back_on_errors(output: Storage) -> None:
    for stop in (ValueError, KeyboardInterrupt):
        with pytest.raises(stop), hold(output, "distill", CONFIG):
            raise stop
        assert describe(read_standing(output)) == "no holder"


def test_a_second_process_is_refused_at_once_and_told_who_is_there(output: Storage, clock: Clock) -> None:
    with hold(output, "distill", CONFIG), pytest.raises(LeaseHeldError) as caught, hold(output, "gc", CONFIG):
        pass
    said = str(caught.value)
    for part in (output.uri(), "distill", f"pid {os.getpid()} on", "since 20", "UTC", "last sign of life 0 s ago"):
        assert part in said
    assert clock.time == 1000


@pytest.mark.usefixtures("elsewhere")
def test_a_holder_elsewhere_that_gives_signs_of_life_is_not_taken_over(output: Storage, clock: Clock) -> None:
    first = acquire(output, "distill", CONFIG)

    def renew(time: float) -> None:
        if time >= 1010:
            first.renew()

    clock.between = renew
    with pytest.raises(LeaseHeldError, match="distill"):
        acquire(output, "distill", CONFIG)
    assert clock.time < 1015  # the first change of the beat is enough
    first.check()


@pytest.mark.usefixtures("elsewhere")
def test_a_silent_holder_is_taken_over_after_its_own_time_and_writes_nothing(output: Storage, clock: Clock) -> None:
    first = acquire(output, "distill", LeaseConfig(lease_seconds=60))
    first.renew()
    second = acquire(output, "encode", LeaseConfig(lease_seconds=2))
    assert 1060 < clock.time < 1070
    assert (first.number, second.number) == (1, 2)
    before = files(output)
    with pytest.raises(LeaseLostError, match="encode"):
        output.guarded(first.check).write("data/x", b"x")
    first.renew()
    first.release()
    assert files(output) == before
    output.guarded(second.check).write("data/x", b"y")


@pytest.mark.usefixtures("elsewhere")
def test_whoever_waits_gets_the_lease_when_it_is_given_back(output: Storage, clock: Clock) -> None:
    first = acquire(output, "distill", CONFIG)

    def work(time: float) -> None:
        first.renew() if time < 1100 else first.release()

    clock.between = work
    second = acquire(output, "distill", LeaseConfig(lease_wait_seconds=200))
    assert second.number == 2
    assert clock.time < 1105


@pytest.mark.usefixtures("elsewhere")
def test_patience_ends(output: Storage, clock: Clock) -> None:
    first = acquire(output, "distill", CONFIG)
    clock.between = lambda time: first.renew()
    with pytest.raises(LeaseHeldError):
        acquire(output, "distill", LeaseConfig(lease_wait_seconds=100))
    assert 1100 <= clock.time < 1105


def test_a_holder_that_slept_alone_goes_on_with_a_new_number(output: Storage, clock: Clock) -> None:
    """It appends the number that a contender would have to append, so that one of the two finds it taken."""
    first = acquire(output, "distill", CONFIG)
    worker = pickle.loads(pickle.dumps(first))
    clock.time += 1000
    output.guarded(first.check).write("data/x", b"x")
    assert first.number == 2
    worker.check()  # of the same holder
    standing = read_standing(output)
    assert standing is not None
    assert standing.holder.id == first.holder.id


def test_a_check_fails_before_others_may_take_over(output: Storage, clock: Clock) -> None:
    """In the last quarter of its time, a holder does not trust its beat."""
    first = acquire(output, "distill", CONFIG)
    clock.time += 22
    first.check()
    assert first.number == 1
    clock.time += 1
    first.check()
    assert first.number == 2


@pytest.mark.usefixtures("elsewhere")
def test_a_beat_that_was_too_slow_does_not_count(
    output: Storage, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = acquire(output, "distill", CONFIG)
    clock.time += 10
    beat = first._beat

    def slow() -> None:
        clock.time += 25
        beat()

    monkeypatch.setattr(first, "_beat", slow)
    first.renew()
    assert first.number == 2  # the lease was taken anew, since the beat may have come too late for a contender


def test_a_worker_is_fenced_off_by_the_number_of_another_holder(output: Storage, clock: Clock) -> None:
    first = acquire(output, "distill", CONFIG)
    worker = pickle.loads(pickle.dumps(first))
    assert worker == Fence(output, 1, first.holder.id)
    worker.check()
    first.release()
    worker.check()
    acquire(output, "encode", CONFIG)
    with pytest.raises(LeaseLostError, match="encode"):
        worker.check()


def test_a_lease_that_was_given_back_allows_nothing(output: Storage) -> None:
    with hold(output, "distill", CONFIG) as held:
        pass
    with pytest.raises(LeaseLostError, match="given back"):
        held.check()


def test_of_many_contenders_one_wins(output: Storage) -> None:
    start = threading.Barrier(8)

    def contend() -> bool:
        start.wait()
        try:
            acquire(output, "distill", CONFIG)
        except LeaseHeldError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: contend(), range(8))) == 1


def test_a_contender_that_found_an_old_number_free_does_not_hold_the_lease(output: Storage, clock: Clock) -> None:
    """As if it had slept while others took, gave back and removed the number that it tries."""
    with hold(output, "distill", CONFIG) as held:
        stale = Lease(output, held.holder.model_copy(update={"id": "other"}), 0, clock.time)
        with pytest.raises(LeaseLostError):
            stale.check()


def test_old_entries_go(output: Storage, clock: Clock) -> None:
    for _ in range(20):
        with hold(output, "distill", CONFIG):
            pass
    names = {path for path, _ in output.list("lease")}
    assert names == {f"lease/{kind}{number:012d}.json" for kind in ("", "beat-") for number in range(5, 21)}


def test_a_lease_is_kept_alive_by_itself(tmp_path: Path) -> None:
    output = open_storage(tmp_path)
    with hold(output, "distill", LeaseConfig(lease_seconds=1)):
        time.sleep(1.6)
        standing = read_standing(output)
        assert standing is not None
        assert standing.beat is not None
        assert standing.silence < 1


def test_a_storage_that_fails_for_a_while_loses_no_lease(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = open_storage(tmp_path)
    first = acquire(output, "distill", CONFIG)

    def fail(*_: object) -> None:
        raise StorageError("the network is down")

    with monkeypatch.context() as broken:
        for method in ("write", "list", "put_if_absent"):
            broken.setattr(LocalStorage, method, fail)
        for _ in range(10):
            clock.time += 10
            with pytest.raises(StorageError, match="down"):
                first.renew()
        with pytest.raises(StorageError, match="down"):
            first.check()
    first.check()
    assert first.number == 2


def test_a_damaged_lease_is_explained(output: Storage) -> None:
    output.write("lease/000000000001.json", b"{")
    with pytest.raises(DamagedDataError, match=r"delete .*lease"):
        acquire(output, "distill", CONFIG)


def test_a_deleted_lease_is_lost(output: Storage, clock: Clock) -> None:
    held = acquire(output, "distill", CONFIG)
    output.delete_folder("lease")
    clock.time += 1
    with pytest.raises(LeaseLostError, match="deleted"):
        held.check()


HOLD = """
import sys, time
from pipeline.config import LeaseConfig
from pipeline.storage.open import open_storage
from pipeline.work.lease import hold
with hold(open_storage(sys.argv[1]), "distill", LeaseConfig(lease_seconds=1)):
    print("held", flush=True)
    time.sleep(100)
"""


@contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no /proc: a contender watches")
def test_a_killed_process_of_this_machine_is_taken_over_at_once(tmp_path: Path, clock: Clock) -> None:
    output = open_storage(tmp_path)
    with holding(tmp_path) as process:
        with pytest.raises(LeaseHeldError):
            acquire(output, "distill", CONFIG)
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and its parent has not looked yet
        assert describe(read_standing(output)).startswith("no holder; distill, pid")
        assert acquire(output, "distill", CONFIG).number == 2
    assert clock.time == 1000


def test_a_stopped_process_of_this_machine_is_watched(tmp_path: Path) -> None:
    output = open_storage(tmp_path)
    with holding(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        begin = time.monotonic()
        assert acquire(output, "distill", CONFIG).number == 2
        assert time.monotonic() - begin > 1
        before = files(output)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.8)  # two renewals would have been due
        assert files(output) == before


def test_a_process_number_that_was_given_anew_is_another_process() -> None:
    me = Holder.of_this_process("distill", 30)
    assert me.state() == "running"
    assert me.model_copy(update={"started": "1"}).state() == "ended"
    assert me.model_copy(update={"machine": "another", "started": "1"}).state() == "unknown"
    assert me.model_copy(update={"machine": ""}).state() == "unknown"


def files(storage: Storage) -> dict[str, bytes]:
    return {path: storage.read(path) for path, _ in storage.list()}
