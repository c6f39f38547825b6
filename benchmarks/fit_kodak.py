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

from air.growth import GrowthResult, grow
from air.optimize import FitResult, compile_kernels, fit


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
    compile_kernels()
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    print(f"{len(images)} images, {arguments.threads} thread(s)")
    print("| start | Gaussians | steps | mean PSNR dB | least | s per image, mean | median |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    kinds: dict[str, Callable[[NDArray[np.uint8], int], FitResult | GrowthResult]] = {}
    for patch_size in arguments.patch_size or ([] if arguments.gaussians else [4]):
        kinds[f"grid, patch {patch_size}"] = partial(_fit, patch_size=patch_size, threads=arguments.threads)
    for budget in arguments.gaussians:
        kinds[f"growing to {budget}"] = partial(_grow, budget=budget, threads=arguments.threads)
    curves = {name: [_measure(name, kind, images, steps) for steps in arguments.steps] for name, kind in kinds.items()}
    if arguments.plot:
        arguments.plot.write_text(_svg(curves))


def _fit(image: NDArray[np.uint8], steps: int, patch_size: int, threads: int) -> FitResult:
    return fit(image, steps, patch_size, threads=threads)


def _grow(image: NDArray[np.uint8], steps: int, budget: int, threads: int) -> GrowthResult:
    return grow(image, budget, steps, threads=threads)


def _measure(
    name: str,
    kind: Callable[[NDArray[np.uint8], int], FitResult | GrowthResult],
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


def _svg(curves: dict[str, list[tuple[float, float]]], width: int = 720, height: int = 440) -> str:
    """Lines of PSNR over seconds, seconds on a logarithmic axis."""
    points = [point for curve in curves.values() for point in curve]
    left, right = np.log10(min(x for x, _ in points)) - 0.05, np.log10(max(x for x, _ in points)) + 0.05
    low, high = np.floor(min(y for _, y in points)) - 1, np.ceil(max(y for _, y in points)) + 1
    margin = 50

    def place(seconds: float, psnr: float) -> tuple[float, float]:
        x = margin + (np.log10(seconds) - left) / (right - left) * (width - 4 * margin)
        return float(x), float(height - margin - (psnr - low) / (high - low) * (height - 2 * margin))

    shapes = []
    for psnr in range(int(low), int(high) + 1, 2):
        (x0, y), (x1, _) = place(10**left, psnr), place(10**right, psnr)
        shapes.append(f'<line x1="{x0:.0f}" y1="{y:.0f}" x2="{x1:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
        shapes.append(f'<text x="{x0 - 8:.0f}" y="{y + 4:.0f}" text-anchor="end">{psnr}</text>')
    for seconds in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50):
        if left <= np.log10(seconds) <= right:
            (x, y0), (_, y1) = place(seconds, low), place(seconds, high)
            shapes.append(f'<line x1="{x:.0f}" y1="{y0:.0f}" x2="{x:.0f}" y2="{y1:.0f}" stroke="#eee"/>')
            shapes.append(f'<text x="{x:.0f}" y="{y0 + 18:.0f}" text-anchor="middle">{seconds:g}</text>')
    for colour, (name, curve) in zip(
        ("#264653", "#2a9d8f", "#e9a23b", "#d1495b", "#6a4c93"), curves.items(), strict=False
    ):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        x, y = place(*curve[-1])
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shapes.append(f'<text x="{x + 6:.0f}" y="{y + 4:.0f}" fill="{colour}">{name}</text>')
    title = "mean PSNR in dB over seconds an image"
    body = "".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/><text x="{margin}" y="24">{title}</text>'
        f"{body}</svg>\n"
    )


if __name__ == "__main__":
    main()
