"""One unit of work: results and quarantine add up, and an image that kills or confounds its process is found."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import air
from pipeline.errors import DamagedDataError, StorageError
from pipeline.formats import tables
from pipeline.storage.base import Storage
from pipeline.work.manifest import Manifest, committed_units, named_files, read_manifests
from pipeline.work.plan import Unit
from pipeline.work.process import EncodedImage, Progress, execute
from tests.support import toys


def attempt(
    tmp_path: Path, orders: dict[str, str], samples: int = 4, make_job: type[toys.ToyJob] = toys.ToyJob, **options
) -> tuple[Storage, Manifest, str]:
    """One attempt at a unit of a fresh folder; the output, the manifest and the plan's hash."""
    output, notes = toys.open_output(tmp_path)
    plan = toys.make_plan(output, 1, samples)
    job = make_job(notes, orders)
    return output, execute(job, plan.units[0], plan.hash, output.uri(), **options), plan.hash


def test_results_and_rejections_add_up(tmp_path: Path):
    orders = {"unit-0/001": "reject", "unit-0/003": "vanish", "unit-0/004": "reject"}
    output, manifest, plan_hash = attempt(tmp_path, orders, samples=6)
    assert [row["key"] for row in toys.read_rows(output)] == ["unit-0/000", "unit-0/002", "unit-0/005"]
    refused = {"shard": "unit-0", "stage": "toy", "reason": "corrupt", "bytes": 10}
    assert toys.read_quarantine(output) == [
        {
            **refused,
            "key": "unit-0/001",
            "message": "toys/unit-0/001: the toy is ugly",
            "sha256": hashlib.sha256(b"unit-0/001").hexdigest(),
        },
        {
            "key": "unit-0/003",
            "shard": "unit-0",
            "stage": "toy",
            "reason": "missing",
            "message": "toys/unit-0/003: the toy is gone",
            "sha256": "",
            "bytes": 0,
        },
        {
            **refused,
            "key": "unit-0/004",
            "message": "toys/unit-0/004: the toy is ugly",
            "sha256": hashlib.sha256(b"unit-0/004").hexdigest(),
        },
    ]
    assert list(read_manifests(output)) == [manifest]
    assert manifest.unit == "unit-0"
    assert manifest.plan == plan_hash
    assert manifest.samples == 6
    assert manifest.rejected == {"missing": 1, "corrupt": 2}
    assert manifest.summary == {"length": 30.0, "rows": 3.0}
    assert [file.rows for file in named_files(manifest)] == [3, 3]


def test_seconds_are_those_of_the_work(tmp_path: Path):
    _, manifest, _ = attempt(tmp_path, {"unit-0/001": "sleep 0.3"})
    assert 0.3 <= manifest.seconds < 30


@dataclass(frozen=True)
class SlowJob(toys.ToyJob):
    """A job whose preparation, reading, processing and writing take 0.05, 0.1, 0.15 and 0.2 s."""

    def prepare(self, say: Callable[[str], None]) -> None:
        time.sleep(0.05)

    def _read(self, key: str) -> bytes:
        time.sleep(0.1)
        return super()._read(key)

    def process(self, image: EncodedImage) -> dict[str, Any]:
        time.sleep(0.15)
        return super().process(image)

    def writer(self, unit: Unit, scratch: Path, metadata: Mapping[str, str]) -> toys.ToyWriter:
        class SlowWriter(toys.ToyWriter):
            def finish(self) -> list[tuple[Path, int]]:
                time.sleep(0.2)
                return super().finish()

        return SlowWriter(scratch / "slow.parquet", metadata)


def test_seconds_by_part_say_what_took_long(tmp_path: Path):
    _, manifest, _ = attempt(tmp_path, {}, samples=1, make_job=SlowJob)
    parts = manifest.seconds_by_part
    assert list(parts) == ["prepare", "read", "process", "write"]
    assert sum(parts.values()) == pytest.approx(manifest.seconds, abs=0.005)
    for part, least in (("prepare", 0.05), ("read", 0.1), ("process", 0.15), ("write", 0.2)):
        assert parts[part] >= least


def test_files_are_vouched_for_and_stamped(tmp_path: Path):
    output, manifest, plan_hash = attempt(tmp_path, {"unit-0/001": "reject"})
    for file in named_files(manifest):
        assert manifest.attempt in file.path
        data = output.read(file.path)
        assert file.bytes == len(data)
        assert file.sha256 == hashlib.sha256(data).hexdigest()
        with output.open(file.path) as stream:
            stamps = pq.read_schema(stream).metadata
        assert stamps[b"air.plan"].decode() == plan_hash
        assert stamps[b"air.unit"] == b"unit-0"
        assert stamps[b"air.job"] == b"toy"
        assert stamps[b"air.code_version"].decode() == air.__version__
        assert stamps[b"air.schema_version"].decode() == str(tables.SCHEMA_VERSION)


def test_without_rejections_there_is_no_quarantine(tmp_path: Path):
    output, manifest, _ = attempt(tmp_path, {})
    assert manifest.quarantine is None
    assert list(output.list("quarantine")) == []


def test_a_unit_in_which_everything_is_bad_is_done_all_the_same(tmp_path: Path):
    output, manifest, _ = attempt(tmp_path, {f"unit-0/00{n}": "reject" for n in range(4)})
    assert manifest.rejected == {"corrupt": 4}
    assert toys.read_rows(output) == []
    assert len(toys.read_quarantine(output)) == 4


