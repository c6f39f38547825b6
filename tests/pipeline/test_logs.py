"""Records become lines on stderr: of text for people, of JSON with what they are about, in workers and children too."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline import logs
from pipeline.config import RunnerConfig
from pipeline.logs import LogSettings
from pipeline.work.runner import run
from tests.support import toys

logger = logging.getLogger("pipeline.somewhere")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Other tests log as they did before."""
    before, level = logs.present(), logging.getLogger().level
    yield
    logs.configure(before)
    logging.getLogger().setLevel(level)


def events_of(text: str) -> list[dict[str, Any]]:
    """The events, every line of the text being one."""
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_of_json_says_when_where_and_what(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings("json", fields={"job": "distill"}))
    with logs.about(unit="shard-00001", attempt=2):
        logger.warning("first line\nsecond %s: \u00e9 \udcff", "line")
    logger.info("elsewhere", extra={"unit": "shard-00002"})
    first, second = events_of(capsys.readouterr().err)
    when = datetime.fromisoformat(first.pop("time"))
    assert when.tzinfo == UTC
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=1)
    assert first.pop("pid") > 0
    assert first == {
        "level": "WARNING",
        "message": "first line\nsecond line: \u00e9 \udcff",
        "job": "distill",
        "unit": "shard-00001",
        "attempt": 2,
        "node": platform.node(),
        "logger": "pipeline.somewhere",
    }
    assert (second["job"], second["unit"], "attempt" in second) == ("distill", "shard-00002", False)


def test_text_is_the_message_alone(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings())
    with logs.about(unit="shard-00001"):
        logger.warning("it rains")
    logger.info("the sun shines")
    assert capsys.readouterr().err == "it rains\n"


@pytest.mark.parametrize(
    ("settings", "levels"),
    [
        (LogSettings("text"), ["WARNING", "ERROR"]),
        (LogSettings("text", "INFO"), ["INFO", "INFO", "WARNING", "ERROR"]),
        (LogSettings("json"), ["INFO", "WARNING", "ERROR"]),
        (LogSettings("json", "ERROR"), ["ERROR"]),
        (LogSettings("json", "DEBUG"), ["DEBUG", "INFO", "INFO", "WARNING", "ERROR"]),
    ],
)
def test_levels(settings: LogSettings, levels: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """By default, JSON has what this project says at level INFO, and of other packages the warnings."""
    logs.configure(settings)
    logger.debug("DEBUG")
    logger.info("INFO")
    logging.getLogger("another.package").info("INFO")
    logger.warning("WARNING")
    logger.error("ERROR")
    err = capsys.readouterr().err
    said = [event["message"] for event in events_of(err)] if settings.format == "json" else err.splitlines()
    assert said == levels


def test_tracebacks_and_warnings_are_events_too(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings("json"))
    try:
        raise KeyError("lost")
    except KeyError:
        logger.exception("it broke")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logs.configure(LogSettings("json"))
        warnings.warn("old", stacklevel=1)
    broke, old = events_of(capsys.readouterr().err)
    assert broke["message"] == "it broke"
    assert "KeyError: 'lost'" in broke["exception"]
    assert "old" in old["message"]


def test_an_error_that_nobody_catches_is_one_event() -> None:
    code = "from pipeline import logs; logs.configure(logs.LogSettings('json')); 1 / 0"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    (event,) = events_of(ended.stderr)
    assert (ended.returncode, event["level"]) == (1, "CRITICAL")
    assert event["message"] == "ZeroDivisionError: division by zero"
    assert "Traceback" in event["exception"]


def test_to_configure_twice_is_to_log_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings("json"))
    logging.getLogger().addHandler(logging.StreamHandler())  # as a library may do
    logs.configure(LogSettings("json"))
    logger.warning("once")
    assert len(events_of(capsys.readouterr().err)) == 1


@pytest.mark.usefixtures("local_ray")
def test_workers_on_ray_log_as_their_driver_does(tmp_path: Path) -> None:
    """Into the files that Ray keeps for the standard error of each process."""
    from ray._private.worker import global_worker

    output, notes = toys.open_output(tmp_path)
    plan = toys.make_plan(output, 2, samples=2)
    logs.configure(LogSettings("json", "INFO", {"job": "toy"}))
    run(toys.ToyJob(notes, {"unit-1/000": "lose once", "unit-1/001": "reject"}), plan, output, RunnerConfig())
    files = Path(global_worker.node.get_logs_dir_path()).glob("worker-*.err")
    lines = [line for file in files for line in file.read_text().splitlines() if '"job": "toy"' in line]
    events = [event for event in map(json.loads, lines) if event["logger"].startswith("pipeline.work")]
    told = [(event["unit"], event["attempt"], event["message"]) for event in events]
    assert ("unit-1", 1, "unit-1: attempt 1 begins") in told
    assert ("unit-1", 2, "unit-1: attempt 2 begins") in told
    assert ("unit-1", 2, "unit-1/001 is quarantined: the toy is ugly (corrupt)") in told
    assert {event["job"] for event in events} == {"toy"}


def test_what_a_process_is_about_holds_in_its_threads_too(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings("json", fields={"job": "train"}))
    with logs.about(unit="shard-00001"), ThreadPoolExecutor(1) as pool:
        assert logs.present().fields == {"job": "train", "unit": "shard-00001"}
        pool.submit(logger.warning, "from a thread").result()
    (event,) = events_of(capsys.readouterr().err)
    assert event["job"] == "train"
