"""Shows a running job: a live line on a terminal, or a line a minute in a log, which may be of JSON."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from pipeline import logs
from pipeline.work.runner import Display
from pipeline.work.tally import Tally, mean_psnr

logger = logging.getLogger(__name__)

_LOG_EVERY_SECONDS = 60.0


class LiveDisplay:
    """A progress bar over samples: images/s, mean PSNR so far, quarantined, time left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._begin = time.monotonic()
        self._task = progress.add_task("starting", total=None, detail="")

    def update(self, tally: Tally) -> None:
        """Shows the tally."""
        self._progress.update(
            self._task,
            description=f"shards {tally.units_done}/{tally.units_total}",
            total=tally.samples_total,
            completed=tally.samples_so_far,
            detail=", ".join(_details(tally, time.monotonic() - self._begin)),
        )


class LogDisplay:
    """Prints a line a minute, for logs. Short runs print nothing."""

    def __init__(self, say: Callable[[str], object], job: str) -> None:
        self._say = say
        self._job = job
        self._begin = self._last = time.monotonic()
        self._noted: set[str] = set()

    def update(self, tally: Tally) -> None:
        """Prints each note once, and the tally if the last line is a minute old."""
        now = time.monotonic()
        for note in _notes(tally) - self._noted:
            self._noted.add(note)
            self._say(f"{self._job}: {note}")
        if now - self._last >= _LOG_EVERY_SECONDS:
            self._last = now
            total = f"/{tally.samples_total}" if tally.samples_total else ""
            parts = [
                f"shards {tally.units_done}/{tally.units_total}",
                f"images {tally.samples_so_far}{total}",
                *_details(tally, now - self._begin),
            ]
            self._say(f"{self._job}: {', '.join(parts)}")


def _notes(tally: Tally) -> set[str]:
    return {progress.note for progress in tally.running.values() if progress.note}


def _details(tally: Tally, elapsed: float) -> list[str]:
    parts = sorted(_notes(tally))
    fresh = tally.samples_so_far - tally.samples_before
    if fresh and elapsed > 0:
        parts.append(f"{fresh / elapsed:.1f} images/s")
    psnr = mean_psnr(tally.summary_so_far)
    if psnr is not None:
        parts.append(f"{psnr:.2f} dB")
    if tally.rejected_so_far:
        parts.append(f"{tally.rejected_so_far} quarantined")
    return parts


def live_console() -> Console | None:
    """The console for a live display; None where stderr is no terminal, or where it is for lines of JSON."""
    console = Console(stderr=True)
    return console if console.is_terminal and logs.present().format == "text" else None


def say_line(line: str) -> None:
    """Prints a line of progress to stderr, as the option `--log-format` says."""
    if logs.present().format == "text":
        Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)
    else:
        logger.info("%s", line)


@contextmanager
def show(job: str) -> Iterator[Display]:
    """The display that suits the output: live on a terminal, lines in a log."""
    console = live_console()
    if console is None:
        yield LogDisplay(say_line, job)
    else:
        columns = (
            SpinnerColumn(),
            TextColumn(f"[bold]{job}[/] {{task.description}}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            yield LiveDisplay(progress)
