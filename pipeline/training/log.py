"""What a training run tells: `metrics.jsonl` for programs, TensorBoard events for people. Rank 0 alone writes them."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DamagedDataError
from pipeline.storage.base import Storage

METRICS_PATH = "metrics.jsonl"
_WRITE_SECONDS = 10.0


class TrainingLog:
    """Collects figures by step. Those beyond the step that a run resumes from are dropped: they come again.

    Args:
        output: The run's folder.
        step: Where the run begins.
    """

    def __init__(self, output: Storage, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._output = output
        self._rows = [row for row in read_metrics(output) if row["step"] <= step]
        self._written = time.monotonic()
        # Object stores know no appending: events are written here and copied there.
        self._folder = Path(output.root) / "tensorboard" if output.root.startswith("/") else None
        self._scratch = None if self._folder else tempfile.TemporaryDirectory(prefix="air-")
        self._events = SummaryWriter(str(self._folder or (self._scratch and self._scratch.name)), purge_step=step + 1)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of a step."""
        self._rows.append({"step": step, **figures})
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)
        if time.monotonic() - self._written > _WRITE_SECONDS:
            self.flush()

    def add_pictures(self, step: int, name: str, grid: np.ndarray) -> None:
        """A picture, shape (3, H, W), values in [0, 1]."""
        self._events.add_image(name, grid, step)

    def flush(self) -> None:
        """Makes everything visible."""
        self._written = time.monotonic()
        text = "".join(json.dumps(row) + "\n" for row in self._rows)
        self._output.write(METRICS_PATH, text.encode())
        self._events.flush()
        if self._scratch:
            for file in Path(self._scratch.name).iterdir():
                self._output.upload(file, f"tensorboard/{file.name}")

    def close(self) -> None:
        """Flushes and ends."""
        self.flush()
        self._events.close()
        if self._scratch:
            self._scratch.cleanup()


def read_metrics(output: Storage) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, oldest first; none where there is no such file.

    Raises:
        DamagedDataError: A line is not what `TrainingLog` writes.
    """
    if not output.exists(METRICS_PATH):
        return []
    rows = []
    for number, line in enumerate(output.read(METRICS_PATH).splitlines(), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no object with a step")
        except ValueError as error:
            raise DamagedDataError(
                f"{output.uri(METRICS_PATH)}, line {number}, is not a row of figures: {error}; delete that line"
            ) from None
        rows.append(row)
    return rows
