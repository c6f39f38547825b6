"""Two commands on one output folder, as processes that are stopped, killed and interrupted: exactly one writes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs.cli import main
from pipeline.storage.open import open_storage
from pipeline.training.state import checkpoints
from pipeline.work.audit import verify
from pipeline.work.holder import Holder
from pipeline.work.lease import hold, read_standing
from pipeline.work.manifest import committed_units, read_manifests
from tests.support.toys import bytes_without_lease, encode_picture

ENCODE = ("--pixels-per-gaussian", "60", "--steps", "150", "--executor", "inline", "--lease-seconds", "2")
TRAIN = (
    *("--patch-size", "8", "--stages", "2", "--settings", '{"channels": 16, "depth": 1}', "--batch", "3"),
    *("--min-crop", "32", "--max-crop", "40", "--valid-images", "2", "--threads", "1", "--lease-seconds", "2"),
    *("--steps", "100000", "--log-every", "1", "--checkpoint-every", "5"),
)


@contextmanager
def air(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, which ends with the block."""
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and all that it said, the last line first."""
    out = process.communicate(timeout=240)[0]
    return process.returncode, "\n".join(reversed(out.strip().splitlines()))


def stop(process: subprocess.Popen[str]) -> None:
    """As a machine that hangs: SIGSTOP."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def visible_bytes(folder: Path) -> dict[str, bytes]:
    """All files of a folder as a storage lists them: without the unfinished writes of a process that was stopped."""
    output = open_storage(folder)
    return {path: output.read(path) for path, _ in output.list()}


def holder_of(folder: Path) -> int:
    """Process number of whoever took the lease last."""
    standing = read_standing(open_storage(folder))
    assert standing is not None
    return standing.holder.pid


def pretend_to_be_elsewhere(folder: Path) -> None:
    """Makes the holder one of an unknown machine, of whose processes nobody here can know whether they live."""
    entry = max((folder / "lease").glob("0*.json"))
    holder = Holder.model_validate_json(entry.read_text())
    entry.write_text(holder.model_copy(update={"machine": "another", "host": "elsewhere"}).model_dump_json())


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.png").write_bytes(encode_picture(number, 160, 160))
    return folder


@pytest.mark.parametrize("command", [("gc",), ("verify", "--repair")])
def test_commands_that_change_a_folder_refuse_while_it_is_in_use(
    shards: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with hold(open_storage(shards), "distill"):
        before = bytes_without_lease(shards)
        assert main([*command, str(shards)]) == 1
        assert f"in use by distill (pid {os.getpid()} on" in capsys.readouterr().err
        assert bytes_without_lease(shards) == before
        for reading in ("status", "verify"):
            assert main([reading, str(shards)]) == 0
        assert f"distill, pid {os.getpid()}" in re.sub(r"\W*\n\W*", " ", capsys.readouterr().out)
    assert main([*command, str(shards)]) == 0
    assert main(["status", str(shards)]) == 0
    assert "no holder" in capsys.readouterr().out


@pytest.mark.slow
def test_of_two_jobs_one_writes_and_the_other_says_who(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with air("encode", images, out, *ENCODE) as first:
        wait_for(lambda: list((out / "lease").glob("0*")), first)
        with air("encode", images, out, *ENCODE) as second:
            status, said = end_of(second)
        assert status == 1
        assert re.search(rf"air encode: {out} is in use by encode \(pid {first.pid} on .*, since 2\d{{3}}-.* UTC", said)
        assert end_of(first)[0] == 0
    assert list(verify(open_storage(out))) == []


@pytest.mark.slow
def test_a_job_killed_elsewhere_is_taken_over_after_its_time(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with air("encode", images, out, *ENCODE) as first:
        wait_for(lambda: list((out / "lease").glob("0*")), first)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    pretend_to_be_elsewhere(out)
    with air("encode", images, out, *ENCODE) as second:
        status, said = end_of(second)
        assert status == 0, said
        assert f"encode (pid {first.pid} on elsewhere, " in said
        assert "watching for 2 s whether that lives" in said
        assert holder_of(out) == second.pid
    assert list(verify(open_storage(out))) == []
    assert min(manifest.fence or 0 for manifest in read_manifests(open_storage(out))) >= 2


@pytest.mark.slow
def test_a_job_stopped_beyond_its_time_writes_nothing_when_it_goes_on(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with air("encode", images, out, *ENCODE) as first:
        wait_for(lambda: list((out / "lease").glob("0*")), first)
        time.sleep(1)
        stop(first)
        done = committed_units(open_storage(out))
        with air("encode", images, out, *ENCODE) as second:
            assert end_of(second)[0] == 0
        assert len(committed_units(open_storage(out))) > len(done)
        before = visible_bytes(out)
        first.send_signal(signal.SIGCONT)
        status, said = end_of(first)
    assert status == 1
    assert said.startswith(f"air encode: lost the lease of {out} to encode (pid {second.pid} on ")
    assert visible_bytes(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_a_training_stopped_beyond_its_time_writes_nothing_when_it_goes_on(
    shards: Path, tmp_path: Path, executor: str
) -> None:
    """The second training takes over, and is interrupted: its folder stays as it is when the first goes on."""
    out = tmp_path / "run"
    command = ("train", shards, out, "--valid", shards, *TRAIN, "--executor", executor)
    with air(*command) as first:
        wait_for(lambda: checkpoints(open_storage(out)), first)
        with air(*command) as refused:
            status, said = end_of(refused)
        assert status == 1
        assert f"is in use by train (pid {first.pid} on" in said
        stop(first)
        with air(*command) as second:
            wait_for(lambda: holder_of(out) == second.pid, second)
            reached = checkpoints(open_storage(out))[-1]
            wait_for(lambda: checkpoints(open_storage(out))[-1] > reached, second)
            second.send_signal(signal.SIGINT)
            status, said = end_of(second)
        assert status == 130, said
        assert said.startswith("air train: interrupted; run the same command again to go on\n")
        before = visible_bytes(out)
        first.send_signal(signal.SIGCONT)
        status, said = end_of(first)
    assert status == 1
    assert said.startswith(f"air train: lost the lease of {out} to train (pid {second.pid} on ")
    assert visible_bytes(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_an_interrupted_training_keeps_its_last_step(shards: Path, tmp_path: Path, executor: str) -> None:
    out = tmp_path / "run"
    never = ("--checkpoint-every", "1000000", "--checkpoint-seconds", "1000000", "--executor", executor)
    with air("train", shards, out, "--valid", shards, *TRAIN, *never) as process:
        wait_for((out / "metrics.jsonl").exists, process)
        process.send_signal(signal.SIGINT)
        status, said = end_of(process)
    assert status == 130, said
    assert said.startswith("air train: interrupted; run the same command again to go on\n")
    assert len(checkpoints(open_storage(out))) == 1
    assert main(["status", str(out)]) == 0
