"""The display of a training run: a live line on a terminal, and a line every half minute in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jobs.display import live_console, say_line

_LOG_EVERY_SECONDS = 30.0


class _Figures:
    """The latest value of every figure, and a phrase that tells them."""

    def __init__(self, steps: int, max_seconds: float | None, samples: str) -> None:
        self._steps = steps
        self._max_seconds = max_seconds
        self._samples = samples
        self._last: dict[str, float] = {}

    def take(self, figures: Mapping[str, float]) -> None:
        self._last.update(figures)

    @property
    def step(self) -> int:
        return int(self._last.get("step", 0))

    def __str__(self) -> str:
        last = self._last
        parts = []
        if "loss" in last:
            parts.append(f"loss {last['loss']:.4f}")
        if "samples_per_second" in last:
            parts.append(f"{last['samples_per_second']:.1f} {self._samples}/s")
        if "psnr" in last:
            parts.append(f"{last['psnr']:.2f} dB")
        if "valid_psnr" in last:
            best = f" (best {last['best_psnr']:.2f})" if "best_psnr" in last else ""
            parts.append(f"validation {last['valid_psnr']:.2f} dB{best}")
        left = self._seconds_left()
        if left is not None:
            parts.append(f"{int(left // 3600)}:{int(left // 60 % 60):02}:{int(left % 60):02} left")
        return ", ".join(parts)

    def _seconds_left(self) -> float | None:
        done, seconds = self._last.get("step", 0), self._last.get("seconds", 0)
        if not done:
            return None
        by_steps = seconds / done * (self._steps - done)
        budget = self._max_seconds
        return max(0.0, by_steps if budget is None else min(by_steps, budget - seconds))


@contextmanager
def show_training(
    steps: int, max_seconds: float | None = None, samples: str = "views"
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A live display on a terminal, lines elsewhere; yields the function that takes figures by name.

    Args:
        steps: Steps of the whole run.
        max_seconds: Time after which the run ends even before the last step.
        samples: What the figure `samples_per_second` counts.
    """
    console = live_console()
    figures = _Figures(steps, max_seconds, samples)
    if console is None:
        shown = time.monotonic()

        def log(new: Mapping[str, float]) -> None:
            nonlocal shown
            figures.take(new)
            if "valid_psnr" in new or time.monotonic() - shown >= _LOG_EVERY_SECONDS:
                shown = time.monotonic()
                say_line(f"train: step {figures.step}/{steps}, {figures}")

        yield log
        return
    columns = (
        TextColumn("[bold]train[/]"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=steps)

        def draw(new: Mapping[str, float]) -> None:
            figures.take(new)
            progress.update(task, completed=figures.step, description=str(figures))

        yield draw
