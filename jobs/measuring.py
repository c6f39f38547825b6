"""What `air evaluate` does whatever it measures: checks outputs, shows progress, prints means, writes table and plot.

This module must not know what the columns mean.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from air.version import __version__
from jobs.display import live_console
from jobs.report import counted, print_table, rejections
from pipeline.errors import ConfigError, JobFailedError, StorageError
from pipeline.evaluation.config import EvaluateConfig, FrontConfig
from pipeline.formats import tables
from pipeline.inputs.pictures import Picture, find_pictures
from pipeline.storage.open import check_writable, open_parent

if TYPE_CHECKING:
    from air.warmup import Task
    from pipeline.evaluation.predictor import Evaluation


def check_output(name: str | None, ending: str, what: str) -> None:
    """Refuses, before anything is measured, an output that cannot be written."""
    if name is None:
        return
    if not name.endswith(ending):
        raise ConfigError(f"{name}: {what}; give it a name that ends in {ending}")
    check_writable(name)


def measure_inputs(
    inputs: Sequence[str],
    config: EvaluateConfig | FrontConfig,
    task: Task,
    measure: Callable[[list[Picture], Any], Evaluation],
    may_diverge: bool = False,
) -> Evaluation:
    """Calls `measure` with the pictures of the inputs, shows progress, and says first how long kernels compile.

    Args:
        inputs: Paths and URIs of pictures.
        config: What is measured.
        task: Whose kernels are needed.
        measure: Takes the pictures, and what to call after each with the number of pictures done and its rows.
        may_diverge: A predictor that diverges on every image is a result, without rows.

    Raises:
        ConfigError: An input holds no image.
        JobFailedError: No image could be used.
    """
    from air.warmup import kernels_of

    pictures = find_pictures(inputs, config.max_pixels)
    kernels = kernels_of(task)
    if not kernels.is_compiled():
        print(f"compiling kernels, once on this machine: about {kernels.seconds} s", flush=True)
    with _progress(min(len(pictures), config.limit or len(pictures))) as report:
        evaluation = measure(pictures, report)
    if not evaluation.rows and not (may_diverge and evaluation.diverged):
        raise JobFailedError(f"no image could be used: {_skipped(evaluation)}")
    return evaluation


def print_means_of(
    evaluation: Evaluation, inputs: Sequence[str], columns: Sequence[str], lines: Sequence[Sequence[object]]
) -> None:
    """Prints a table of means over images, below a line that says over how many."""
    count = len({row["key"] for row in evaluation.rows})
    print(f"means over {counted(count, 'image')} of {', '.join(inputs)}; {_skipped(evaluation)}")
    print_table("", columns, lines)


def print_written(evaluation: Evaluation, *names: str | None) -> None:
    """Prints the number of rows and the files that were written, if any."""
    written = [name for name in names if name]
    if written:
        print(f"{counted(len(evaluation.rows), 'row')}. Output: {', '.join(written)}")


def _skipped(evaluation: Evaluation) -> str:
    return rejections(evaluation.rejected.most_common(), "skipped")


def write_table(
    rows: list[dict[str, Any]],
    output: str,
    schema: pa.Schema,
    config: EvaluateConfig | FrontConfig,
    metadata: dict[str, str],
) -> None:
    """Writes rows to a Parquet file at a path or URI, with the configuration and `metadata` as file metadata."""
    stamps = {**metadata, "air.config": config.model_dump_json(), "air.code_version": __version__}
    schema = tables.stamped(schema, stamps)

    def write(local: Path) -> None:
        with tables.open_writer(str(local), schema) as parquet:
            parquet.write_table(pa.Table.from_pylist(rows, schema=schema))

    deliver(write, output)


def deliver(write: Callable[[Path], object], output: str) -> None:
    """Writes a local file and copies it to `output`. A file that cannot be copied is kept, as measuring took long."""
    storage, name = open_parent(output)
    folder = Path(tempfile.mkdtemp(prefix="air-"))
    local = folder / name
    write(local)
    try:
        storage.upload(local, name)
    except StorageError as error:
        raise StorageError(f"{error}. The file is kept as {local}") from None
    shutil.rmtree(folder)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    console = live_console()
    columns = (TextColumn("evaluate"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=console is None
    ) as progress:
        task = progress.add_task("", total=total)

        def report(done: int, rows: Sequence[Mapping[str, Any]]) -> None:
            shown = f"{rows[0]['psnr']:.2f} dB" if rows else "skipped"
            progress.update(task, completed=done, description=shown)

        yield report
