"""Searches for the fit that meets a target of bits or decibels, with a bounded number of fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from air.codec.bitstream import Header
from air.codec.file import write_stages
from air.codec.sensitivity import STEP_UNITS, SensitivityQuantizer
from air.codec.symbols import QuantizedStage, Stage, canonical_parameters, corners, quantize_stage, with_reach
from air.compute.threads import Workers
from air.defaults import PIXELS_PER_STORED_GAUSSIAN
from air.encoding.refine import Refiner
from air.errors import TargetMissedError

ROUNDING_FRACTION = 0.25
"""The squared error that rounding may add, as a fraction of the fit's."""

_MIN_PIXELS_PER_GAUSSIAN = 3

# First guesses: a file's bits per Gaussian, and log2 of the factor on the number of Gaussians that gains one decibel.
_BITS_PER_GAUSSIAN = 31
_OCTAVES_PER_DECIBEL = 1 / 3

_MAX_FITS = 5

# Once a fit is this near to its target, a fraction of the size or decibels, only its quantiser's step is adjusted.
_NEAR = 0.06
_NEAR_DECIBELS = 0.25

_STEPS = (16, 1 << 23)  # finest and coarsest quantiser steps

# Refined Gaussians fit one step of the quantiser and no other (docs/codec.md), so the step is settled first. Refining
# makes a file a little smaller, so the first step to refine for is finer than the one that fits without.
_MAX_REFINEMENTS = 3
_FINER = 0.97
_STEP_BY_SIZE = 2.7  # log of the step that changes the log of a file's size by -1
_FULL, _AIM = 0.996, 0.998  # of the size: enough, and what the next step aims at
_LOG_ERROR_BY_LOG_STEP = 0.4
_AIM_ERROR = 0.998  # of the squared error
_BISECTIONS = 9


class Fit:
    """Gaussians in stages. They can be stored with any quantiser's step, and refined for one.

    Args:
        stages: The Gaussians.
        patch_size: Pixels between the anchors.
        psnr: PSNR of their picture in dB, from which the quantiser's step follows.
        pixels: The image, shape (3, height, width).
        stored_steps: Steps on the quantised Gaussians.
        workers: The threads to use.

    Attributes:
        step: The quantiser's step whose rounding adds `ROUNDING_FRACTION` of the fit's squared error.
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
        # Each of a Gaussian's eight numbers adds π Δ²/12 when rounded (`air.codec.sensitivity`), summed over channels.
        count = max(1, sum(map(len, self._patches)))
        added_per_step = count * 8 * math.pi / 12 / (height * width)
        self.step = round(STEP_UNITS * math.sqrt(ROUNDING_FRACTION * squared_error / added_per_step))
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
        self._stored_steps = stored_steps
        self._refined: tuple[int, NDArray[np.float64]] | None = None

    def refine(self, step: int) -> None:
        """Refines the Gaussians for a quantiser's step, where `file` and `squared_error` then use them."""
        if self._refined is None or self._refined[0] != step:
            self._refined = step, self._refiner.run(SensitivityQuantizer(step), self._stored_steps)

    def _parameters(self, step: int) -> NDArray[np.float64]:
        if self._refined is not None and self._refined[0] == step:
            return self._refined[1]
        return self._refiner.start

    def file(self, step: int) -> bytes:
        """The file with a quantiser's step."""
        header = replace(self._header, quantizer=SensitivityQuantizer(step))
        cuts = np.cumsum([len(patch) for patch in self._patches])[:-1]
        parameters: list[NDArray[np.float64]] = np.split(self._parameters(step), cuts, axis=1)
        stages: list[QuantizedStage] = [
            quantize_stage(header, patch, np.ascontiguousarray(own))
            for patch, own in zip(self._patches, parameters, strict=False)  # np.split gives one part for no stages
        ]
        return write_stages(header, stages)

    def squared_error(self, step: int) -> float:
        """The mean squared error of that file's picture, clamped to [0, 1]."""
        return self._refiner.squared_error(self._parameters(step), SensitivityQuantizer(step))

    def refined_file(self) -> bytes:
        """The file of the Gaussians refined for `step`."""
        self.refine(self.step)
        return self.file(self.step)

    def refined_for_size(self, size: int) -> bytes:
        """The best file found of at most `size` bytes, of Gaussians that are refined for its quantiser's step.

        Raises:
            TargetMissedError: Every file is larger.
        """
        safe = _finest(self.step, lambda step: len(self.file(step)) <= size)
        if safe is None:
            least = len(self.file(_STEPS[1]))
            raise TargetMissedError(f"{size} bytes are too few for this image: the smallest file has {least}")
        best, least_error = self.file(safe), self.squared_error(safe)
        step = _allowed(safe * _FINER)
        for _ in range(_MAX_REFINEMENTS):
            self.refine(step)
            blob, error = self.file(step), self.squared_error(step)
            if len(blob) <= size and error < least_error:
                best, least_error = blob, error
            if _FULL * size <= len(blob) <= size:
                break
            step = _allowed(step * (len(blob) / (_AIM * size)) ** _STEP_BY_SIZE)
        return best

    def refined_for_quality(self, squared_error: float) -> bytes | None:
        """A small file with at most this mean squared error, of Gaussians refined for its step; None if all miss it."""
        best: bytes | None = None
        step, slope = self.step, _LOG_ERROR_BY_LOG_STEP
        known: tuple[int, float] | None = None
        for _ in range(_MAX_REFINEMENTS + 1):
            self.refine(step)
            error = max(self.squared_error(step), 1e-12)
            if error <= squared_error:
                blob = self.file(step)
                best = blob if best is None or len(blob) < len(best) else best
                if error >= _AIM_ERROR**2 * squared_error:
                    break
            if known is not None and known[0] != step:
                measured = math.log(error / known[1]) / math.log(step / known[0])
                slope = min(max(measured, slope / 2), slope * 2)
            known = step, error
            factor = (_AIM_ERROR * squared_error / error) ** (1 / slope)
            step = _allowed(step * min(max(factor, 0.25), 4.0))
        if best is not None:
            return best
        safe = _coarsest(self.step, lambda step: self.squared_error(step) <= squared_error)
        return None if safe is None else self.file(safe)


