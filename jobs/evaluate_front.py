"""Measures which quality each way to Gaussians reaches in which time: PSNR, MS-SSIM and the loss over seconds.

The ways are a predictor with --steps steps of refinement, fits that grow with each of --rules, and a plain grid. All
use about as many Gaussians as the predictor does for an image, and take turns on the image. Every number of steps is
a computation of its own. Times are from pixels in memory to Gaussians, wall and CPU; the front and the plot go by CPU
seconds with one thread, and else by wall seconds. In the table, * marks the front: what no other way beats in both
PSNR and time.

  air evaluate pictures/ --front --gaussians 28000 --output front.parquet --plot front.svg
  air evaluate pictures/ --front --predictor grow --rules adam,shipped,run/rule.safetensors --steps 10,20,50
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from air.defaults import GRID, GROW
from jobs.command import configure, make_parser
from jobs.measuring import check_output, deliver, measure_inputs, print_means_of, print_written, write_table
from pipeline.evaluation.config import FrontConfig
from pipeline.formats import tables
from pipeline.predictors import PredictorReference, default_predictor, find_predictor

if TYPE_CHECKING:
    from pipeline.evaluation.predictor import Evaluation


def evaluate_front(
    inputs: Sequence[str], config: FrontConfig, output: str | None = None, plot: str | None = None
) -> Evaluation:
    """Measures the front, prints the means, and writes the table to `output` and curves to `plot`, if given.

    Raises:
        ConfigError: The name of an output does not end in .parquet or .svg, or an input holds no image.
        CheckpointError: There is no such predictor or rule.
        JobFailedError: No image could be used.
        StorageError: An output cannot be written. This is checked before anything is measured, as far as possible.
    """
    check_output(output, ".parquet", "the table is one Parquet file")
    check_output(plot, ".svg", "the plot is an SVG file")
    from pipeline.evaluation.front import Front, clock_of
    from pipeline.evaluation.front import evaluate_front as measure
    from pipeline.reports.charts import svg
    from pipeline.reports.front_curves import charts

    front = Front.find(_predictor(config.predictor), config)
    evaluation = measure_inputs(inputs, config, "predict", lambda pictures, report: measure(pictures, front, report))
    clock = clock_of(config.threads)
    print_front(evaluation, inputs, clock)
    if output is not None:
        write_table(evaluation.rows, output, tables.FRONT, config, {"air.methods": json.dumps(front.models())})
    if plot is not None:
        drawn = svg(charts(evaluation.rows, clock), width=680, height=340, columns=1)
        deliver(lambda local: local.write_text(drawn, encoding="utf-8"), plot)
    return evaluation


def _predictor(name: str | None) -> PredictorReference | None:
    if name == GROW:
        return None
    return default_predictor(None, None) if name is None else find_predictor(name, others=(GRID, GROW))


def print_front(evaluation: Evaluation, inputs: Sequence[str], clock: str) -> None:
    """Prints the means over images, a line for each method and number of steps.

    Args:
        evaluation: Rows of `pipeline.formats.tables.FRONT`.
        inputs: What was measured.
        clock: The column of seconds that the front goes by.
    """
    from pipeline.evaluation.front import means, on_front

    columns = ("method", "steps", "PSNR, dB", "MS-SSIM", "loss", "Gaussians", "seconds", "CPU seconds", "front")
    mean = means(evaluation.rows)
    best = on_front(mean, clock)
    lines = [
        (
            method,
            steps,
            figures["psnr"],
            f"{figures['ms_ssim']:.4f}",
            f"{figures['loss']:.4f}",
            round(figures["num_gaussians"]),
            figures["seconds"],
            figures["cpu_seconds"],
            "*" if (method, steps) in best else "",
        )
        for (method, steps), figures in mean.items()
    ]
    print_means_of(evaluation, inputs, columns, lines)


def main(arguments: Sequence[str]) -> int:
    """The command `air evaluate --front`."""
    parser = make_parser("evaluate", __doc__, FrontConfig)
    parser.add_argument("--front", action="store_true", help="measures quality over time")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="images to measure on; local paths or URIs")
    parser.add_argument(
        "--output", metavar="OUT.parquet", help="Parquet file to write, with a row for each measurement"
    )
    parser.add_argument("--plot", metavar="OUT.svg", help="charts to write: PSNR, MS-SSIM and loss over seconds")
    given = parser.parse_args(arguments)
    (config,) = configure(given, front=FrontConfig)
    evaluation = evaluate_front(given.images, config, given.output, given.plot)
    print_written(evaluation, given.output, given.plot)
    return 0
