"""`--log-format json`: all that a command says on stderr is a line of JSON for each event. Results stay on stdout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import COMMANDS, main
from pipeline import logs
from pipeline.logs import LogSettings
from pipeline.storage.open import open_storage
from pipeline.work.manifest import committed_units
from tests.support.tar_files import write_tar

JSON = ("--log-format", "json")
INLINE = ("--executor", "inline")

Say = Callable[..., tuple[int, str, list[dict[str, Any]]]]


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Say:
    """Runs a command line in this process; returns the exit status, stdout, and the events on stderr."""

    def run(*arguments: object) -> tuple[int, str, list[dict[str, Any]]]:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return status, out, [json.loads(line) for line in err.splitlines()]

    yield run  # type: ignore[misc]
    logs.configure(LogSettings())  # other tests log as text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_option(command: str, say: Say) -> None:
    status, out, events = say(command, "--help")
    assert (status, events) == (0, [])
    assert "--log-format {text,json}" in out


def test_the_events_of_a_job(say: Say, pictures: Path, tmp_path: Path) -> None:
    (pictures / "bad.png").write_bytes(b"")
    status, out, events = say("shard", pictures, tmp_path / "out", "--max-count", 4, *INLINE, *JSON)
    assert status == 0
    assert out.startswith("6 images")
    units = sorted(committed_units(open_storage(tmp_path / "out")))
    begun = [event["unit"] for event in events if event["message"].endswith("attempt 1 begins")]
    committed = [event["unit"] for event in events if "committed" in event["message"]]
    assert (sorted(begun), sorted(committed)) == (units, units)
    (refused,) = [event for event in events if "quarantined" in event["message"]]
    assert (refused["job"], refused["attempt"], refused["unit"] in units) == ("shard", 1, True)
    assert {event["job"] for event in events} == {"shard"}
    assert {event["level"] for event in events} == {"INFO"}


def test_an_error_and_wrong_usage_are_one_event_each(say: Say, tmp_path: Path) -> None:
    for arguments, expected, words in (
        (("status", tmp_path), 1, "is not the output of a job"),
        (("shard", tmp_path / "nowhere", tmp_path / "out", *INLINE), 2, "does not exist, or is empty"),
        (("shard", "in", "out", "--max-cuont", 3), 2, "did you mean '--max-count'?"),
        (("distill",), 2, "required: SHARDS, OUT"),
        (("verify", tmp_path, "--log-format=json", "--repair", "--config"), 2, "unrecognized arguments"),
    ):
        status, out, events = say(*arguments, *JSON)
        assert (status, out) == (expected, "")
        (event,) = events
        assert event["level"] == "ERROR"
        assert words in event["message"]
        assert event["job"] == arguments[0]


def test_what_verify_finds_is_an_event_each(say: Say, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert say("shard", pictures, out, "--max-count", 2, *INLINE, *JSON)[0] == 0
    next((out / "data").iterdir()).unlink()
    (out / "manifest" / "shard-00002.json").write_text("{")
    status, _, events = say("verify", out, *JSON)
    assert status == 1
    assert [event["level"] for event in events] == ["ERROR"] * len(events)
    assert "problems" in events[-1]["message"]


def test_a_format_that_is_none_is_wrong_usage(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "out", "--log-format", "xml"]) == 2
    assert "invalid choice: 'xml'" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_workers_that_train_log_in_json_too(say: Say, photographs: Path, tmp_path: Path) -> None:
    from ray._private.worker import global_worker

    pytest.importorskip("pandas", reason="ray.train needs pandas")
    pictures = {f"{file.stem}{file.suffix}": file.read_bytes() for file in sorted(photographs.iterdir())}
    write_tar(tmp_path / "shards" / "0.tar", {**pictures, "ugly.png": b"not a picture"})
    sizes = ("--batch", 5, "--min-crop", 32, "--max-crop", 40, "--patch-size", 8, "--stages", 1, "--threads", 1)
    steps = ("--steps", 2, "--warmup-steps", 1, "--settings", '{"channels": 16, "depth": 1}', "--valid-images", 2)
    status, _, events = say(
        "train", tmp_path / "shards", tmp_path / "run", "--valid", photographs, *sizes, *steps, "--workers", 1, *JSON
    )
    assert status == 0, events
    lines = [
        line
        for file in Path(global_worker.node.get_logs_dir_path()).glob("worker-*.err")
        for line in file.read_text().splitlines()
        if "passed over" in line
    ]
    told = [json.loads(line) for line in lines]
    assert any("ugly" in event["message"] and event["job"] == "train" for event in told)


@pytest.mark.slow
def test_workers_that_roll_out_log_in_json_too(say: Say, photographs: Path, tmp_path: Path) -> None:
    """Each looks for the pictures itself, and finds a table that is none."""
    pictures = tmp_path / "pictures"
    shutil.copytree(photographs, pictures)
    (pictures / "x.parquet").write_bytes(b"no table")
    sizes = ("--crop", 32, "--max-steps", 8, "--roll-outs", 2, "--workers", 2, "--steps", 1)
    valid = ("--valid", photographs, "--valid-images", 1, "--valid-side", 32, "--valid-steps", 2)
    status, _, events = say("train", pictures, tmp_path / "run", "--phase", "rule", *sizes, *valid, *JSON)
    assert status == 0
    assert len({event["pid"] for event in events if "x.parquet" in event["message"]}) >= 2