class Search:
    """Finds the fit that meets a target, with a bounded number of fits.

    Args:
        pixels: The image, shape (3, height, width).
        fit: Makes a fit of at most a number of Gaussians; None for no limit.
    """

    def __init__(self, pixels: NDArray[np.float32], fit: Callable[[int | None], Fit]) -> None:
        self.pixels = pixels
        self.max_gaussians = max(1, pixels[0].size // _MIN_PIXELS_PER_GAUSSIAN)
        self._fit = fit

    def fit(self, count: int | None) -> Fit:
        """A fit of at most `count` Gaussians, but no more than the image may have; None for no limit."""
        return self._fit(None if count is None else min(max(count, 1), self.max_gaussians))

    def for_size(self, size: int) -> bytes:
        """The best file found of at most `size` bytes.

        Raises:
            TargetMissedError: Every file is larger.
        """
        count = min(max(1, size * 8 // _BITS_PER_GAUSSIAN), self.max_gaussians)
        for _ in range(_MAX_FITS):
            fit = self.fit(count)
            reached = len(fit.file(fit.step))
            if not size or abs(reached / size - 1) <= _NEAR:
                break
            better = min(max(1, round(count * size / reached)), self.max_gaussians)
            if better == count:
                break
            count = better
        return fit.refined_for_size(size)

    def for_quality(self, squared_error: float) -> bytes:
        """A small file whose picture has at most this mean squared error.

        Raises:
            TargetMissedError: No fit reached it.
        """
        count = min(max(1, self.pixels[0].size // (2 * PIXELS_PER_STORED_GAUSSIAN)), self.max_gaussians)
        tried: list[tuple[float, float]] = []  # (log2 of the number, decibels above the target)
        best: Fit | None = None
        for _ in range(_MAX_FITS):
            fit = self.fit(count)
            fit.refine(fit.step)
            excess = 10 * math.log10(squared_error / max(fit.squared_error(fit.step), 1e-12))
            if not tried or abs(excess) < min(abs(other) for _, other in tried):
                best = fit
            tried.append((math.log2(count), excess))
            if abs(excess) <= _NEAR_DECIBELS:
                break
            better = min(max(1, round(2 ** _where_zero(tried))), self.max_gaussians)
            if better == count:
                break
            count = better
        assert best is not None
        blob = best.refined_for_quality(squared_error)
        if blob is None:
            reached = -10 * math.log10(best.squared_error(_STEPS[0]))
            raise TargetMissedError(
                f"{-10 * math.log10(squared_error):.2f} dB were not reached: the best of {len(tried)} fits has "
                f"{reached:.2f} dB; try more steps"
            )
        return blob


def _allowed(step: float) -> int:
    """The nearest step that a quantiser may have."""
    return min(max(round(step), _STEPS[0]), _STEPS[1])


def _where_zero(tried: list[tuple[float, float]]) -> float:
    """Where the line through the last two points is zero.

    With one point the slope is the usual one. A measured slope is clamped to half to three times the usual one.
    """
    place, excess = tried[-1]
    slope = 1 / _OCTAVES_PER_DECIBEL
    if len(tried) > 1 and place != tried[-2][0]:
        measured = (excess - tried[-2][1]) / (place - tried[-2][0])
        slope = min(max(measured, slope / 2), slope * 3)
    return place - min(max(excess / slope, -3.0), 3.0)


def _finest(start: int, fits: Callable[[int], bool]) -> int | None:
    """The smallest quantiser step that fits, searched around `start`; None if even the coarsest does not fit."""
    return _bisect(start, fits, finer_is_better=True)


def _coarsest(start: int, fits: Callable[[int], bool]) -> int | None:
    """The largest quantiser step that fits, searched around `start`; None if even the finest does not fit."""
    return _bisect(start, fits, finer_is_better=False)


def _bisect(start: int, fits: Callable[[int], bool], *, finer_is_better: bool) -> int | None:
    """A step that fits, near the border to steps that do not. The bisection halves ratios of steps, not differences."""
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
