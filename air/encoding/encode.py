"""Images to .air files: fit, quantise, refine, and keep a target of bits, of quality or of Gaussians.

    blob = encode(image, bpp=0.25)
    picture = render(decode(blob), height, width)

A file's size depends on how many Gaussians it has and how finely they are stored. Both are worth most where an error
from rounding is a quarter of the error of the fit, whatever the picture (docs/format.md has the measurement), so one of
them follows from the other: the number is searched, and the fineness gives the last percents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from air.arguments import check_counts, image_tensor
from air.codec import file
from air.codec.bitstream import MAX_STAGES
from air.codec.sensitivity import SYMBOLS, SensitivityQuantizer, quantize
from air.codec.symbols import (
    Stage,
    lay_out,
    patch_size_for,
)
from air.compute.compile import KernelSet
from air.compute.threads import Workers
from air.defaults import (
    COMPACT,
    GRID,
    GRID_STAGES,
    GROW,
    GROWING_STEPS,
    PIXELS_PER_GAUSSIAN,
    STEPS_AFTER_PREDICTION,
    STORED_STEPS,
    start_of_encoding,
)
from air.encoding.search import Fit, Search
from air.fitting.fit import fit
from air.gaussians import RAW_CHANNELS, activate
from air.optimization.optimize import OptimizeConfig, optimize
from air.predictor.base import Predictor
from air.predictor.load import load_predictor
from air.stages.loop import run_stages, stage_kernels


def encode(
    image: Any,
    *,
    predictor: Predictor | str | Path | None = None,
    stages: int | None = None,
    bpp: float | None = None,
    psnr: float | None = None,
    gaussians: int | None = None,
    steps: int | None = None,
    stored_steps: int = STORED_STEPS,
    threads: int = 1,
) -> bytes:
    """An .air file of an image: Gaussians that a predictor or `air.fit` gives, refined as they are stored.

    Without a target, the default is the shipped predictor, the quickest way to a good picture. With one, it is to grow
    Gaussians, which gives more decibels for the same bits (docs/format.md has the measurement).

    Args:
        image: As for `air.fitting.fit.fit`.
        predictor: What to start from: "grow", to fit from scratch; "compact", "grid" or the path of a checkpoint (see
            `air.predictor.load.load_predictor`); or a predictor, on the CPU.
        stages: Of a predictor, at most; all that it has if not given.
        bpp: Target: at most so many bits per pixel, the whole file counted. One target at most.
        psnr: Target: at least so many decibels, of the decoded picture clamped to [0, 1].
        gaussians: Target: at most so many Gaussians. Without any, growing takes one for every 48 pixels, and a
            predictor as many as its stages ask for.
        steps: On all Gaussians together, in each fit; a target of bits or decibels takes two to five fits. By default
            150 to grow, and 10 after a prediction.
        stored_steps: Steps on the quantised Gaussians after each fit.
        threads: CPU threads at most; a predicting network takes those of torch (`torch.set_num_threads`). A file of
            grown Gaussians does not depend on it.

    Raises:
        ValueError: More than one target, or one that means nothing; or stages of no predictor.
        TargetMissedError: The target cannot be met.
        CodecError: The format cannot hold the image.
        CheckpointError: There is no such predictor.
        InvalidGaussiansError: What was predicted is not finite.
    """
    has_target = any(target is not None for target in (bpp, psnr, gaussians))
    start = _find_start(predictor, has_target)
    if start is None and stages is not None:
        raise ValueError(f"stages = {stages} is about a predictor: name one, such as predictor='compact'")
    if steps is None:
        steps = GROWING_STEPS if start is None else STEPS_AFTER_PREDICTION
    check_counts(steps=(steps, 0), stored_steps=(stored_steps, 0), threads=(threads, 1))
    if stages is not None:
        check_counts(stages=(stages, 1))
    pixels = image_tensor(image).float().cpu().contiguous().numpy()
    if start is None and not has_target:
        gaussians = max(1, pixels[0].size // PIXELS_PER_GAUSSIAN)
    if start is not None and stages is None:
        stages = getattr(start, "num_stages", GRID_STAGES)  # networks say how many they were trained for
    with Workers(threads) as workers:

        def make(count: int | None) -> Fit:
            if start is None:
                assert count is not None
                return _grown(pixels, count, steps, stored_steps, workers)
            assert stages is not None
            return _predicted(pixels, start, stages, count, steps, stored_steps, workers)

        return _meet(pixels, make, bpp, psnr, gaussians)


def _find_start(predictor: Predictor | str | Path | None, has_target: bool) -> Predictor | None:
    """The predictor to start from; None to grow."""
    if predictor is None:
        predictor = start_of_encoding(has_target)
    if predictor == GROW:
        return None
    if predictor == COMPACT:
        return _shipped()
    return load_predictor(predictor, others=(GROW, GRID)) if isinstance(predictor, (str, Path)) else predictor


@lru_cache(maxsize=1)
def _shipped() -> Predictor:
    return load_predictor(COMPACT)


def _meet(
    pixels: NDArray[np.float32],
    make: Callable[[int | None], Fit],
    bpp: float | None,
    psnr: float | None,
    gaussians: int | None,
) -> bytes:
    """The file that meets the target, of which there is one at most; `make` takes the number of Gaussians."""
    if sum(target is not None for target in (bpp, psnr, gaussians)) > 1:
        raise ValueError("give one target: bpp, psnr or gaussians")
    for name, target in (("bpp", bpp), ("psnr", psnr)):
        if target is not None and not 0 < target < math.inf:
            raise ValueError(f"{name} must be a positive number, got {target}")
    if gaussians is not None:
        check_counts(gaussians=(gaussians, 1))
    encoder_kernels().compile()
    search = Search(pixels, make)
    if bpp is not None:
        return search.for_size(math.floor(bpp * pixels[0].size / 8))
    if psnr is not None:
        return search.for_quality(10 ** (-psnr / 10))
    return search.fit(gaussians).file()


def _grown(pixels: NDArray[np.float32], count: int, steps: int, stored_steps: int, workers: Workers) -> Fit:
    """Free Gaussians from `air.fit`, laid out in stages."""
    _, height, width = pixels.shape
    image = torch.from_numpy(pixels)
    result = fit(image, steps, num_gaussians=count, backend="cpu", device="cpu", threads=workers.count)
    patch_size = patch_size_for(count, height, width)
    while True:
        stages = lay_out(result.gaussians, height, width, patch_size)
        if len(stages) <= MAX_STAGES or patch_size == 1:
            break
        patch_size = patch_size // 2
    return Fit(stages[:MAX_STAGES], patch_size, float(result.trajectory.psnr[-1]), pixels, stored_steps, workers)


def _predicted(
    pixels: NDArray[np.float32],
    predictor: Predictor,
    num_stages: int,
    count: int | None,
    steps: int,
    stored_steps: int,
    workers: Workers,
) -> Fit:
    """The stages that a predictor gives, moved together."""
    image = torch.from_numpy(pixels)
    found = list(
        run_stages(
            image,
            predictor,
            [OptimizeConfig(steps=0)] * num_stages,
            canvas="predicted",
            budget=count,
            judge=False,
            backend="cpu",
            threads=workers.count,
        )
    )
    raw = torch.cat([stage.predicted for stage in found] or [torch.empty(0, RAW_CHANNELS)])
    anchor = torch.cat([stage.anchor for stage in found] or [torch.empty(0, 2)])
    result = optimize(
        raw,
        anchor,
        image,
        predictor.patch_size,
        OptimizeConfig.refinement(steps),
        backend="cpu",
        threads=workers.count,
    ).unless_worse(raw)
    gaussians = activate(result.raw, anchor, predictor.patch_size)
    ends = np.cumsum([len(stage) for stage in found])
    stages = [
        Stage(stage.patch.numpy(), gaussians[int(end) - len(stage) : int(end)])
        for stage, end in zip(found, ends, strict=True)
    ]
    return Fit(stages, predictor.patch_size, float(result.trajectory.psnr[-1]), pixels, stored_steps, workers)


def encoder_kernels() -> KernelSet:
    """What encoding runs on the CPU: fits, predictions, refinement and the file."""

    def use_each() -> None:
        none, nowhere = np.zeros((SYMBOLS, 0)), np.zeros((2, 0), np.int64)
        quantize(none, nowhere, 1, 1, SensitivityQuantizer(1).weights(), np.zeros((0, SYMBOLS), np.int32))

    return stage_kernels() + file.KERNELS + KernelSet((quantize,), use_each, seconds=1)
