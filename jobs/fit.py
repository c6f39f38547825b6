"""Fits Gaussians to one image, shows the progress, and writes the render as PNG.

air fit photo.jpg fitted.png --steps 200 --patch-size 4
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from air.defaults import ADAM, AUTO, FIT_STEPS, SHIPPED
from jobs.command import configure, make_parser
from jobs.display import live_console
from jobs.sections import FitConfig
from pipeline.errors import Rejected, StorageError
from pipeline.formats import images
from pipeline.inputs.sources import find_file

if TYPE_CHECKING:
    from air.optimization.config import OptimizeConfig


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("fit", __doc__, FitConfig)
    parser.add_argument("image", metavar="IMAGE", help="image file; a local path or a URI")
    parser.add_argument(
        "out", nargs="?", metavar="OUT.png", help="the render (default: IMAGE-fitted.png in the current folder)"
    )
    given = parser.parse_args(arguments)
    (config,) = configure(given, fit=FitConfig)
    storage, name = find_file(given.image)
    target = given.out or f"{os.path.splitext(name)[0]}-fitted.png"
    if not target.lower().endswith(".png"):
        parser.error(f"{target}: the render is written as PNG; give it a name that ends in .png")
    if config.gaussians and config.patch_size:
        parser.error("give --gaussians or --patch-size, not both: a grid's size follows from its patches")
    if config.seconds and (config.steps is not None or config.patch_size):
        parser.error("give --seconds without --steps and --patch-size: the steps follow from it, for a growing fit")
    try:
        rgb = images.decode(storage.read(name), max_pixels=config.max_pixels)
    except Rejected as rejection:
        raise StorageError(f"{given.image} cannot be used: {rejection}") from None
    if config.rule in (AUTO, ADAM, SHIPPED):
        fit_image(rgb, target, config)
        return 0
    from pipeline.rules.reference import find_rule, local_rule

    with local_rule(find_rule(config.rule).name) as path:
        fit_image(rgb, target, config.model_copy(update={"rule": str(path)}))
    return 0


def fit_image(rgb: np.ndarray, target: str, config: FitConfig) -> None:
    """Fits, shows progress on a terminal, writes the render and prints the PSNR that was reached.

    Args:
        rgb: The image, shape (H, W, 3), uint8.
        target: Path of the PNG file.
        config: How to fit.

    Raises:
        StorageError: The PNG file cannot be written.
    """
    from air.arguments import to_levels
    from air.compute.backends import choose_device
    from air.fitting.fit import fit
    from air.rendering.render import render
    from air.warmup import warm_up

    if config.backend in ("auto", "cpu") and choose_device(config.device).type == "cpu":
        warm_up("fit", lambda line: print(line, flush=True))
    console = live_console()
    columns = (
        TextColumn("fit"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=console is None) as progress:
        task = progress.add_task("", total=config.steps if config.seconds is None else None)
        shown = 0.0

        def on_step(step: int, loss: float, psnr: float) -> None:
            nonlocal shown
            if time.monotonic() - shown > 0.1:
                shown = time.monotonic()
                progress.update(task, completed=step, description=f"loss {loss:.4f}, {psnr:.2f} dB")

        result = fit(
            rgb,
            config.steps,
            seconds=config.seconds,
            num_gaussians=config.gaussians,
            patch_size=config.patch_size,
            optimization=_scaled(config),
            rule=config.rule if config.learning_rate_factor == 1 else AUTO,
            backend=config.backend,
            device=config.device,
            threads=config.threads or os.cpu_count() or 1,
            on_step=on_step,
        )
    steps = len(result.trajectory.psnr) - 1
    drawn_by = "reference" if config.backend == "reference" else "auto"  # the result is on the CPU again
    picture = render(result.gaussians, result.height, result.width, backend=drawn_by)
    try:
        Image.fromarray(to_levels(picture)).save(target)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from None
    first, last = result.trajectory.psnr[0], result.trajectory.psnr[-1]
    print(
        f"{result.width} x {result.height} pixels, {len(result.gaussians):,} Gaussians, {steps} steps in "
        f"{result.seconds:.2f} s: {first:.2f} dB -> {last:.2f} dB\n{target}"
    )


def _scaled(config: FitConfig) -> OptimizeConfig | None:
    """The optimiser's settings with scaled learning rates; None for the usual ones."""
    from air.optimization.config import OptimizeConfig
    from air.optimization.settings import fit_optimization

    if config.learning_rate_factor == 1:
        return None
    steps = FIT_STEPS if config.steps is None else config.steps
    usual = OptimizeConfig() if config.patch_size else fit_optimization(steps, config.rule)
    return usual.scaled(config.learning_rate_factor)
