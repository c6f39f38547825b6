"""Optimising Gaussians as they will be stored: each step draws the quantised ones and moves the exact ones.

Rounding is not differentiable, so gradients pass straight through it. What the rounding of one Gaussian spoils, its
neighbours learn to mend. The error is the squared one, which PSNR measures, and the step of each number is in
proportion to the quantiser's there (`air.codec.sensitivity`): a coarse number must move far to matter. The CPU only.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from air.codec.colour import TO_RGB
from air.codec.sensitivity import MAX_SCALE, MIN_SCALE, SYMBOLS, SensitivityQuantizer, dequantize, quantize
from air.compute.planes import FloatArray, image_planes, pixels
from air.compute.threads import Workers
from air.rendering.cpu import Raster

_BETA_1, _BETA_2, _EPS = 0.8, 0.95, 1e-12
RATE = 0.1
"""Adam's step of the strength, in quantiser steps, at first; it falls linearly in the second half."""

_FINAL_SHARE = 0.05
_MAX_SHARE = 0.05  # of a scale, for positions; of e, for scales; of a half turn, for angles


class Refiner:
    """Gaussians of all stages on their way to a file.

    Args:
        parameters: As from `air.codec.symbols.canonical_parameters`, shape (8, N); changed by `run`.
        corner: As from `air.codec.symbols.corners`, shape (2, N).
        span: The range of positions from there, in 64ths of a pixel.
        target: The image, float32 (3, height, width).
        workers: The threads to use.
    """

    def __init__(
        self,
        parameters: NDArray[np.float64],
        corner: NDArray[np.int64],
        span: int,
        target: FloatArray,
        workers: Workers,
    ) -> None:
        _, self._height, self._width = target.shape
        self.parameters = parameters
        self._corner, self._span = corner, span
        self._target = target
        count = parameters.shape[1]
        self._raster = Raster(count, self._height, self._width, workers)
        self._image = image_planes(self._height, self._width)
        self._gradient = image_planes(self._height, self._width)
        self._symbols = np.zeros((count, SYMBOLS), np.int32)
        self._stored = np.empty((SYMBOLS, count))

    def squared_error(self, quantizer: SensitivityQuantizer) -> float:
        """The mean squared error of the picture as it would be stored, clamped to [0, 1]."""
        self._draw(quantizer)
        drawn = pixels(self._image, self._height, self._width)
        return float(np.square(drawn.clip(0, 1) - self._target).mean(dtype=np.float64))

    def run(self, quantizer: SensitivityQuantizer, steps: int) -> None:
        """That many Adam steps."""
        mean = np.zeros_like(self.parameters)
        square = np.zeros_like(self.parameters)
        for step in range(steps):
            self._draw(quantizer)
            slope = self._slope()
            mean += (1 - _BETA_1) * (slope - mean)
            square += (1 - _BETA_2) * (slope * slope - square)
            direction = mean / (1 - _BETA_1 ** (step + 1))
            direction /= np.sqrt(square / (1 - _BETA_2 ** (step + 1))) + _EPS
            share = max(_FINAL_SHARE, min(1.0, 2 * (1 - step / steps)))
            self._move(direction, RATE * share * quantizer.step / 65536)

    def _draw(self, quantizer: SensitivityQuantizer) -> None:
        step, weights = quantizer.step, quantizer.weights()
        quantize(self.parameters, self._corner, self._span, step, weights, self._symbols)
        dequantize(self._symbols, self._corner, step, weights, self._stored)
        table = self._raster.parameters[:, : self._stored.shape[1]]
        table[:] = self._stored
        table[4] -= np.rint(table[4])
        self._raster.draw(self._image)

    def _slope(self) -> NDArray[np.float64]:
        """The gradient with respect to x, y, the logs of the scales, half turns, and strengths."""
        error = pixels(self._gradient, self._height, self._width)
        np.subtract(pixels(self._image, self._height, self._width), self._target, out=error)
        self._raster.gather(self._gradient)
        slope = self._raster.gradient[:, : self._stored.shape[1]].astype(np.float64)
        scale, colour = self._stored[2:4], self._stored[5:8]
        # Strength stays as it is when a scale changes, so the colour falls with the root of the scale.
        through_colour = 0.5 * (slope[5:8] * colour).sum(axis=0)
        slope[2:4] = slope[2:4] * scale - through_colour
        slope[4] *= math.pi
        slope[5:8] = TO_RGB.T @ slope[5:8] / np.sqrt(scale[0] * scale[1])
        return slope

    def _move(self, direction: NDArray[np.float64], rate: float) -> None:
        """Moves each number by the rate over its sensitivity, and puts the wider scale first again."""
        own = self.parameters
        strength = np.sqrt(np.square(TO_RGB @ own[5:8]).sum(axis=0)) + 1e-6
        relative = rate * math.sqrt(3) / strength
        ratio = own[2] / own[3]
        size = np.sqrt(own[2] * own[3])
        own[0:2] -= np.minimum(math.sqrt(2) * relative, _MAX_SHARE) * size * direction[0:2]
        own[2:4] *= np.exp(-np.minimum(math.sqrt(4 / 3) * relative, _MAX_SHARE) * direction[2:4])
        own[2:4] = own[2:4].clip(MIN_SCALE, MAX_SCALE)
        own[4] -= np.minimum(2 / math.pi * relative / (ratio - 1 / ratio + 0.1), _MAX_SHARE) * direction[4]
        own[5:8] -= rate * direction[5:8]
        swapped = own[2] < own[3]
        own[2], own[3] = np.where(swapped, own[3], own[2]), np.where(swapped, own[2], own[3])
        own[4] = np.mod(own[4] + 0.5 * swapped, 1.0)
