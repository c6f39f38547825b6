"""The progress of a run in numbers, for displays and metrics. This module must not know who reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.work.manifest import Manifest
from pipeline.work.process import Progress


@dataclass
class Tally:
    """The progress of a run.

    Attributes:
        units_total: Units in the plan.
        units_done: Committed units.
        units_failed: Units that failed in their last attempt.
        samples_total: Samples in the plan; None if the plan does not count them.
        samples_before: Samples that earlier runs committed.
        samples: Committed samples.
        rejected: Committed rejections by reason.
        summary: Sums over the summaries of committed units.
        seconds: Seconds that the attempts at committed units took together.
        seconds_by_part: The same, by the part of an attempt.
        bytes: Size of the committed data files.
        running: Latest progress of each unit at work.
    """

    units_total: int
    units_done: int = 0
    units_failed: int = 0
    samples_total: int | None = None
    samples_before: int = 0
    samples: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    summary: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    seconds_by_part: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    running: dict[str, Progress] = field(default_factory=dict)

    def add(self, manifest: Manifest) -> None:
        """Adds a committed unit."""
        self.running.pop(manifest.unit, None)
        self.units_done += 1
        self.samples += manifest.samples
        self.rejected.update(manifest.rejected)
        self.summary.update(manifest.summary)
        self.seconds += manifest.seconds
        self.seconds_by_part.update(manifest.seconds_by_part)
        self.bytes += sum(file.bytes for file in manifest.files)

    @property
    def samples_so_far(self) -> int:
        """Committed samples and those of running attempts."""
        return self.samples + sum(progress.samples for progress in self.running.values())

    @property
    def rejected_so_far(self) -> int:
        """Samples in quarantine, committed and of running attempts."""
        return self.rejected.total() + sum(progress.rejected for progress in self.running.values())

    def summary_so_far(self, key: str) -> float:
        """One sum of the job's summary, over committed units and running attempts."""
        return self.summary[key] + sum((progress.summary or {}).get(key, 0.0) for progress in self.running.values())


def mean_psnr(summed: Callable[[str], float]) -> float | None:
    """Mean PSNR in dB of a job's results; None if it has measured none.

    Args:
        summed: The sum of the job's summaries under a name.
    """
    for total, count in (
        ("psnr_target_sum", "psnr_views"),
        ("psnr_last_sum", "fits"),
        ("psnr_sum", "images"),
    ):
        if summed(total) and summed(count):
            return summed(total) / summed(count)
    return None
