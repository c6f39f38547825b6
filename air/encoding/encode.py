"""Images to .air files: fit, quantise, refine, and keep a target of bits, of quality or of Gaussians.

    blob = encode(image, bpp=0.25)
    picture = render(decode(blob), height, width)

A file's size depends on how many Gaussians it has and how finely they are stored. Both are worth most where an error
from rounding is a quarter of the error of the fit, whatever the picture (docs/format.md has the measurement), so one of
them follows from the other: the number is searched, and the fineness gives the last percents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from air.codec.bitstream import MOST_STAGES, Header
from air.codec.file import (
    QuantizedStage,
    Stage,
    canonical_parameters,
    compile_decoder,
    corners,
    decoder_is_compiled,
    lay_out,
    patch_size_for,
    quantize_stage,
    with_reach,
    write_stages,
)
from air.codec.sensitivity import SYMBOLS, SensitivityQuantizer, quantize
from air.compute.simd import compiling, is_compiled
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
from air.encoding.refine import Refiner
from air.errors import TargetMissedError
from air.fitting.grow import grow
from air.gaussians import RAW_CHANNELS, activate
from air.optimization.optimize import (
    OptimizeConfig,
    check_counts,
    compile_kernels,
    image_tensor,
    kernels_are_compiled,
    optimize,
)
from air.predictor.base import Predictor, load_predictor
from air.stages.loop import run_stages

ROUNDING_SHARE = 0.25
"""The squared error that rounding may add, as a share of the fit's."""

_LEAST_PIXELS_PER_GAUSSIAN = 3

_BITS_PER_GAUSSIAN = 31  # a first guess
_OCTAVES_PER_DECIBEL = 1 / 3  # of Gaussians: another one
_MOST_FITS = 5
_NEAR = 0.06  # a fit this near to its target is made to meet it by its fineness
_NEAR_DECIBELS = 0.25
_STEPS = (16, 1 << 23)  # finest and coarsest quantiser steps
_BISECTIONS = 9


ENCODER_COMPILE_SECONDS = 20
"""About how long `compile_encoder` takes once per machine and version; from then on, under a second."""


def compile_encoder() -> None:
    """Compiles what fits, refines and stores Gaussians, or loads it from numba's cache on disk."""
    compile_kernels()
    compile_decoder()
    none, nowhere = np.zeros((SYMBOLS, 0)), np.zeros((2, 0), np.int64)
    with compiling([quantize]):
        quantize(none, nowhere, 1, 1, SensitivityQuantizer(1).weights(), np.zeros((0, SYMBOLS), np.int32))


