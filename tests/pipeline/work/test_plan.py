"""Plans and commits: one plan per folder, and of any number of attempts at a unit exactly one is visible."""

import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

import air
from pipeline.errors import DamagedDataError, PlanMismatchError, StorageError
from pipeline.identity import file_safe, seed_of
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.work.audit import remove_garbage
from pipeline.work.manifest import DataFile, Manifest, commit, committed_units, read_manifest, read_manifests
from pipeline.work.plan import Plan, Unit, read_plan, settle_plan
from tests.support import toys

SPAWN = multiprocessing.get_context("spawn")


def make(config: toys.ToyConfig | None = None, units: list[Unit] | None = None, source: str = "here") -> Plan:
    return Plan.make("toy", config or toys.ToyConfig(), toys.make_units(3) if units is None else units, [source])


def files_of(output: Storage) -> set[str]:
    return {path for path, _ in output.list()}


def test_the_hash_depends_on_the_work_and_not_on_where_the_input_lies():
    plan = make()
    assert make(source="s3://elsewhere/pictures").hash == plan.hash
    assert make(units=toys.make_units(3)[::-1]).hash == plan.hash
    assert make(toys.ToyConfig(seed=1)).hash != plan.hash
    assert make(units=toys.make_units(2)).hash != plan.hash


@pytest.mark.parametrize("source", ["here", "caf\u00e9", "caf\udce9"])
def test_a_plan_survives_its_file(tmp_path: Path, source: str):
    output = open_storage(tmp_path / "out")
    plan = make(source=source)
    settle_plan(output, plan)
    assert read_plan(output) == plan
    assert read_plan(output).hash == plan.hash


def test_the_same_plan_may_come_again_from_another_place(tmp_path: Path):
    output = open_storage(tmp_path / "out")
    settle_plan(output, make())
    assert settle_plan(output, make(source="elsewhere")).hash == make().hash


def changed_units() -> list[Unit]:
    first, *rest = toys.make_units(3)
    return [first.model_copy(update={"bytes": 11, "sha256": "f" * 64}), *rest]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (make(toys.ToyConfig(seed=5)), ["seed: 0 -> 5"]),
        (make(toys.ToyConfig(patch_size=14)), ["patch_size: 7 -> 14"]),
        (make(units=toys.make_units(2)), ["input unit-2 is gone"]),
        (make(units=toys.make_units(4)), ["input unit-3 is new"]),
        (make(units=changed_units()), ["input unit-0 has changed", "10 bytes", "11 bytes", "sha256 ffffffffffff"]),
        (make().model_copy(update={"code_version": "99.0"}), [f"code_version: {air.__version__} -> 99.0"]),
        (make().model_copy(update={"schema_version": 99}), ["schema_version: 1 -> 99"]),
        (make().model_copy(update={"job": "other"}), ["job: toy -> other"]),
        (make(units=toys.make_units(30)), ["input unit-10 is new", "and 19 more"]),
    ],
)
def test_another_plan_is_refused_and_the_difference_is_named(tmp_path: Path, other: Plan, said: list[str]):
    output = open_storage(tmp_path / "out")
    settle_plan(output, make())
    with pytest.raises(PlanMismatchError) as caught:
        settle_plan(output, other)
    message = str(caught.value)
    assert str(tmp_path / "out") in message
    assert [part for part in said if part not in message] == []
    assert read_plan(output) == make()


def test_a_folder_with_other_files_is_refused(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").touch()
    with pytest.raises(StorageError, match=r"not empty and has no plan\.json \(it holds thesis\.doc\)"):
        settle_plan(open_storage(tmp_path / "out"), make())
    assert files_of(open_storage(tmp_path / "out")) == {"thesis.doc"}


def test_a_crash_between_listings_and_plan_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = open_storage(tmp_path / "out")
    listings = {"plan/unit-0.json": b"[1]", "plan/unit-1.json": b"[2]"}
    with monkeypatch.context() as patch:
        patch.setattr(type(output), "put_if_absent", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            settle_plan(output, make(), listings)
    assert files_of(output) == set(listings)
    settle_plan(output, make(), listings)
    assert files_of(output) == {"plan.json", *listings}
    assert read_plan(output) == make()


def test_a_plan_never_names_a_listing_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = open_storage(tmp_path / "out")
    put = type(output).put_if_absent

    def check_then_put(self: Storage, path: str, data: bytes) -> bool:
        assert self.exists("plan/unit-0.json")
        return put(self, path, data)

    monkeypatch.setattr(type(output), "put_if_absent", check_then_put)
    settle_plan(output, make(), {"plan/unit-0.json": b"[]"})


@pytest.mark.parametrize("differing", [False, True])
def test_drivers_that_start_at_once_settle_on_one_plan(tmp_path: Path, differing: bool):
    output = open_storage(tmp_path / "out")
    barrier = threading.Barrier(6)

    def start(number: int) -> str:
        plan = make(toys.ToyConfig(seed=number if differing else 0))
        barrier.wait()
        try:
            return settle_plan(output, plan, {f"plan/unit-{n}.json": b"[]" for n in range(3)}).hash
        except PlanMismatchError as error:
            assert "seed:" in str(error)  # noqa: PT017
            return ""

    with ThreadPoolExecutor(6) as pool:
        hashes = list(pool.map(start, range(6)))
    settled = read_plan(output).hash
    assert hashes.count(settled) == (1 if differing else 6)
    assert set(hashes) <= {settled, ""}


def test_a_folder_without_a_plan_is_no_output(tmp_path: Path):
    with pytest.raises(StorageError, match="is not the output of a job"):
        read_plan(open_storage(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"{}", b'{"job": "toy"}', b"\xff\xfe"])
def test_a_plan_or_manifest_that_cannot_be_understood_is_damaged(tmp_path: Path, content: bytes):
    output = open_storage(tmp_path)
    output.write("plan.json", content)
    output.write("manifest/unit-0.json", content)
    with pytest.raises(DamagedDataError, match=r"plan\.json is not a plan"):
        read_plan(output)
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


def test_names_of_output_files_are_safe():
    assert file_safe("a/b c.ü-1=2_3") == "a_b_c__-1=2_3"


def test_seeds_are_those_of_the_key_on_every_machine():
    # The first eight bytes, little-endian, of sha256(b"7\0cat\x000").
    assert seed_of(7, "cat", 0) == int.from_bytes(bytes.fromhex(SEED_BYTES), "little")
    assert len({seed_of(seed, key, view) for seed in range(3) for key in ("a", "b", "a0") for view in range(3)}) == 27
    assert seed_of(0, "caf\udce9", 0) != seed_of(0, "caf\udce8", 0)


SEED_BYTES = "8c6b873b860a5752"
