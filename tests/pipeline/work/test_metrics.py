"""Metrics of a run: counters count this run's work, the dashboard queries what is defined, and Ray exports it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline.config import RunnerConfig
from pipeline.work import metrics
from pipeline.work.metrics import METRICS, PSNR, RUN_TAGS, Recorder
from pipeline.work.process import Progress
from pipeline.work.runner import run
from pipeline.work.tally import Tally
from tests.support import toys
from tests.support.paths import ROOT

DASHBOARD = json.loads((ROOT / "configs" / "cluster" / "grafana-dashboard.json").read_text(encoding="utf-8"))
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
QUERIES += [entry["query"]["query"] for entry in DASHBOARD["templating"]["list"] if entry["type"] == "query"]
EXPORTED = {name: metric for metric in METRICS for name in metric.exported}


class FakeMetric:
    """A metric that keeps what is recorded, by its tags."""

    values: ClassVar[dict[str, dict[tuple[str, ...], float]]] = defaultdict(lambda: defaultdict(float))

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...], boundaries: object = None) -> None:
        assert description
        self._name, self._keys = name, tag_keys

    def set_default_tags(self, tags: dict[str, str]) -> FakeMetric:
        self._default = tags
        return self

    def _place(self, tags: dict[str, str] | None) -> tuple[str, ...]:
        given = {**self._default, **(tags or {})}
        assert set(given) == set(self._keys), "Ray refuses a record without all tags"
        return tuple(given[key] for key in self._keys)

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert value > 0, "Ray refuses a counter that does not rise"
        self.values[self._name][self._place(tags)] += value

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values[self._name][self._place(tags)] = value

    def observe(self, value: float) -> None:
        self.values[self._name][self._place(None)] += 1


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[tuple[str, ...], float]]]:
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(f"ray.util.metrics.{kind}", FakeMetric)
    FakeMetric.values.clear()
    yield FakeMetric.values
    FakeMetric.values.clear()


def test_counters_count_the_work_of_this_run(recorded: dict[str, Any]) -> None:
    recorder = Recorder("distill", "s3://bucket/targets")
    tally = Tally(units_total=5, units_done=2, samples=20, bytes=1000)
    tally.rejected["corrupt"] = 3  # an earlier run's
    recorder.record(tally, [])
    run_tags = ("distill", "s3://bucket/targets")
    assert recorded["air_images"] == {}
    assert recorded["air_shards"] == {
        (*run_tags, "done"): 2,
        (*run_tags, "running"): 0,
        (*run_tags, "failed"): 0,
        (*run_tags, "pending"): 3,
    }
    tally.running["unit-2"] = Progress("unit-2", samples=4, summary={"psnr_sum": 120.0, "images": 4})
    recorder.record(tally, [])
    tally.running.clear()  # the attempt failed
    recorder.record(tally, [])
    tally.units_done, tally.samples, tally.bytes = 3, 30, 1500
    tally.rejected.update(corrupt=1, empty=2)
    tally.seconds_by_part.update(read=1.5)
    tally.units_failed = 1
    recorder.record(tally, [12.0])
    assert recorded["air_images"] == {run_tags: 14}
    assert recorded["air_written_bytes"] == {run_tags: 500}
    assert recorded["air_quarantined_images"] == {(*run_tags, "corrupt"): 1, (*run_tags, "empty"): 2}
    assert recorded["air_worker_seconds"] == {(*run_tags, "read"): 1.5}
    assert recorded["air_psnr_db"] == {run_tags: 30.0}
    assert recorded["air_shard_seconds"] == {run_tags: 1}
    assert recorded["air_shards"][(*run_tags, "failed")] == 1
    assert recorded["air_shards"][(*run_tags, "pending")] == 1


def test_the_dashboard_asks_for_every_metric_and_for_no_other() -> None:
    asked = set(re.findall(r"\bray_\w+", " ".join(QUERIES)))
    assert asked <= set(EXPORTED)
    assert {EXPORTED[name] for name in asked} == set(METRICS)


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_uses_the_tags_of_its_metric(query: str) -> None:
    tags = {"le", *RUN_TAGS, *(EXPORTED[name].tag for name in re.findall(r"\bray_\w+", query))}
    used = set(re.findall(r"(\w+)=~?\"", query)) | set(re.findall(r"^label_values\(.*, (\w+)\)$", query))
    for group in re.findall(r"by \(([^)]*)\)", query):
        used |= {name.strip() for name in group.split(",")}
    assert used
    assert used <= tags
    assert query.count("(") == query.count(")")


def test_the_panels_have_room_and_a_source() -> None:
    places = set()
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & places
        places |= cells


def test_the_page_for_operators_lists_every_metric() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(ray_air_\w+)` \| (\w+)", page, re.MULTILINE))
    assert rows == {metric.exported[0].removesuffix("_bucket"): metric.kind for metric in METRICS}


def test_a_run_without_ray_imports_none() -> None:
    code = "import sys, pipeline.work.runner, pipeline.work.metrics; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_ray_exports_the_metrics_while_a_job_runs(tmp_path: Path) -> None:
    import ray

    pytest.importorskip("prometheus_client", reason="Ray exports metrics only with ray[default]")
    output, notes = toys.open_output(tmp_path)
    plan = toys.make_plan(output, 3)
    job = toys.ToyJob(notes, {"unit-0/001": "reject", "unit-1/000": "sleep 0.1", "unit-2/001": "sleep 30"})
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = set(EXPORTED) - set(PSNR.exported)  # the toys measure none
    ours = f'output="{output.uri()}"'
    seen: dict[str, list[str]] = {}

    def watch() -> None:
        end = time.monotonic() + 60
        while not wanted <= set(seen) and time.monotonic() < end:
            with urllib.request.urlopen(url, timeout=30) as answer:
                for line in answer.read().decode().splitlines():
                    if ours in line:
                        seen.setdefault(line.partition("{")[0], []).append(line)
            time.sleep(0.5)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run(job, plan, output, RunnerConfig())
    watcher.join()
    assert set(seen) == wanted
    assert all('air_job="toy"' in line for lines in seen.values() for line in lines)
    assert any('reason="corrupt"' in line for line in seen["ray_air_quarantined_images_total"])
    assert {part for line in seen["ray_air_worker_seconds_total"] for part in re.findall(r'part="(\w+)"', line)} == {
        "prepare",
        "read",
        "process",
        "write",
    }
    assert metrics.DURATION_BOUNDS[0] in {
        float(bound) for line in seen["ray_air_shard_seconds_bucket"] for bound in re.findall(r'le="([\d.]+)"', line)
    }