def encoder_is_compiled() -> bool:
    """Whether the compiled kernels are in numba's cache on disk (or loaded), so that `compile_encoder` is quick."""
    return kernels_are_compiled() and decoder_is_compiled() and is_compiled(quantize)


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
    """An .air file of an image: Gaussians that a predictor or `air.grow` gives, refined as they are stored.

    Without a target, the default is the shipped predictor, the quickest way to a good picture. With one, it is to grow
    Gaussians, which gives more decibels for the same bits (docs/format.md has the measurement).

    Args:
        image: As for `air.optimization.optimize.fit`.
        predictor: What to start from: "grow", to fit from scratch; "compact", "grid" or the path of a checkpoint (see
            `air.predictor.base.load_predictor`); or a predictor, on the CPU.
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

        def fit(count: int | None) -> _Fit:
            if start is None:
                assert count is not None
                return _grown(pixels, count, steps, stored_steps, workers)
            assert stages is not None
            return _predicted(pixels, start, stages, count, steps, stored_steps, workers)

        return _meet(pixels, fit, bpp, psnr, gaussians)


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
    fit: Callable[[int | None], _Fit],
    bpp: float | None,
    psnr: float | None,
    gaussians: int | None,
) -> bytes:
    """The file that meets the target, of which there is one at most; `fit` takes the number of Gaussians."""
    if sum(target is not None for target in (bpp, psnr, gaussians)) > 1:
        raise ValueError("give one target: bpp, psnr or gaussians")
    for name, target in (("bpp", bpp), ("psnr", psnr)):
        if target is not None and not 0 < target < math.inf:
            raise ValueError(f"{name} must be a positive number, got {target}")
    if gaussians is not None:
        check_counts(gaussians=(gaussians, 1))
    compile_encoder()
    search = _Search(pixels, fit)
    if bpp is not None:
        return search.for_size(math.floor(bpp * pixels[0].size / 8))
    if psnr is not None:
        return search.for_quality(10 ** (-psnr / 10))
    return search.fit(gaussians).file()


def _grown(pixels: NDArray[np.float32], count: int, steps: int, stored_steps: int, workers: Workers) -> _Fit:
    """Free Gaussians from `air.grow`, laid out in stages."""
    _, height, width = pixels.shape
    result = grow(torch.from_numpy(pixels), count, steps, backend="cpu", device="cpu", threads=workers.count)
    patch_size = patch_size_for(count, height, width)
    while True:
        stages = lay_out(result.gaussians, height, width, patch_size)
        if len(stages) <= MOST_STAGES or patch_size == 1:
            break
        patch_size = patch_size // 2
    return _Fit(stages[:MOST_STAGES], patch_size, float(result.trajectory.psnr[-1]), pixels, stored_steps, workers)


def _predicted(
    pixels: NDArray[np.float32],
    predictor: Predictor,
    num_stages: int,
    count: int | None,
    steps: int,
    stored_steps: int,
    workers: Workers,
) -> _Fit:
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
    return _Fit(stages, predictor.patch_size, float(result.trajectory.psnr[-1]), pixels, stored_steps, workers)


class _Fit:
    """Gaussians in stages, refined for a quantiser, ready to be stored with that one or another.

    Args:
        stages: The Gaussians.
        patch_size: Pixels between the anchors.
        psnr: Of their picture, in dB; the quantiser follows from it.
        pixels: The image, shape (3, height, width).
        stored_steps: Steps on the quantised Gaussians.
        workers: The threads to use.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        patch_size: int,
        psnr: float,
        pixels: NDArray[np.float32],
        stored_steps: int,
        workers: Workers,
    ) -> None:
        _, height, width = pixels.shape
        squared_error = 10 ** (-min(psnr, 60.0) / 10)
        self._patches = [stage.patch for stage in stages]
        parameters = [canonical_parameters(stage.gaussians) for stage in stages]
        # Rounding eight numbers each adds π Δ²/12 times three channels for each number: see `air.codec.sensitivity`.
        count = max(1, sum(map(len, self._patches)))
        added_per_step = count * 8 * math.pi / 12 / (height * width)
        self.step = round(65536 * math.sqrt(ROUNDING_SHARE * squared_error / added_per_step))
        self.step = min(max(self.step, _STEPS[0]), _STEPS[1])
        header = Header(height, width, patch_size, 0, SensitivityQuantizer(self.step))
        self._header = with_reach(header, parameters, self._patches)
        corner = [corners(self._header, patch) for patch in self._patches]
        self._refiner = Refiner(
            np.concatenate([np.zeros((8, 0)), *parameters], axis=1),
            np.concatenate([np.zeros((2, 0), np.int64), *corner], axis=1),
            self._header.reach_span,
            pixels,
            workers,
        )
        self._refiner.run(SensitivityQuantizer(self.step), stored_steps)

    def file(self, step: int | None = None) -> bytes:
        """The file with the step it was refined for, or another."""
        header = replace(self._header, quantizer=SensitivityQuantizer(step or self.step))
        cuts = np.cumsum([len(patch) for patch in self._patches])[:-1]
        parameters: list[NDArray[np.float64]] = np.split(self._refiner.parameters, cuts, axis=1)
        stages: list[QuantizedStage] = [
            quantize_stage(header, patch, np.ascontiguousarray(own))
            for patch, own in zip(self._patches, parameters, strict=False)
        ]
        return write_stages(header, stages)

    def squared_error(self, step: int | None = None) -> float:
        """The mean squared error of that file's picture, clamped to [0, 1]."""
        return self._refiner.squared_error(SensitivityQuantizer(step or self.step))