def test_progress_is_reported_from_the_start_and_after_every_sample(tmp_path: Path):
    seen: list[Progress] = []
    attempt(tmp_path, {"unit-0/001": "reject"}, samples=3, report=seen.append)
    assert seen[0] == Progress("unit-0")
    assert [(progress.samples, progress.rejected) for progress in seen[1:]] == [(1, 0), (2, 1), (3, 1)]
    assert [(progress.summary or {}).get("rows") for progress in seen[1:]] == [1, 1, 2]


@pytest.mark.parametrize(
    ("order", "error"), [("lose", StorageError), ("damage", DamagedDataError), ("raise", KeyError)]
)
def test_what_is_not_the_images_fault_commits_nothing(tmp_path: Path, order: str, error: type[Exception]):
    with pytest.raises(error):
        attempt(tmp_path, {"unit-0/002": order})
    output, _ = toys.open_output(tmp_path)
    assert committed_units(output) == set()
    assert [path for path, _ in output.list()] == ["plan.json"]


def test_isolation_finds_the_images_that_kill_or_confound_their_process(tmp_path: Path):
    orders = {"unit-0/001": "kill", "unit-0/002": "raise", "unit-0/003": "reject"}
    output, manifest, _ = attempt(tmp_path, orders, samples=5, isolate=True)
    assert [row["key"] for row in toys.read_rows(output)] == ["unit-0/000", "unit-0/004"]
    killed, failed, rejected = toys.read_quarantine(output)
    assert (killed["key"], killed["reason"]) == ("unit-0/001", "killed_worker")
    assert (failed["key"], failed["reason"]) == ("unit-0/002", "failed")
    assert "KeyError: 'nobody foresaw this'" in failed["message"]
    assert (rejected["key"], rejected["reason"], rejected["message"]) == (
        "unit-0/003",
        "corrupt",
        "toys/unit-0/003: the toy is ugly",
    )
    assert killed["sha256"] == hashlib.sha256(b"unit-0/001").hexdigest()
    assert manifest.rejected == {"failed": 1, "killed_worker": 1, "corrupt": 1}
    assert manifest.samples == 5


def test_isolation_changes_no_result(tmp_path: Path):
    orders = {"unit-0/001": "reject"}
    here, _, _ = attempt(tmp_path / "here", orders)
    apart, _, _ = attempt(tmp_path / "apart", orders, isolate=True)
    assert toys.read_rows(here) == toys.read_rows(apart)
    assert toys.read_quarantine(here) == toys.read_quarantine(apart)


def test_isolation_does_not_hide_a_storage_that_fails(tmp_path: Path):
    with pytest.raises(StorageError, match="the network is down"):
        attempt(tmp_path, {"unit-0/001": "lose"}, isolate=True)


def test_a_name_that_is_no_unicode_goes_to_quarantine_like_any_other(tmp_path: Path):
    """Linux names are bytes: Python shows those that are no UTF-8 as lone surrogates, which Parquet cannot hold."""
    output, notes = toys.open_output(tmp_path)
    plan = toys.make_plan(output, 1)

    class Latin(toys.ToyJob):
        def samples(self, unit, scratch):
            for sample in super().samples(unit, scratch):
                yield type(sample)(sample.key, "caf\udce9.png", sample.read)

    execute(Latin(notes, {"unit-0/001": "reject"}), plan.units[0], plan.hash, output.uri())
    (row,) = toys.read_quarantine(output)
    assert row["message"] == "caf\\udce9.png: the toy is ugly"


def test_a_job_gets_batches_and_everything_comes_out_as_one_by_one(tmp_path: Path):
    orders = {"unit-0/001": "reject", "unit-0/003": "vanish", "unit-0/004": "reject", "unit-0/010": "vanish"}
    seen: list[Progress] = []
    one_by_one, expected, _ = attempt(tmp_path / "one", orders, samples=11, report=seen.append)
    seen_in_batches: list[Progress] = []
    options = {"make_job": toys.BatchToyJob, "report": seen_in_batches.append}
    in_batches, manifest, _ = attempt(tmp_path / "many", orders, samples=11, **options)
    assert in_order(in_batches, "data") == in_order(one_by_one, "data")
    assert in_order(in_batches, "quarantine") == in_order(one_by_one, "quarantine")
    assert (manifest.samples, manifest.rejected, manifest.summary) == (
        expected.samples,
        expected.rejected,
        expected.summary,
    )
    assert seen_in_batches == seen
    # Of 4, 4 and 3 samples, 3, 4 and 2 could be read.
    assert toys.BatchToyJob(str(tmp_path / "many" / "notes")).count("batch") == {"3": 1, "4": 1, "2": 1}


def in_order(output: Storage, folder: str) -> list[dict]:
    """The rows of the folder's one file, as written."""
    ((path, _),) = output.list(folder)
    with output.open(path) as stream:
        return pq.read_table(stream).to_pylist()


def test_isolation_takes_images_one_by_one_whatever_the_batch(tmp_path: Path):
    orders = {"unit-0/001": "kill", "unit-0/002": "raise"}
    output, _, _ = attempt(tmp_path, orders, make_job=toys.BatchToyJob, isolate=True)
    assert [row["key"] for row in toys.read_rows(output)] == ["unit-0/000", "unit-0/003"]
    assert [row["reason"] for row in toys.read_quarantine(output)] == ["killed_worker", "failed"]
    assert not toys.BatchToyJob(str(tmp_path / "notes")).count("batch")
