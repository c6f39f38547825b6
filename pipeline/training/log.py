"""The figures of a training run: their sums, `metrics.jsonl` for programs, TensorBoard events for people."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.errors import DamagedDataError
from pipeline.storage.base import Storage
from pipeline.training.group import Group

METRICS_PATH = "metrics.jsonl"
_WRITE_SECONDS = 10.0


@dataclass
class StepSums:
    """Figures of one or more steps, as sums, of one worker or of all.

    Attributes:
        loss: Losses of the usable samples; NaN if one of them is not a number.
        psnr: PSNR of the usable samples, in dB; 0 in phases that draw no picture.
        usable: Number of usable samples.
        skipped: Number of samples that could not be used.
        seconds: Training time, which rank 0 alone measures.
        told_to_stop: Number of workers that were told to stop.
    """

    loss: float = 0.0
    psnr: float = 0.0
    usable: float = 0.0
    skipped: float = 0.0
    seconds: float = 0.0
    told_to_stop: float = 0.0

    def add(self, other: StepSums) -> None:
        """Adds the figures of further steps."""
        self.loss += other.loss
        self.psnr += other.psnr
        self.usable += other.usable
        self.skipped += other.skipped
        self.seconds += other.seconds
        self.told_to_stop += other.told_to_stop

    def all_reduce(self, group: Group) -> StepSums:
        """The sums over all workers, formed in float64."""
        numbers = torch.tensor(astuple(self), dtype=torch.float64, device=group.device)
        group.all_reduce([numbers])
        return StepSums(*numbers.tolist())

    def means(self) -> dict[str, float]:
        """Mean loss and mean PSNR of the usable samples; nothing if there are none."""
        return {"loss": self.loss / self.usable, "psnr": self.psnr / self.usable} if self.usable else {}


class TrainingLog:
    """Collects figures by step and writes them. Rank 0 alone has one.

    Rows after the step that a run goes on from are dropped, as the run makes them again.

    Args:
        output: The run's folder.
        step: The step that the run begins with.
    """

    def __init__(self, output: Storage, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._output = output
        self._rows = [row for row in read_metrics(output) if row["step"] <= step]
        self._written = time.monotonic()
        # TensorBoard's writer appends to its file when it likes; an object store cannot append, and a run that has lost
        # its lease may not. So events are written to a scratch folder, and copied from there.
        self._scratch = tempfile.TemporaryDirectory(prefix="air-")
        self._events = SummaryWriter(self._scratch.name, purge_step=step + 1)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of a step, by name."""
        self._rows.append({"step": step, **figures})
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)
        if time.monotonic() - self._written > _WRITE_SECONDS:
            self._write_rows()

    def add_pictures(self, step: int, name: str, grid: np.ndarray) -> None:
        """Takes a picture, shape (3, H, W), values in [0, 1]."""
        self._events.add_image(name, grid, step)

    def flush(self) -> None:
        """Writes everything that was taken so far."""
        self._write_rows()
        self._events.flush()
        for file in Path(self._scratch.name).iterdir():
            self._output.upload(file, f"tensorboard/{file.name}")

    def _write_rows(self) -> None:
        self._written = time.monotonic()
        text = "".join(json.dumps(row) + "\n" for row in self._rows)
        self._output.write(METRICS_PATH, text.encode())

    def close(self) -> None:
        """Flushes, and closes the files."""
        try:
            self.flush()
        finally:
            self._events.close()
            self._scratch.cleanup()


def read_metrics(output: Storage) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, oldest first; none if there is no such file.

    Raises:
        DamagedDataError: A line is not a JSON object with a step.
    """
    if not output.exists(METRICS_PATH):
        return []
    rows = []
    for number, line in enumerate(output.read(METRICS_PATH).splitlines(), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("it is not a JSON object with a step")
        except ValueError as error:
            raise DamagedDataError(
                f"{output.uri(METRICS_PATH)}, line {number}, is not a row of figures: {error}; delete that line"
            ) from None
        rows.append(row)
    return rows
