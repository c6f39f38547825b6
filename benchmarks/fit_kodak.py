"""PSNR and time of fits over a directory of images: from a plain grid, or growing within a budget of Gaussians.

    python benchmarks/fit_kodak.py DIR --patch-size 4 --steps 20 50 100
    python benchmarks/fit_kodak.py DIR --gaussians 8000 16000 28000 50000 --steps 20 50 150 500 --plot curves.svg
    python benchmarks/fit_kodak.py DIR --gaussians 28000 --rules adam shipped --steps 10 20 30 50 100

Every number of steps is a separate fit, since the learning rates fall towards its end. All kinds of fit take turns on
an image, so that other work on the machine meets all alike. With one thread, seconds are CPU time, which does not
count waiting for a core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from air.arguments import image_tensor
from air.fitting.fit import FitResult, fit
from air.metrics import ms_ssim
from air.rendering.render import render
from air.warmup import warm_up
from pipeline.reports.charts import Chart, Curve, svg


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
    torch.set_num_threads(arguments.threads)
    warm_up("fit")
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    print(f"{len(images)} images, {arguments.threads} thread(s)")
    print("| start | Gaussians | steps | mean PSNR dB | least | MS-SSIM | loss | s per image, mean | median |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    kinds: dict[str, Callable[[NDArray[np.uint8], int], FitResult]] = {}
    for patch_size in arguments.patch_size or ([] if arguments.gaussians else [4]):
        kinds[f"grid, patch {patch_size}"] = partial(_fit, patch_size=patch_size, threads=arguments.threads)
    for budget in arguments.gaussians:
        for rule in arguments.rules:
            name = f"growing to {budget}, {Path(rule).stem}"
            kinds[name] = partial(_grow, budget=budget, rule=rule, threads=arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    rows = [_measure(steps, kinds, images, clock) for steps in arguments.steps]
    if arguments.plot:
        curves = [Curve(name, [row[name] for row in rows]) for name in kinds]
        chart = Chart("mean PSNR in dB over seconds an image", curves, log_x=True)
        arguments.plot.write_text(svg([chart], width=720, height=440))


def _fit(image: NDArray[np.uint8], steps: int, patch_size: int, threads: int) -> FitResult:
    return fit(image, steps, patch_size=patch_size, threads=threads)


def _grow(image: NDArray[np.uint8], steps: int, budget: int, rule: str, threads: int) -> FitResult:
    return fit(image, steps, num_gaussians=budget, rule=rule, threads=threads)


class _Fitted(NamedTuple):
    """What one fit came to."""

    gaussians: int
    psnr: float
    ms_ssim: float
    loss: float
    seconds: float


def _measure(
    steps: int,
    kinds: dict[str, Callable[[NDArray[np.uint8], int], FitResult]],
    images: list[NDArray[np.uint8]],
    clock: Callable[[], float],
) -> dict[str, tuple[float, float]]:
    """Prints a row for each kind; (mean seconds, mean PSNR) by its name."""
    fitted: dict[str, list[_Fitted]] = {name: [] for name in kinds}
    for image in images:
        for name, kind in kinds.items():
            begin = clock()
            result = kind(image, steps)
            seconds = clock() - begin
            picture = render(result.gaussians, result.height, result.width)
            similarity = ms_ssim(picture, image_tensor(image))
            last = result.trajectory
            fitted[name].append(
                _Fitted(len(result.gaussians), float(last.psnr[-1]), similarity, float(last.loss[-1]), seconds)
            )
    points = {}
    for name, each in fitted.items():
        mean = _Fitted(*np.mean(each, axis=0))
        least = min(one.psnr for one in each)
        median = float(np.median([one.seconds for one in each]))
        print(
            f"| {name} | {round(mean.gaussians)} | {steps} | {mean.psnr:.2f} | {least:.2f} | {mean.ms_ssim:.4f} "
            f"| {mean.loss:.5f} | {mean.seconds:.2f} | {median:.2f} |",
            flush=True,
        )
        points[name] = (mean.seconds, mean.psnr)
    return points


if __name__ == "__main__":
    main()
