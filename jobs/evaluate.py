"""Measures a predictor on images, before and after refinement, beside plain grids: PSNR, MS-SSIM, counts and times.
With --codec it measures .air files beside JPEG, WebP, JPEG 2000 and AVIF, for targets of bits per pixel.
With --front it measures predictor and fits over time; `air evaluate --front --help` has the options of that.

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

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.command import configure, make_parser
from jobs.measuring import check_output, deliver, measure_inputs, print_means_of, print_written, write_table
from pipeline.errors import ConfigError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.formats import tables
from pipeline.predictors import PredictorReference, default_predictor, find_predictor

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
    check_output(output, ".parquet", "the table is one Parquet file")
    from pipeline.evaluation.predictor import evaluate as measure

    reference = (
        default_predictor(config.patch_size, config.stages)
        if config.predictor is None
        else find_predictor(config.predictor, config.patch_size)
    )
    evaluation = measure_inputs(
        inputs, config, "predict", lambda pictures, report: measure(pictures, [reference], config, report)
    )
    print_means(evaluation, inputs)
    if output is not None:
        write_table(evaluation.rows, output, tables.EVALUATION, config, {"air.model": reference.model})
    return evaluation


def compare(
    inputs: Sequence[str], references: Sequence[PredictorReference], config: EvaluateConfig, output: str
) -> Evaluation:
    """Measures several predictors in one run, in which they take turns, prints the means and writes the table.

    Args:
        inputs: Images to measure on.
        references: The predictors; baselines are those of the first one.
        config: What is measured; `predictor` does not count.
        output: Path or URI of the table.

    Returns:
        What was measured. It has no rows if a predictor diverged on every image.

    Raises:
        CheckpointError: A predictor cannot be loaded.
        ConfigError: An input holds no image, or a predictor has fewer stages than are asked for.
        JobFailedError: No image could be used, and no predictor is at fault.
        StorageError: The output cannot be written.
    """
    check_output(output, ".parquet", "the table is one Parquet file")
    from pipeline.evaluation.predictor import evaluate as measure

    evaluation = measure_inputs(
        inputs,
        config,
        "predict",
        lambda pictures, report: measure(pictures, references, config, report),
        may_diverge=True,
    )
    print_means(evaluation, inputs)
    models = ", ".join(reference.model for reference in references)
    write_table(evaluation.rows, output, tables.EVALUATION, config, {"air.model": models})
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
    check_output(output, ".parquet", "the table is one Parquet file")
    check_output(plot, ".svg", "the plot is an SVG file")
    from pipeline.evaluation import baselines
    from pipeline.evaluation.codec import evaluate_codec as measure
    from pipeline.reports.charts import svg
    from pipeline.reports.codec_curves import charts

    others = baselines.available()
    missing = [baseline.name for baseline in baselines.BASELINES if baseline not in others]
    if missing:
        print(f"not measured: {', '.join(missing)}; this Pillow is built without them", flush=True)
    evaluation = measure_inputs(
        inputs, config, "encode", lambda pictures, report: measure(pictures, others, config, report)
    )
    print_codec_means(evaluation, inputs)
    if output is not None:
        write_table(
            evaluation.rows, output, tables.CODEC_EVALUATION, config, {"air.codecs": baselines.describe(others)}
        )
    if plot is not None:
        deliver(lambda local: local.write_text(svg(charts(evaluation.rows)), encoding="utf-8"), plot)
    return evaluation


def main(arguments: Sequence[str]) -> int:
    """The command."""
    if "--front" in arguments:
        from jobs.evaluate_front import main as evaluate_front

        return evaluate_front(arguments)
    parser = make_parser("evaluate", __doc__, EvaluateConfig)
    parser.add_argument("--front", action="store_true", help="measure quality over time, of predictor and fits")
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
        raise ConfigError("--plot: only with --codec or --front; add one of these, or leave out --plot")
    else:
        evaluation = evaluate(given.images, config, given.output)
    print_written(evaluation, given.output, given.plot)
    return 0


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
    print_means_of(evaluation, inputs, columns, lines)


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
    print_means_of(evaluation, inputs, columns, lines)


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
