"""Plans: one per folder, the same from any place, and a folder of another plan is refused with the differences."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import air
from pipeline.errors import DamagedDataError, PlanMismatchError, StorageError
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.work.plan import Plan, Unit, read_plan, settle_plan
from tests.support import toys


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
def test_a_plan_that_cannot_be_understood_is_damaged(tmp_path: Path, content: bytes):
    output = open_storage(tmp_path)
    output.write("plan.json", content)
    with pytest.raises(DamagedDataError, match=r"plan\.json is not a plan"):
        read_plan(output)
