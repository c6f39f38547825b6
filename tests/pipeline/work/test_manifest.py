"""Commits: of any number of attempts at a unit exactly one is visible, and the files of the others are removed."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import DamagedDataError
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.work.audit import remove_garbage
from pipeline.work.manifest import DataFile, Manifest, commit, committed_units, read_manifest, read_manifests
from tests.support import toys

SPAWN = multiprocessing.get_context("spawn")


def files_of(output: Storage) -> set[str]:
    return {path for path, _ in output.list()}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"{}", b'{"job": "toy"}', b"\xff\xfe"])
def test_a_manifest_that_cannot_be_understood_is_damaged(tmp_path: Path, content: bytes):
    output = open_storage(tmp_path)
    output.write("manifest/unit-0.json", content)
    with pytest.raises(DamagedDataError, match=r"unit-0\.json is not a manifest"):
        read_manifest(output, "manifest/unit-0.json")


def assert_one_visible(output: Storage, job: toys.ToyJob, winners: list[str], tries: int) -> None:
    """All attempts name one winner, whose files alone are left and hold every row once."""
    assert job.count("attempt") == {"unit-0": tries}
    (manifest,) = read_manifests(output)
    assert set(winners) == {manifest.attempt}
    assert [row["key"] for row in toys.read_rows(output)] == toys.keys_of(toys.make_units(1, 20))
    data = {f"data/unit-0-{manifest.attempt}.parquet", f"quarantine/unit-0-{manifest.attempt}.parquet"}
    assert files_of(output) == {"plan.json", "manifest/unit-0.json"} | {p for p in data if output.exists(p)}


def test_of_many_threads_one_commits_and_the_others_clean_up(tmp_path: Path):
    output, notes = toys.open_output(tmp_path)
    plan, job = toys.make_plan(output, 1, samples=20), toys.ToyJob(notes)
    with ThreadPoolExecutor(8) as pool:
        attempts = [pool.submit(toys.execute_toy, job, plan.units[0], plan.hash, output.uri()) for _ in range(16)]
        winners = [attempt.result() for attempt in attempts]
    assert_one_visible(output, job, winners, 16)


def test_of_many_processes_one_commits_and_the_others_clean_up(tmp_path: Path):
    output, notes = toys.open_output(tmp_path)
    plan, job = toys.make_plan(output, 1, samples=20), toys.ToyJob(notes)
    with ProcessPoolExecutor(3, mp_context=SPAWN) as pool:
        attempts = [pool.submit(toys.execute_toy, job, plan.units[0], plan.hash, output.uri()) for _ in range(9)]
        winners = [attempt.result(timeout=120) for attempt in attempts]
    assert_one_visible(output, job, winners, 9)


def test_an_attempt_killed_before_its_commit_is_never_seen_and_is_swept_up(tmp_path: Path):
    output, notes = toys.open_output(tmp_path)
    plan, job = toys.make_plan(output, 1), toys.ToyJob(notes, {"unit-0/001": "reject"})
    victim = SPAWN.Process(target=toys.die_before_commit, args=(job, plan.units[0], plan.hash, output.uri()))
    victim.start()
    victim.join(120)
    assert victim.exitcode == -9
    garbage = files_of(output) - {"plan.json"}
    assert {path.partition("/")[0] for path in garbage} == {"data", "quarantine"}
    assert committed_units(output) == set()
    assert toys.read_rows(output) == []

    toys.execute_toy(job, plan.units[0], plan.hash, output.uri())
    rows, before = toys.read_rows(output), files_of(output)
    assert len(rows) == 2
    size = sum(output.size(path) for path in garbage)
    assert remove_garbage(output) == (2, size)
    assert files_of(output) == before - garbage
    assert toys.read_rows(output) == rows
    assert remove_garbage(output) == (0, 0)


def a_manifest(attempt: str, path: str) -> Manifest:
    return Manifest(
        unit="unit-0",
        attempt=attempt,
        plan="p",
        files=(DataFile(path=path, bytes=1, sha256="", rows=1),),
        quarantine=DataFile(path=f"quarantine/{attempt}", bytes=1, sha256="", rows=1),
        samples=2,
        rejected={"corrupt": 1},
        seconds=0.1,
        summary={},
    )


def test_a_commit_whose_answer_is_lost_keeps_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The write happens, and its repetition finds the file."""
    output = open_storage(tmp_path)
    put = type(output).put_if_absent
    monkeypatch.setattr(type(output), "put_if_absent", lambda *given: put(*given) and put(*given))
    for path in ("data/mine", "quarantine/me"):
        output.write(path, b"1")
    mine = a_manifest("me", "data/mine")
    assert commit(output, mine) == mine
    assert files_of(output) == {"data/mine", "quarantine/me", "manifest/unit-0.json"}


def test_a_later_commit_gives_way_with_all_its_files(tmp_path: Path):
    output = open_storage(tmp_path)
    for path in ("data/first", "data/second", "quarantine/first", "quarantine/second"):
        output.write(path, b"1")
    first, second = a_manifest("first", "data/first"), a_manifest("second", "data/second")
    assert commit(output, first) == first
    assert commit(output, second) == first
    assert files_of(output) == {"data/first", "quarantine/first", "manifest/unit-0.json"}
