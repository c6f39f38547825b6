"""PSNR and time of fits over a directory of images: from a plain grid, or growing within a budget of Gaussians.

    python benchmarks/fit_kodak.py DIR --patch-size 4 --steps 20 50 100
    python benchmarks/fit_kodak.py DIR --gaussians 8000 16000 28000 50000 --steps 20 50 150 500 --plot curves.svg

Every number of steps is a separate fit, since the learning rates fall towards its end.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from air.fitting.fit import FitResult, fit
from air.warmup import warm_up
from pipeline.reports.charts import Chart, Curve, svg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="PNG images, for example the 24 of Kodak")
    parser.add_argument("--patch-size", type=int, nargs="+", default=[], help="plain grids of these patch sizes")
    parser.add_argument("--gaussians", type=int, nargs="+", default=[], help="growing fits with these budgets")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 20, 50, 100])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="write PSNR against seconds here, as SVG")
    arguments = parser.parse_args()
    paths = sorted(arguments.directory.glob("*.png"))
    if not paths:
        parser.error(f"no PNG images in {arguments.directory}")
    torch.set_num_threads(arguments.threads)
    warm_up("fit")
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    print(f"{len(images)} images, {arguments.threads} thread(s)")
    print("| start | Gaussians | steps | mean PSNR dB | least | s per image, mean | median |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    kinds: dict[str, Callable[[NDArray[np.uint8], int], FitResult]] = {}
    for patch_size in arguments.patch_size or ([] if arguments.gaussians else [4]):
        kinds[f"grid, patch {patch_size}"] = partial(_fit, patch_size=patch_size, threads=arguments.threads)
    for budget in arguments.gaussians:
        kinds[f"growing to {budget}"] = partial(_grow, budget=budget, threads=arguments.threads)
    curves = {name: [_measure(name, kind, images, steps) for steps in arguments.steps] for name, kind in kinds.items()}
    if arguments.plot:
        chart = Chart("mean PSNR in dB over seconds an image", [Curve(*curve) for curve in curves.items()], log_x=True)
        arguments.plot.write_text(svg([chart], width=720, height=440))


def _fit(image: NDArray[np.uint8], steps: int, patch_size: int, threads: int) -> FitResult:
    return fit(image, steps, patch_size=patch_size, threads=threads)


def _grow(image: NDArray[np.uint8], steps: int, budget: int, threads: int) -> FitResult:
    return fit(image, steps, num_gaussians=budget, threads=threads)


def _measure(
    name: str,
    kind: Callable[[NDArray[np.uint8], int], FitResult],
    images: list[NDArray[np.uint8]],
    steps: int,
) -> tuple[float, float]:
    """Prints a row; (mean seconds, mean PSNR)."""
    results = [kind(image, steps) for image in images]
    quality = np.array([result.trajectory.psnr[-1] for result in results])
    seconds = np.array([result.seconds for result in results])
    count = round(np.mean([len(result.gaussians) for result in results]))
    print(
        f"| {name} | {count} | {steps} | {quality.mean():.2f} | {quality.min():.2f} "
        f"| {seconds.mean():.2f} | {np.median(seconds):.2f} |",
        flush=True,
    )
    return float(seconds.mean()), float(quality.mean())


if __name__ == "__main__":
    main()
