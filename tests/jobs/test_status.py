"""`air status --json`: its keys are those that docs/operations.md lists, and its numbers those of the commits."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from jobs.status import JobStatus, LeaseStatus, Rates, TrainingStatus, status_of_job
from pipeline.config import Config
from pipeline.storage.base import Storage
from pipeline.training.audit import Standing
from pipeline.work.lease import hold
from pipeline.work.manifest import Manifest, commit
from pipeline.work.plan import Plan, Unit, settle_plan
from tests.support import toys
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("## Watching a job")[2]


def documented(column: str) -> set[str]:
    """The keys in the table with that head."""
    table = PAGE.partition(f"| key | {column} |\n")[2].partition("\n\n")[0]
    return set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines()[1:])))


@pytest.mark.parametrize(("model", "column"), [(JobStatus, "of a bulk job"), (TrainingStatus, "of a training run")])
def test_every_key_is_documented_and_every_documented_key_exists(model: type[Config], column: str) -> None:
    assert documented(column) == set(model.model_fields)


@pytest.mark.parametrize(("key", "model"), [("rates", Rates), ("lease", LeaseStatus)])
def test_the_keys_below_a_key_are_documented(key: str, model: type[Config]) -> None:
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| `{key}` |"))
    assert set(re.findall(r"`(\w+)`", line)) - {key} == set(model.model_fields)


def open_plan(folder: Path, samples: list[int | None], sizes: list[int]) -> tuple[Storage, Plan]:
    output, _ = toys.open_output(folder)
    units = [
        Unit(name=f"unit-{n}", input=f"{n}.tar", bytes=size, sha256=f"{n:064x}", samples=count)
        for n, (count, size) in enumerate(zip(samples, sizes, strict=True))
    ]
    return output, settle_plan(output, Plan.make("toy", toys.ToyConfig(), units, ["toys"]))


def commit_unit(output: Storage, plan: Plan, unit: int, **values: Any) -> None:
    usual: dict[str, Any] = {"samples": 0, "rejected": {}, "seconds": 0.0, "summary": {}}
    manifest = {"unit": f"unit-{unit}", "attempt": "a", "plan": plan.hash, "files": (), "quarantine": None}
    commit(output, Manifest.model_validate({**usual, **manifest, **values}))


def test_the_numbers_are_the_sums_of_the_commits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, plan = open_plan(tmp_path, [10, 20, 70], [1, 1, 1])
    file = {"path": "data/unit-0-a.parquet", "bytes": 500, "sha256": "", "rows": 9}
    summary = {"images": 9.0, "psnr_sum": 270.0, "pixels": 3e6}
    commit_unit(output, plan, 0, samples=10, rejected={"empty": 1}, seconds=4.0, summary=summary, files=(file,))
    commit_unit(output, plan, 1, samples=20, seconds=8.0, seconds_by_part={"read": 1.0, "process": 7.0})
    assert main(["status", output.uri(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "output": output.uri(),
        "job": "toy",
        "plan": plan.hash,
        "input": ["toys"],
        "lease": None,
        "finished": False,
        "units": {"total": 3, "done": 2},
        "to_do": ["unit-2"],
        "samples": 30,
        "rejected": {"empty": 1},
        "rows": 9,
        "bytes": 500,
        "summary": summary,
        "psnr": 30.0,
        "seconds": 12.0,
        "seconds_by_part": {"read": 1.0, "process": 7.0},
        "rates": {"seconds_per_image": 0.4, "seconds_per_megapixel": 4.0, "seconds_left": 28.0},
    }
    assert main(["status", output.uri()]) == 0
    said = capsys.readouterr().out
    assert "cost in worker time: 0.4 s per image, 4 s per megapixel, about 28 s to the end\n" in said


def test_the_holder_of_the_lease_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, _ = open_plan(tmp_path, [10], [1])
    with hold(output, "distill") as lease:
        assert main(["status", output.uri(), "--json"]) == 0
        holder = json.loads(capsys.readouterr().out)["lease"]
        assert (holder["purpose"], holder["pid"], holder["number"]) == ("distill", os.getpid(), lease.number)
        assert 0 <= holder["silence_seconds"] < 30
    assert main(["status", output.uri(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lease"] is None


def test_without_counts_of_images_the_rest_is_estimated_by_bytes(tmp_path: Path) -> None:
    output, plan = open_plan(tmp_path, [10, None], [100, 300])
    commit_unit(output, plan, 0, samples=10, seconds=5.0)
    rates = status_of_job(output, plan, None).rates
    assert (rates.seconds_per_megapixel, rates.seconds_left) == (None, 15.0)


def test_nothing_is_known_before_the_first_commit_and_nothing_left_after_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plan = open_plan(tmp_path, [10], [100])
    unknown = Rates(seconds_per_image=None, seconds_per_megapixel=None, seconds_left=None)
    assert status_of_job(output, plan, None).rates == unknown
    assert main(["status", output.uri()]) == 0
    assert "cost" not in capsys.readouterr().out
    commit_unit(output, plan, 0, samples=10, seconds=5.0)
    status = status_of_job(output, plan, None)
    assert (status.finished, status.rates.seconds_left) == (True, 0.0)
    assert main(["status", output.uri()]) == 0
    assert "cost in worker time: 0.5 s per image\n" in capsys.readouterr().out


def test_a_manifest_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """It has no seconds by part."""
    output, plan = open_plan(tmp_path, [10], [100])
    commit_unit(output, plan, 0, samples=10, seconds=5.0)
    values = json.loads(output.read("manifest/unit-0.json"))
    del values["seconds_by_part"]
    output.write("manifest/unit-0.json", json.dumps(values).encode())
    assert status_of_job(output, plan, None).seconds_by_part == {}


def test_a_training_run_has_its_own_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = toys.open_output(tmp_path)
    plan = settle_plan(output, Plan.make("train", toys.ToyConfig(), [], ["targets"]))
    run = Standing(
        step=40,
        steps=100,
        told=45,
        seconds=8.5,
        samples=640,
        skipped=3,
        validations=[(20, 21.5), (40, 22.5)],
        finished=False,
    )
    monkeypatch.setattr("pipeline.training.audit.standing", lambda output: run)
    assert main(["status", output.uri(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "output": output.uri(),
        "job": "train",
        "plan": plan.hash,
        "input": ["targets"],
        "lease": None,
        "finished": False,
        "step": 40,
        "steps": 100,
        "step_by_metrics": 45,
        "samples": 640,
        "skipped": 3,
        "seconds": 8.5,
        "round": None,
        "validations": [{"step": 20, "psnr": 21.5}, {"step": 40, "psnr": 22.5}],
    }
    assert main(["status", output.uri()]) == 0
    said = capsys.readouterr().out
    assert "22.50 dB in step 40" in said
    assert "not finished" in said
