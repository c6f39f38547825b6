"""PSNR and time of fits over a directory of images: from plain grids, or growing within budgets of Gaussians.

    python benchmarks/fit_kodak.py DIR --patch-size 4 --steps 20 50 100
    python benchmarks/fit_kodak.py DIR --gaussians 8000 16000 28000 50000 --steps 20 50 150 500 --plot curves.svg
    python benchmarks/fit_kodak.py DIR --gaussians 28000 --rules adam shipped --steps 10 20 30 50 100

`air evaluate DIR --front` compares ways to as many Gaussians, a network among them; this script compares budgets and
patch sizes. Every number of steps is a separate fit, since the learning rates fall towards its end. All kinds of fit
take turns on an image, so that other work on the machine meets all alike. With one thread, seconds are CPU time, which
does not count waiting for a core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from air.arguments import image_tensor
from air.compute.threads import limit_torch
from air.warmup import warm_up
from pipeline.evaluation.front import GrowingRule, Method, clock_of, growing, means, measure_methods, plain_grid
from pipeline.evaluation.predictor import Rows
from pipeline.reports.charts import svg
from pipeline.reports.front_curves import charts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="PNG images, for example the 24 of Kodak")
    parser.add_argument("--patch-size", type=int, nargs="+", default=[], help="plain grids of these patch sizes")
    parser.add_argument("--gaussians", type=int, nargs="+", default=[], help="growing fits with these budgets")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 20, 50, 100])
    parser.add_argument(
        "--rules",
        nargs="+",
        default=["auto"],
        help="rules of growing fits: auto, adam, shipped or NAME.safetensors",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="write PSNR against seconds here, as SVG")
    arguments = parser.parse_args()
    paths = sorted(arguments.directory.glob("*.png"))
    if not paths:
        parser.error(f"no PNG images in {arguments.directory}")
    threads = arguments.threads
    patch_sizes = arguments.patch_size or ([] if arguments.gaussians else [4])
    methods = [plain_grid(f"grid, patch {size}", size, threads) for size in patch_sizes]
    rules = [GrowingRule.find(name) for name in arguments.rules] if arguments.gaussians else []
    for budget in arguments.gaussians:
        methods += [growing(f"growing to {budget}, {rule.name}", rule.rule, budget, threads) for rule in rules]
    warm_up("fit")
    print(f"{len(paths)} images, {threads} thread(s)")
    print("| start | Gaussians | steps | mean PSNR dB | least | MS-SSIM | loss | s per image, mean | median |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    clock = clock_of(threads)
    rows: Rows = []
    with limit_torch(threads):
        for steps in arguments.steps:
            measured = _measure(paths, methods, steps, threads)
            _print(measured, clock)
            rows += measured
    if arguments.plot:
        psnr, _, _ = charts(rows, clock)
        arguments.plot.write_text(svg([psnr], width=720, height=440))


def _measure(paths: list[Path], methods: list[Method], steps: int, threads: int) -> Rows:
    """Rows of `pipeline.formats.tables.FRONT`."""
    rows: Rows = []
    for path in paths:
        image = image_tensor(np.asarray(Image.open(path).convert("RGB")))
        rows += measure_methods(path.stem, image, methods, [steps], threads)
    return rows


def _print(rows: Rows, clock: str) -> None:
    """Prints a line of Markdown for each method."""
    for (method, steps), mean in means(rows).items():
        own = [row for row in rows if row["method"] == method]
        least = min(row["psnr"] for row in own)
        median = float(np.median([row[clock] for row in own]))
        print(
            f"| {method} | {round(mean['num_gaussians'])} | {steps} | {mean['psnr']:.2f} | {least:.2f} "
            f"| {mean['ms_ssim']:.4f} | {mean['loss']:.5f} | {mean[clock]:.2f} | {median:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
