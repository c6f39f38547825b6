"""PSNR and time of fits from a plain grid, over a directory of images.

    python benchmarks/fit_kodak.py DIR --patch-size 4 --steps 20 50 100

Every number of steps is a separate fit, since the learning rates fall towards its end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from air.optimize import compile_kernels, fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="PNG images, for example the 24 of Kodak")
    parser.add_argument("--patch-size", type=int, nargs="+", default=[4])
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 20, 50, 100])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    paths = sorted(arguments.directory.glob("*.png"))
    if not paths:
        parser.error(f"no PNG images in {arguments.directory}")
    torch.set_num_threads(arguments.threads)
    compile_kernels()
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    print(f"{len(images)} images, {arguments.threads} thread(s)")
    print("| patch | Gaussians | steps | mean PSNR dB | least | s per image, mean | median |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for patch_size in arguments.patch_size:
        for steps in arguments.steps:
            results = [fit(image, steps, patch_size, threads=arguments.threads) for image in images]
            quality = np.array([result.trajectory.psnr[-1] for result in results])
            seconds = np.array([result.seconds for result in results])
            count = round(np.mean([len(result.gaussians) for result in results]))
            print(
                f"| {patch_size} | {count} | {steps} | {quality.mean():.2f} | {quality.min():.2f} "
                f"| {seconds.mean():.2f} | {np.median(seconds):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
