"""The audit: every way in which an output can be wrong is one line that names it, and garbage is what nothing names."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.bulk.shard import ShardConfig, ShardJob, plan_shards
from pipeline.config import RunnerConfig
from pipeline.errors import DamagedDataError, StorageError
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.work.audit import remove_garbage, repair, verify
from pipeline.work.manifest import committed_units, read_manifests
from pipeline.work.plan import settle_plan
from pipeline.work.runner import run
from tests.support import toys


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    """Three committed units of three samples; one in quarantine."""
    output, notes = toys.open_output(tmp_path)
    plan = toys.make_plan(output, 3)
    run(toys.ToyJob(notes, {"unit-1/001": "reject"}), plan, output, RunnerConfig(executor="inline"))
    return output


def data_of(output: Storage, unit: str) -> str:
    return next(path for path, _ in output.list("data") if path.startswith(f"data/{unit}-"))


def change_manifest(output: Storage, unit: str, change: Callable[[dict], None]) -> None:
    path = f"manifest/{unit}.json"
    manifest = json.loads(output.read(path))
    change(manifest)
    output.write(path, json.dumps(manifest).encode())


def flip(output: Storage, path: str) -> None:
    data = bytearray(output.read(path))
    data[len(data) // 2] ^= 1
    output.write(path, bytes(data))


def test_an_intact_output_yields_nothing(output: Storage):
    assert list(verify(output)) == []


def test_garbage_of_a_finished_job_is_named_and_swept(output: Storage):
    """A reader of `data/*.parquet` would meet it."""
    output.write("data/unit-0-killed.parquet", b"garbage")
    (problem,) = verify(output)
    assert "no manifest names data/unit-0-killed.parquet" in problem
    assert remove_garbage(output) == (1, 7)
    assert list(verify(output)) == []


def test_repair_takes_back_exactly_the_broken_commits(output: Storage):
    flip(output, data_of(output, "unit-0"))
    output.write("manifest/unit-1.json", b"[]")
    assert repair(output) == ["manifest/unit-0.json", "manifest/unit-1.json"]
    assert committed_units(output) == {"unit-2"}
    assert repair(output) == []


def test_a_flipped_byte(output: Storage):
    path = data_of(output, "unit-0")
    flip(output, path)
    (problem,) = verify(output)
    assert problem.startswith(f"manifest/unit-0.json: {path} is damaged: ")


def test_a_flipped_byte_in_quarantine(output: Storage):
    ((path, _),) = output.list("quarantine")
    flip(output, path)
    (problem,) = verify(output)
    assert problem.startswith(f"manifest/unit-1.json: {path} is damaged: ")


def test_a_file_cut_short(output: Storage):
    path = data_of(output, "unit-2")
    size = output.size(path)
    output.write(path, output.read(path)[:-1])
    (problem,) = verify(output)
    assert f"{path} is damaged: {size - 1} bytes" in problem
    assert f"expected {size}" in problem


def test_a_missing_file(output: Storage):
    path = data_of(output, "unit-0")
    output.delete(path)
    assert list(verify(output)) == [f"manifest/unit-0.json: {path} is missing"]


def test_a_wrong_row_count(output: Storage):
    change_manifest(output, "unit-0", lambda manifest: manifest["files"][0].update(rows=4))
    path = data_of(output, "unit-0")
    assert list(verify(output)) == [f"manifest/unit-0.json: {path} holds 3 rows, expected 4"]


def test_a_wrong_count_of_rejections(output: Storage):
    change_manifest(output, "unit-1", lambda manifest: manifest["rejected"].update(corrupt=2))
    assert list(verify(output)) == ["manifest/unit-1.json: 2 rejections counted, 1 in quarantine"]


def test_a_unit_that_is_not_done(output: Storage):
    output.delete("manifest/unit-2.json")
    assert list(verify(output)) == ["unit unit-2 is not done"]


def test_a_manifest_of_another_plan(output: Storage):
    change_manifest(output, "unit-0", lambda manifest: manifest.update(plan="f" * 64))
    (problem,) = verify(output)
    assert problem.startswith("manifest/unit-0.json: committed under another plan (ffffffffffff, expected ")


def test_a_manifest_of_a_unit_that_nobody_planned(output: Storage):
    output.write("manifest/unit-9.json", output.read("manifest/unit-0.json").replace(b'"unit-0"', b'"unit-9"'))
    assert list(verify(output)) == ["manifest/unit-9.json: unit unit-9 is not in the plan"]


@pytest.mark.parametrize("name", ["alias", "unit-2"])
def test_a_manifest_under_the_name_of_another_unit(output: Storage, name: str):
    output.write(f"manifest/{name}.json", output.read("manifest/unit-0.json"))
    problems = list(verify(output))
    assert f"manifest/{name}.json: the manifest is of unit-0" in problems
    # What is hidden under the wrong name is not done; what the right manifest says still holds.
    assert set(problems[1:]) == ({"unit unit-2 is not done"} if name == "unit-2" else set())


@pytest.mark.parametrize("content", [b"", b'{"unit": "unit-0", ', b"[]", b"null", b'{"unit": "unit-0"}', b"\xff"])
def test_a_manifest_that_cannot_be_understood(output: Storage, content: bytes):
    output.write("manifest/unit-0.json", content)
    problem, undone = verify(output)
    assert problem.startswith(f"{output.uri('manifest/unit-0.json')} is not a manifest: ")
    assert undone == "unit unit-0 is not done"


def test_every_fault_has_its_line(output: Storage):
    flip(output, data_of(output, "unit-0"))
    output.delete(data_of(output, "unit-1"))
    output.delete("manifest/unit-2.json")
    assert len(list(verify(output))) == 3


def test_a_plan_that_is_broken_or_missing_is_an_error(output: Storage):
    output.write("plan.json", b"{")
    with pytest.raises(DamagedDataError, match=r"plan\.json is not a plan"):
        list(verify(output))
    output.delete("plan.json")
    with pytest.raises(StorageError, match="is not the output of a job"):
        list(verify(output))


def test_garbage_is_removed_and_nothing_else(output: Storage):
    kept = [entry for entry in output.list() if not entry.path.startswith(("data/", "quarantine/"))]
    rows, quarantine = toys.read_rows(output), toys.read_quarantine(output)
    output.write("data/unit-0-aaaa.parquet", b"12345")
    output.write("quarantine/unit-0-aaaa.parquet", b"123")
    assert remove_garbage(output) == (2, 8)
    assert toys.read_rows(output) == rows
    assert toys.read_quarantine(output) == quarantine
    assert [entry for entry in output.list() if not entry.path.startswith(("data/", "quarantine/"))] == kept


def test_with_a_manifest_that_cannot_be_read_nothing_is_garbage(output: Storage):
    """Its files may be good."""
    before = list(output.list())
    broken = output.size("manifest/unit-0.json")
    output.write("manifest/unit-0.json", b" " * broken)
    with pytest.raises(DamagedDataError):
        remove_garbage(output)
    assert list(output.list()) == before


def test_tars_are_recounted_as_well(pictures: Path, tmp_path: Path):
    output, config = open_storage(tmp_path / "shards"), ShardConfig(max_count=4)
    plan, listings = plan_shards(config, [str(pictures)])
    plan = settle_plan(output, plan, listings)
    run(ShardJob(config, [str(pictures)], output), plan, output, RunnerConfig(executor="inline"))
    assert committed_units(output) == {"shard-00000", "shard-00001"}
    assert list(verify(output)) == []
    change_manifest(output, "shard-00001", lambda manifest: manifest["files"][0].update(rows=1))
    (problem,) = verify(output)
    assert problem.endswith(".tar holds 2 rows, expected 1")
    flip(output, next(read_manifests(output)).files[0].path)
    assert len(list(verify(output))) == 2


def test_a_listing_that_changed_is_a_fault(pictures: Path, tmp_path: Path):
    """The plan vouches for what was to be done; without it, nobody can say which images are missing."""
    output, config = open_storage(tmp_path / "shards"), ShardConfig(max_count=4)
    plan, listings = plan_shards(config, [str(pictures)])
    plan = settle_plan(output, plan, listings)
    run(ShardJob(config, [str(pictures)], output), plan, output, RunnerConfig(executor="inline"))
    first, second = (unit.input for unit in plan.units)
    flip(output, first)
    output.delete(second)
    assert list(verify(output)) == [f"{first} is not the listing that the plan names", f"{second} is missing"]
