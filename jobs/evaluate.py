"""Measures a predictor on images, before and after refinement, beside plain grids: PSNR, MS-SSIM, counts and times.
With --codec it measures .air files beside JPEG, WebP, JPEG 2000 and AVIF, for targets of bits per pixel.

IMAGES are folders, globs, image files, tars and Parquet, or the output of `air shard` or `air distill`. Images are
measured whole. Each number of refinement steps starts from the prediction and moves all Gaussians together. Times are
wall seconds per image with --threads threads. Images that cannot be used are named and skipped.

Every other codec makes the best file that is no larger than the .air file, or its smallest file if even that is larger.
The time of encoding to .air includes the search for the target; the times of the other codecs are for the one setting
that was found.

  air evaluate pictures/ --predictor run/best.safetensors --refine 0,10,50 --output figures.parquet
  air evaluate pictures/ --codec --bpp 0.25,1 --output figures.parquet --plot figures.svg
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from air.version import __version__
from jobs.command import configure, make_parser
from jobs.report import counted, print_table, rejections
from pipeline.errors import ConfigError, JobFailedError, StorageError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.formats import tables
from pipeline.inputs.pictures import Picture, find_pictures
from pipeline.predictors import default_predictor, find_predictor
from pipeline.storage.open import check_writable, open_parent

if TYPE_CHECKING:
    from pipeline.evaluation.predictor import Evaluation


def evaluate(inputs: Sequence[str], config: EvaluateConfig, output: str | None = None) -> Evaluation:
    """Measures a predictor, prints the means, and writes the table to `output`, a path or URI, if given.

    Raises:
        ConfigError: The name of the output does not end in .parquet, or an input holds no image.
        CheckpointError: There is no such predictor.
        JobFailedError: No image could be used.
        StorageError: The output cannot be written. This is checked before anything is measured, as far as possible.
    """
    _check_output(output, ".parquet", "the table is one Parquet file")
    from air.warmup import kernels_of
    from pipeline.evaluation.predictor import evaluate as measure

    reference = (
        default_predictor(config.patch_size, config.stages)
        if config.predictor is None
        else find_predictor(config.predictor, config.patch_size)
    )
    kernels = kernels_of("predict")
    seconds = 0 if kernels.is_compiled() else kernels.seconds
    evaluation = _measure(
        inputs, config, seconds, lambda pictures, report: measure(pictures, reference, config, report)
    )
    print_means(evaluation, inputs)
    if output is not None:
        _write_table(evaluation.rows, output, tables.EVALUATION, config, {"air.model": reference.model})
    return evaluation


def evaluate_codec(
    inputs: Sequence[str], config: EvaluateConfig, output: str | None = None, plot: str | None = None
) -> Evaluation:
    """Measures the codec, prints the means, and writes the table to `output` and curves to `plot`, if given.

    Raises:
        ConfigError: The name of an output does not end in .parquet or .svg, or an input holds no image.
        JobFailedError: No image could be used.
        StorageError: An output cannot be written. This is checked before anything is measured, as far as possible.
    """
    _check_output(output, ".parquet", "the table is one Parquet file")
    _check_output(plot, ".svg", "the plot is an SVG file")
    from air.warmup import kernels_of
    from pipeline.evaluation import baselines
    from pipeline.evaluation.codec import evaluate_codec as measure
    from pipeline.reports.charts import svg
    from pipeline.reports.codec_curves import charts

    others = baselines.available()
    missing = [baseline.name for baseline in baselines.BASELINES if baseline not in others]
    if missing:
        print(f"not measured: {', '.join(missing)}; this Pillow is built without them", flush=True)
    kernels = kernels_of("encode")
    seconds = 0 if kernels.is_compiled() else kernels.seconds
    evaluation = _measure(inputs, config, seconds, lambda pictures, report: measure(pictures, others, config, report))
    print_codec_means(evaluation, inputs)
    if output is not None:
        _write_table(
            evaluation.rows, output, tables.CODEC_EVALUATION, config, {"air.codecs": baselines.describe(others)}
        )
    if plot is not None:
        _deliver(lambda local: local.write_text(svg(charts(evaluation.rows)), encoding="utf-8"), plot)
    return evaluation


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("evaluate", __doc__, EvaluateConfig)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="images to measure on; local paths or URIs")
    parser.add_argument(
        "--output", metavar="OUT.parquet", help="Parquet file to write, with a row for each measurement"
    )
    parser.add_argument(
        "--plot", metavar="OUT.svg", help="with --codec: chart to write, PSNR and MS-SSIM over bits per pixel"
    )
    given = parser.parse_args(arguments)
    (config,) = configure(given, evaluate=EvaluateConfig)
    if config.codec:
        evaluation = evaluate_codec(given.images, config, given.output, given.plot)
    elif given.plot:
        raise ConfigError("--plot: only with --codec; add --codec, or leave out --plot")
    else:
        evaluation = evaluate(given.images, config, given.output)
    written = [name for name in (given.output, given.plot) if name]
    if written:
        print(f"{counted(len(evaluation.rows), 'row')}. Output: {', '.join(written)}")
    return 0


def _measure(
    inputs: Sequence[str],
    config: EvaluateConfig,
    compile_seconds: int,
    measure: Callable[[list[Picture], Any], Evaluation],
) -> Evaluation:
    """Calls `measure` with the pictures of the inputs, shows progress, and says first how long kernels compile."""
    pictures = find_pictures(inputs, config.max_pixels)
    if compile_seconds:
        print(f"compiling kernels, once on this machine: about {compile_seconds} s", flush=True)
    with _progress(min(len(pictures), config.limit or len(pictures))) as report:
        evaluation = measure(pictures, report)
    if not evaluation.rows:
        raise JobFailedError(f"no image could be used: {_skipped(evaluation)}")
    return evaluation


def _check_output(name: str | None, ending: str, what: str) -> None:
    """Refuses, before anything is measured, an output that cannot be written."""
    if name is None:
        return
    if not name.endswith(ending):
        raise ConfigError(f"{name}: {what}; give it a name that ends in {ending}")
    check_writable(name)


def print_codec_means(evaluation: Evaluation, inputs: Sequence[str]) -> None:
    """Prints the means over images, a line for each target and codec."""
    from pipeline.evaluation.codec import means

    columns = ("target, bpp", "codec", "bpp", "PSNR, dB", "MS-SSIM", "Gaussians", "encode, s", "decode, ms")
    lines = [
        (
            f"{target:g}",
            codec,
            f"{mean['bpp']:.3f}",
            mean["psnr"],
            f"{mean['ms_ssim']:.4f}",
            round(mean["num_gaussians"]) or None,
            mean["encode_seconds"],
            1e3 * mean["decode_seconds"],
        )
        for (target, codec), mean in means(evaluation.rows).items()
    ]
    _print_means(evaluation, inputs, columns, lines)


def print_means(evaluation: Evaluation, inputs: Sequence[str]) -> None:
    """Prints the means over images, a line for each predictor and refinement."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in evaluation.rows:
        groups.setdefault((row["predictor"], row["refine_steps"]), []).append(row)
    columns = (
        "predictor",
        "patch",
        "steps",
        "PSNR, dB",
        "MS-SSIM",
        "Gaussians",
        "per stage",
        "predict, s",
        "refine, s",
    )
    lines = []
    for (predictor, steps), rows in groups.items():
        patches = sorted({row["patch_size"] for row in rows})
        per_stage = [
            round(sum(row["gaussians"][stage] for row in rows if stage < len(row["gaussians"])) / len(rows))
            for stage in range(max(len(row["gaussians"]) for row in rows))
        ]
        lines.append(
            (
                predictor,
                str(patches[0]) if len(patches) == 1 else f"{patches[0]} to {patches[-1]}",
                steps,
                _mean(rows, "psnr"),
                f"{_mean(rows, 'ms_ssim'):.4f}",
                round(_mean(rows, "num_gaussians")),
                " + ".join(f"{count:,}" for count in per_stage),
                _mean(rows, "predict_seconds"),
                _mean(rows, "refine_seconds"),
            )
        )
    _print_means(evaluation, inputs, columns, lines)


