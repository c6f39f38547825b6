"""Encodes images as .air files: fits Gaussians, quantises and refines them, and meets a target of bits or quality.

    blob = encode(image, bpp=0.25)
    picture = render(decode(blob), height, width)

The size of a file depends on the number of Gaussians and on the fineness of the quantiser. A given size holds the best
picture if rounding adds a quarter of the fit's squared error, for all pictures measured (docs/format.md). The number of
Gaussians therefore decides the fineness. `air.encoding.search` searches for the number, then adjusts the fineness to
gain the last percents, and refines the Gaussians for the fineness that is stored.
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
from air.codec.symbols import Stage, lay_out, patch_size_for
from air.compute.compile import KernelSet
from air.compute.threads import Workers, limit_torch
from air.defaults import (
    COMPACT,
    GRID,
    GRID_STAGES,
    GROW,
    GROWING_STEPS,
    PIXELS_PER_STORED_GAUSSIAN,
    STEPS_AFTER_PREDICTION,
    STORED_STEPS,
    start_of_encoding,
)
from air.encoding.search import Fit, Search
from air.fitting.fit import fit
from air.gaussians import activate
from air.optimization.optimize import optimize
from air.optimization.settings import refinement
from air.predictor.base import Predictor
from air.predictor.load import load_predictor
from air.stages.loop import all_predicted, stage_kernels
from air.stages.predict import predict


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
    """Encodes an image as an .air file: Gaussians from a predictor or from `air.fit`, refined in their quantised form.

    Without a target, the default is the shipped predictor, which is fastest. With a target, the default is to grow
    Gaussians, which gives more decibels for the same bits (docs/format.md has the measurement).

    Args:
        image: As for `air.fitting.fit.fit`.
        predictor: The source of the Gaussians: "grow" for a fit within a budget; "compact", "grid" or the path of a
            checkpoint (see `air.predictor.load.load_predictor`); or a predictor, on the CPU.
        stages: Largest number of stages of a predictor; all that it has if not given.
        bpp: Target: largest number of bits per pixel, the whole file counted. At most one target may be given.
        psnr: Target: least PSNR in dB of the decoded picture, clamped to [0, 1].
        gaussians: Target: largest number of Gaussians. Without a target, growing takes one for every 48 pixels, and a
            predictor one for every patch that its stages find bad.
        steps: Steps on all Gaussians together in each fit; a target of bits or decibels takes two to five fits. By
            default 150 for a growing fit and 10 after a prediction.
        stored_steps: Steps on the quantised Gaussians, each time that they are refined for a fineness.
        threads: CPU threads at most. The file does not depend on it: torch and predicting networks take one thread.

    Raises:
        ValueError: More than one target was given, a target or count is out of range, or stages were given without a
            predictor.
        TargetMissedError: The target cannot be met.
        CodecError: The format cannot hold the image.
        CheckpointError: There is no such predictor.
        InvalidGaussiansError: A predicted number is not finite.

    Example:
        >>> import torch
        >>> import air
        >>> image = torch.linspace(0, 1, 48).expand(3, 32, 48)
        >>> blob = air.encode(image, bpp=2.0, steps=20, stored_steps=10)
        >>> 8 * len(blob) / (32 * 48) <= 2.0
        True
    """
    has_target = any(target is not None for target in (bpp, psnr, gaussians))
    start = _find_start(predictor, has_target)
    if start is None and stages is not None:
        raise ValueError(f"stages = {stages} needs a predictor: name one, such as predictor='compact'")
    if steps is None:
        steps = GROWING_STEPS if start is None else STEPS_AFTER_PREDICTION
    check_counts(steps=(steps, 0), stored_steps=(stored_steps, 0), threads=(threads, 1))
    if stages is not None:
        check_counts(stages=(stages, 1))
    pixels = image_tensor(image).float().cpu().contiguous().numpy()
    if start is None and not has_target:
        gaussians = max(1, pixels[0].size // PIXELS_PER_STORED_GAUSSIAN)
    if start is not None and stages is None:
        stages = getattr(start, "num_stages", GRID_STAGES)  # networks have the number that they were trained for
    # Sums in another order would make another file on another machine.
    with limit_torch(1), Workers(threads) as workers:

        def make(count: int | None) -> Fit:
            if start is None:
                assert count is not None
                return fit_grown(pixels, count, steps, stored_steps, workers)
            assert stages is not None
            return fit_predicted(pixels, start, stages, count, steps, stored_steps, workers)

        return _meet(pixels, make, bpp, psnr, gaussians)


def _find_start(predictor: Predictor | str | Path | None, has_target: bool) -> Predictor | None:
    """The predictor, or None for a growing fit."""
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
    """The file that meets the one target, if one is given. `make` makes a fit of at most a number of Gaussians."""
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
    return search.fit(gaussians).refined_file()


def fit_grown(pixels: NDArray[np.float32], count: int, steps: int, stored_steps: int, workers: Workers) -> Fit:
    """A fit of `count` free Gaussians by `air.fit`, laid out in stages."""
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


def fit_predicted(
    pixels: NDArray[np.float32],
    predictor: Predictor,
    num_stages: int,
    count: int | None,
    steps: int,
    stored_steps: int,
    workers: Workers,
) -> Fit:
    """A fit that a predictor starts: the Gaussians of all its stages are optimised together."""
    image = torch.from_numpy(pixels)
    found = predict(image, predictor, num_stages, budget=count, backend="cpu", threads=1)
    raw, anchor = all_predicted(found)
    result = optimize(
        raw,
        anchor,
        image,
        predictor.patch_size,
        refinement(steps),
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
    """The kernels that encoding runs on the CPU: of fits, predictions, refinement and the file."""

    def use_each() -> None:
        none, nowhere = np.zeros((SYMBOLS, 0)), np.zeros((2, 0), np.int64)
        quantize(none, nowhere, 1, 1, SensitivityQuantizer(1).weights(), np.zeros((0, SYMBOLS), np.int32))

    return stage_kernels() + file.KERNELS + KernelSet((quantize,), use_each, seconds=1)