class _Search:
    """Looks for the fit that meets a target, with a bounded number of fits."""

    def __init__(self, pixels: NDArray[np.float32], fit: Callable[[int | None], _Fit]) -> None:
        self.pixels = pixels
        self.most = max(1, pixels[0].size // _LEAST_PIXELS_PER_GAUSSIAN)
        self._fit = fit

    def fit(self, count: int | None) -> _Fit:
        return self._fit(None if count is None else min(max(count, 1), self.most))

    def for_size(self, size: int) -> bytes:
        """The best file of at most `size` bytes.

        Raises:
            TargetMissedError: There is none.
        """
        count = min(max(1, size * 8 // _BITS_PER_GAUSSIAN), self.most)
        for _ in range(_MOST_FITS):
            fit = self.fit(count)
            reached = len(fit.file())
            if not size or abs(reached / size - 1) <= _NEAR:
                break
            better = min(max(1, round(count * size / reached)), self.most)
            if better == count:
                break
            count = better
        step = _finest(fit.step, lambda step: len(fit.file(step)) <= size)
        if step is None:
            least = len(fit.file(_STEPS[1]))
            raise TargetMissedError(f"{size} bytes are too few for this image: the smallest file has {least}")
        return fit.file(step)

    def for_quality(self, squared_error: float) -> bytes:
        """A small file whose picture has at most this mean squared error.

        Raises:
            TargetMissedError: No fit reached it.
        """
        count = min(max(1, self.pixels[0].size // (2 * PIXELS_PER_GAUSSIAN)), self.most)
        tried: list[tuple[float, float]] = []  # (log2 of the number, decibels above the target)
        best: _Fit | None = None
        for _ in range(_MOST_FITS):
            fit = self.fit(count)
            excess = 10 * math.log10(squared_error / max(fit.squared_error(), 1e-12))
            tried.append((math.log2(count), excess))
            if best is None or abs(excess) < abs(10 * math.log10(squared_error / max(best.squared_error(), 1e-12))):
                best = fit
            if abs(excess) <= _NEAR_DECIBELS:
                break
            better = min(max(1, round(2 ** _where_zero(tried))), self.most)
            if better == count:
                break
            count = better
        assert best is not None
        step = _coarsest(best.step, lambda step: best.squared_error(step) <= squared_error)
        if step is None:
            reached = -10 * math.log10(best.squared_error(_STEPS[0]))
            raise TargetMissedError(
                f"{-10 * math.log10(squared_error):.2f} dB were not reached: the best of {len(tried)} fits has "
                f"{reached:.2f} dB; try more steps"
            )
        return best.file(step)


def _where_zero(tried: list[tuple[float, float]]) -> float:
    """Where a line through the last two points meets zero; with one point, or an odd slope, the usual slope."""
    place, excess = tried[-1]
    slope = 1 / _OCTAVES_PER_DECIBEL
    if len(tried) > 1 and place != tried[-2][0]:
        measured = (excess - tried[-2][1]) / (place - tried[-2][0])
        slope = min(max(measured, slope / 2), slope * 3)
    return place - min(max(excess / slope, -3.0), 3.0)


def _finest(start: int, fits: Callable[[int], bool]) -> int | None:
    """The smallest quantiser step that fits, searched around `start`; None if even the coarsest does not."""
    return _bisect(start, fits, finer_is_better=True)


def _coarsest(start: int, fits: Callable[[int], bool]) -> int | None:
    """The largest quantiser step that fits, searched around `start`; None if even the finest does not."""
    return _bisect(start, fits, finer_is_better=False)


def _bisect(start: int, fits: Callable[[int], bool], *, finer_is_better: bool) -> int | None:
    """A step that fits and is near the border to those that do not. Steps are compared as ratios."""
    safe, better = _STEPS if not finer_is_better else _STEPS[::-1]
    if fits(start):
        safe, better = start, round(min(max(start * (0.25 if finer_is_better else 4), _STEPS[0]), _STEPS[1]))
        if fits(better):
            return better
    else:
        better = start
        if not fits(safe):
            return None
    for _ in range(_BISECTIONS):
        middle = round(math.sqrt(safe * better))
        if middle in (safe, better):
            break
        if fits(middle):
            safe = middle
        else:
            better = middle
    return safe
