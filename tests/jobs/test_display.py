"""The progress of a running job: whole lines in a log."""

import pytest

from jobs.display import LogDisplay
from pipeline.work.process import Progress
from pipeline.work.tally import Tally


@pytest.mark.parametrize(
    ("running", "expected"),
    [
        ({}, "distill: shards 0/2, images 0/9"),
        ({"a": Progress("a", 4, 1)}, "distill: shards 0/2, images 4/9, 0.1 images/s, 1 quarantined"),
    ],
)
def test_a_line_of_the_log_ends_with_its_last_part(
    monkeypatch: pytest.MonkeyPatch, running: dict[str, Progress], expected: str
) -> None:
    now = 0.0
    monkeypatch.setattr("jobs.display.time.monotonic", lambda: now)
    lines: list[str] = []
    display = LogDisplay(lines.append, "distill")
    tally = Tally(units_total=2, samples_total=9, running=running)
    now = 61.0
    display.update(tally)
    assert lines == [expected]