def _print_means(
    evaluation: Evaluation, inputs: Sequence[str], columns: Sequence[str], lines: Sequence[Sequence[object]]
) -> None:
    count = len({row["key"] for row in evaluation.rows})
    print(f"means over {counted(count, 'image')} of {', '.join(inputs)}; {_skipped(evaluation)}")
    print_table("", columns, lines)


def _skipped(evaluation: Evaluation) -> str:
    return rejections(evaluation.rejected.most_common(), "skipped")


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def _write_table(
    rows: list[dict[str, Any]], output: str, schema: pa.Schema, config: EvaluateConfig, metadata: dict[str, str]
) -> None:
    stamps = {**metadata, "air.config": config.model_dump_json(), "air.code_version": __version__}
    schema = tables.stamped(schema, stamps)

    def write(local: Path) -> None:
        with tables.open_writer(str(local), schema) as parquet:
            parquet.write_table(pa.Table.from_pylist(rows, schema=schema))

    _deliver(write, output)


def _deliver(write: Callable[[Path], object], output: str) -> None:
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
    console = Console(stderr=True)
    columns = (TextColumn("evaluate"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=total)

        def report(done: int, rows: Sequence[Mapping[str, Any]]) -> None:
            shown = f"{rows[0]['psnr']:.2f} dB" if rows else "skipped"
            progress.update(task, completed=done, description=shown)

        yield report
