"""Metrics of a bulk job for Prometheus, which scrapes them from Ray's nodes. docs/operations.md lists them.

Each metric is defined here alone; `configs/cluster/grafana-dashboard.json` queries them. They are recorded in a process
of Ray, so that they also appear where the driver is only a client of the cluster. A run without Ray has none, and must
not import Ray through this module. This module must not know the runner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.work.tally import Tally, mean_psnr

_PREFIX = "ray_"  # Ray puts it before the names of all metrics
_ENDINGS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
RUN_TAGS = ("air_job", "output")
"""Tags of every metric. Not `job`, which Prometheus has for its own purpose."""


@dataclass(frozen=True)
class Metric:
    """The definition of a metric.

    Attributes:
        name: As the code gives it to Ray.
        kind: As in Prometheus.
        description: With the unit.
        tag: The tag beside `RUN_TAGS`; empty for none.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tag: str = ""

    @property
    def exported(self) -> tuple[str, ...]:
        """The names that Prometheus sees."""
        return tuple(f"{_PREFIX}{self.name}{ending}" for ending in _ENDINGS[self.kind])


IMAGES = Metric("air_images", "counter", "images done, committed or not, those in quarantine included")
QUARANTINED = Metric("air_quarantined_images", "counter", "committed images in quarantine", "reason")
BYTES = Metric("air_written_bytes", "counter", "bytes of committed data files")
SECONDS = Metric("air_worker_seconds", "counter", "seconds of workers on committed shards", "part")
SHARDS = Metric("air_shards", "gauge", "shards of the plan: done, running, pending or failed", "state")
PSNR = Metric("air_psnr_db", "gauge", "mean PSNR of the results so far, in dB, if the job measures it")
DURATION = Metric("air_shard_seconds", "histogram", "seconds of the attempt that committed a shard")

METRICS = (IMAGES, QUARANTINED, BYTES, SECONDS, SHARDS, PSNR, DURATION)

DURATION_BOUNDS = (1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0, 14400.0)
"""Upper bounds of the histogram's buckets, in seconds."""


class Recorder:
    """Records the progress of one run. Must be made in a process of Ray.

    Args:
        job: Name of the job.
        output: URI of the output folder, which tells runs of the same job apart.
    """

    def __init__(self, job: str, output: str) -> None:
        from ray.util import metrics

        kinds: dict[str, Any] = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}
        self._metrics: dict[Metric, Any] = {}
        for metric in METRICS:
            options = {"boundaries": list(DURATION_BOUNDS)} if metric.kind == "histogram" else {}
            tags = (*RUN_TAGS, metric.tag) if metric.tag else RUN_TAGS
            made = kinds[metric.kind](metric.name, metric.description, tag_keys=tags, **options)
            self._metrics[metric] = made.set_default_tags(dict(zip(RUN_TAGS, (job, output), strict=True)))
        self._before: dict[tuple[Metric, str], float] | None = None

    def record(self, tally: Tally, durations: Sequence[float]) -> None:
        """Records the state of the run.

        Args:
            tally: The state. Counters count from the first one on: earlier runs' work is not this run's.
            durations: Seconds of each unit that was committed since the last call.
        """
        totals = dict(_totals(tally))
        for (metric, tag), total in totals.items() if self._before is not None else ():
            # After a failed attempt, its images are lost from the tally, and counted again when they are done again.
            if (increase := total - (self._before or {}).get((metric, tag), 0.0)) > 0:
                self._metrics[metric].inc(increase, {metric.tag: tag} if metric.tag else None)
        self._before = totals
        for state, count in _states(tally).items():
            self._metrics[SHARDS].set(count, {SHARDS.tag: state})
        if (psnr := mean_psnr(tally.summary_so_far)) is not None:
            self._metrics[PSNR].set(psnr)
        for seconds in durations:
            self._metrics[DURATION].observe(seconds)


def _totals(tally: Tally) -> Iterator[tuple[tuple[Metric, str], float]]:
    yield (IMAGES, ""), tally.samples_so_far
    yield (BYTES, ""), tally.bytes
    for reason, count in tally.rejected.items():
        yield (QUARANTINED, reason), count
    for part, seconds in tally.seconds_by_part.items():
        yield (SECONDS, part), seconds


def _states(tally: Tally) -> dict[str, int]:
    running = len(tally.running)
    return {
        "done": tally.units_done,
        "running": running,
        "failed": tally.units_failed,
        "pending": tally.units_total - tally.units_done - tally.units_failed - running,
    }
