"""Optimises quantised Gaussians: each step draws the quantised ones and moves the exact ones.

Rounding is not differentiable, so gradients pass straight through it. Neighbours learn to correct the rounding errors
of a Gaussian. The loss is the squared error, which PSNR measures. Each number's step is proportional to the quantiser's
step there (`air.codec.sensitivity`), since a coarsely stored number must move far before its symbol changes. The step
is Adam's without momentum: a gradient of rounded numbers says little about the next one. It runs on the CPU only.

What is gained holds at the one quantiser step that the Gaussians were refined for. A thousandth beside it half of the
gain is lost, and a hundredth beside it they are worse than unrefined ones. docs/codec.md has the measurement.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from air.codec.colour import TO_RGB
from air.codec.sensitivity import MAX_SCALE, MIN_SCALE, STEP_UNITS, SYMBOLS, SensitivityQuantizer, dequantize, quantize
from air.compute.planes import FloatArray, image_planes, pixels
from air.compute.threads import Workers
from air.gaussians import ANGLE, CENTRE, COLOUR, SCALE
from air.rendering.cpu import Raster

_BETA_2, _EPS = 0.99, 1e-12
LEARNING_RATE = 0.2
"""The first step of the strength, in quantiser steps. It is constant in the first half of the steps and then falls to
zero."""

_MAX_MOVE = 0.05  # per step: of a scale, for positions; of e, for scales; of a half turn, for angles


class Refiner:
    """Optimises the Gaussians of all stages for a quantiser.

    Args:
        parameters: As from `air.codec.symbols.canonical_parameters`, shape (8, N): the start of every `run`.
        corner: The origin of each position, as from `air.codec.symbols.corners`, shape (2, N).
        span: The range of positions from the corner, in 64ths of a pixel.
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
        self.start = parameters
        self._corner, self._span = corner, span
        self._target = target
        count = parameters.shape[1]
        self._raster = Raster(count, self._height, self._width, workers)
        self._image = image_planes(self._height, self._width)
        self._gradient = image_planes(self._height, self._width)
        self._symbols = np.zeros((count, SYMBOLS), np.int32)
        self._stored = np.empty((SYMBOLS, count))

    def squared_error(self, parameters: NDArray[np.float64], quantizer: SensitivityQuantizer) -> float:
        """The mean squared error of the stored picture of these parameters, clamped to [0, 1]."""
        self._draw(parameters, quantizer)
        drawn = pixels(self._image, self._height, self._width)
        return float(np.square(drawn.clip(0, 1) - self._target).mean(dtype=np.float64))

    def run(self, quantizer: SensitivityQuantizer, steps: int) -> NDArray[np.float64]:
        """The parameters after `steps` steps from the start; the start itself if its stored picture is better."""
        own = self.start.copy()
        square = np.zeros_like(own)
        for step in range(steps):
            self._draw(own, quantizer)
            slope = self._slope()
            square += (1 - _BETA_2) * (slope * slope - square)
            direction = slope / (np.sqrt(square / (1 - _BETA_2 ** (step + 1))) + _EPS)
            factor = min(1.0, 2 * (1 - step / steps))
            self._move(own, direction, LEARNING_RATE * factor * quantizer.step / STEP_UNITS)
        better = self.squared_error(own, quantizer) < self.squared_error(self.start, quantizer)
        return own if better else self.start

    def _draw(self, parameters: NDArray[np.float64], quantizer: SensitivityQuantizer) -> None:
        step, weights = quantizer.step, quantizer.weights()
        quantize(parameters, self._corner, self._span, step, weights, self._symbols)
        dequantize(self._symbols, self._corner, step, weights, self._stored)
        table = self._raster.parameters[:, : self._stored.shape[1]]
        table[:] = self._stored
        table[ANGLE] -= np.rint(table[ANGLE])
        self._raster.draw(self._image)

    def _slope(self) -> NDArray[np.float64]:
        """The gradient with respect to x, y, the logs of the scales, half turns, and strengths."""
        error = pixels(self._gradient, self._height, self._width)
        np.subtract(pixels(self._image, self._height, self._width), self._target, out=error)
        self._raster.gather(self._gradient)
        slope = self._raster.gradient[:, : self._stored.shape[1]].astype(np.float64)
        scale, colour = self._stored[SCALE], self._stored[COLOUR]
        # A scale changes at constant strength, so the colour is proportional to 1 / sqrt(scale).
        through_colour = 0.5 * (slope[COLOUR] * colour).sum(axis=0)
        slope[SCALE] = slope[SCALE] * scale - through_colour
        slope[ANGLE] *= math.pi
        slope[COLOUR] = TO_RGB.T @ slope[COLOUR] / np.sqrt(scale[0] * scale[1])
        return slope

    def _move(self, own: NDArray[np.float64], direction: NDArray[np.float64], rate: float) -> None:
        """Moves each number by the rate over its sensitivity. Then the wider scale becomes the first one again."""
        strength = np.sqrt(np.square(TO_RGB @ own[COLOUR]).sum(axis=0)) + 1e-6
        relative = rate * math.sqrt(3) / strength
        first, second = own[SCALE]
        ratio = first / second
        size = np.sqrt(first * second)
        own[CENTRE] -= np.minimum(math.sqrt(2) * relative, _MAX_MOVE) * size * direction[CENTRE]
        own[SCALE] *= np.exp(-np.minimum(math.sqrt(4 / 3) * relative, _MAX_MOVE) * direction[SCALE])
        own[SCALE] = own[SCALE].clip(MIN_SCALE, MAX_SCALE)
        own[ANGLE] -= np.minimum(2 / math.pi * relative / (ratio - 1 / ratio + 0.1), _MAX_MOVE) * direction[ANGLE]
        own[COLOUR] -= rate * direction[COLOUR]
        swapped = first < second
        own[SCALE] = np.where(swapped, second, first), np.where(swapped, first, second)
        own[ANGLE] = np.mod(own[ANGLE] + 0.5 * swapped, 1.0)
