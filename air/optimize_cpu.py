"""Compiled kernels of the optimiser: raw numbers -> parameters, and one Adam step (method.md sections 2 and 5).

Raw numbers, Adam's two moments and the parameters are planar tables (`air.render.planes`) with the rows of
`air.gaussians`: offset x, y; scale 1, 2; angle; red, green, blue.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from air.gaussians import MIN_RAW_SCALE, RAW_CHANNELS
from air.loss_cpu import FusedLoss, LossValues, blur_target, sweep_loss
from air.render.cpu import OFF_IMAGE, Raster
from air.render.cpu_kernels import (
    HALF_TURNS,
    ONE,
    PI,
    RED,
    SCALE_1,
    TWO,
    ZERO,
    chain_to_parameters,
    derive_geometry,
    draw_runs,
    gather_runs,
    sweep,
)
from air.render.planes import FloatArray, image_planes, pixels, table
from air.render.simd import LANES, absolute, exp, fma, inline, kernel, load, round_even, splat, sqrt, store, where_ge
from air.render.threads import Workers

f32 = np.float32


@inline
def _sigmoid(x):
    return splat(ONE) / (exp(splat(ZERO) - x) + ONE)


@inline
def _tanh(x):
    return fma(_sigmoid(x * TWO), TWO, f32(-1))


@inline
def _sigmoid_slope(x):
    """σ(x) (1 - σ(x)) = e/(1 + e)² with e = exp(-|x|), which neither cancels nor overflows."""
    e = exp(splat(ZERO) - absolute(x))
    return e / ((e + ONE) * (e + ONE))


@kernel
def activate_raw(raw, anchor, patch_size, parameters, first, end):
    """The parameters of raw Gaussians first .. end - 1 (multiples of LANES) at their anchors, a table (2, N)."""
    row = raw.shape[1]
    patch = f32(patch_size)
    for i in range(first, end, LANES):
        for k in range(2):
            store(parameters, k * row + i, fma(_tanh(load(raw, k * row + i)), patch, load(anchor, k * row + i)))
        for k in range(SCALE_1, SCALE_1 + 2):
            store(parameters, k * row + i, fma(_sigmoid(load(raw, k * row + i)), patch, f32(MIN_RAW_SCALE)))
        # The angle is 2π σ, that is 2 σ half turns; whole half turns change nothing.
        turns = _sigmoid(load(raw, HALF_TURNS * row + i)) * TWO
        store(parameters, HALF_TURNS * row + i, turns - round_even(turns))
        for k in range(RED, RED + 3):
            store(parameters, k * row + i, _tanh(load(raw, k * row + i)))


@inline
def _slope_factors(k, patch_size):
    """Numbers a, b with which b · σ'(a · raw) is the derivative of parameter k (the angle per radian)."""
    a, b = f32(1), f32(patch_size)
    if k < SCALE_1:
        a, b = f32(2), f32(4 * patch_size)
    elif k >= RED:
        a, b = f32(2), f32(4)
    elif k == HALF_TURNS:
        b = TWO * PI
    return a, b


@kernel
def differentiate_raw(raw, patch_size, gradient, first, end):
    """Turns the gradient with respect to parameters (the angle's per radian) into that of raw numbers, in place."""
    row = raw.shape[1]
    for k in range(RAW_CHANNELS):
        a, b = _slope_factors(k, patch_size)
        for i in range(k * row + first, k * row + end, LANES):
            store(gradient, i, load(gradient, i) * (_sigmoid_slope(load(raw, i) * a) * b))


@kernel
def adam_step(raw, patch_size, mean, square, gradient, rates, beta1, beta2, eps, opposed_share, step, first, end):
    """Adam's update number `step` (from 1) of Gaussians first .. end - 1, with a learning rate per row in `rates`.

    Of what goes against the present gradient only `opposed_share` is done. `gradient` is with respect to the
    parameters: `differentiate_raw` is done on the way, to touch memory once.
    """
    row = raw.shape[1]
    keep1 = f32(beta1)
    keep2 = f32(beta2)
    kept = f32(opposed_share)
    correction = f32(1.0 / np.sqrt(1.0 - beta2**step))
    for k in range(RAW_CHANNELS):
        a, b = _slope_factors(k, patch_size)
        rate = f32(-rates[k] / (1.0 - beta1**step))
        for i in range(k * row + first, k * row + end, LANES):
            old = load(raw, i)
            slope = load(gradient, i) * (_sigmoid_slope(old * a) * b)
            new_mean = fma(load(mean, i), keep1, slope * (ONE - keep1))
            new_square = fma(load(square, i), keep2, slope * slope * (ONE - keep2))
            store(mean, i, new_mean)
            store(square, i, new_square)
            scale = splat(ONE) / fma(sqrt(new_square), correction, f32(eps))
            scale = where_ge(new_mean * slope, ZERO, scale, scale * kept)
            store(raw, i, fma(new_mean * rate, scale, old))


class FusedOptimizer:
    """The state of one optimisation in the kernels' layout: raw numbers, Adam's moments, image and loss buffers.

    Call `evaluate`, then `update`, in turns. The step inside touches no torch and allocates no image.

    Args:
        raw: float32 (N, 8). anchor: float32 (N, 2), pixels.
        target, background: float32 (3, height, width); the Gaussians are added to the background.
        patch_size: Range of the activations in pixels.
        workers: The threads to use.
    """

    def __init__(
        self,
        raw: FloatArray,
        anchor: FloatArray,
        target: FloatArray,
        patch_size: int,
        background: FloatArray,
        workers: Workers,
    ) -> None:
        _, height, width = target.shape
        self.count = raw.shape[0]
        self.patch_size = float(patch_size)
        self.workers = workers
        self.raster = Raster(self.count, height, width, workers)
        self.loss = FusedLoss(target, workers)
        self.raw = table(RAW_CHANNELS, self.count)
        self.raw[:, : self.count] = raw.T
        self.anchor = table(2, self.count)
        self.anchor[:] = OFF_IMAGE
        self.anchor[:, : self.count] = anchor.T
        self._mean = table(RAW_CHANNELS, self.count)
        self._square = table(RAW_CHANNELS, self.count)
        self._updates = 0
        self.background = None
        if background.any():
            self.background = image_planes(height, width)
            pixels(self.background, height, width)[:] = background
        self.image = image_planes(height, width)

    def evaluate(self) -> LossValues:
        """Draws the present state; returns its loss and leaves the loss's gradient for `update`."""
        self.workers.run(self._activate, self.raster.ranges)
        self.raster.draw(self.image, self.background)
        return self.loss.evaluate(self.image)

    def raw_gradient(self) -> FloatArray:
        """The table of the loss's gradient with respect to raw numbers, from what `evaluate` left."""
        gradient = self.raster.gradient

        def differentiate(first: int, end: int) -> None:
            differentiate_raw(self.raw, self.patch_size, gradient, first, end)

        self.raster.gather(self.loss.gradient)
        self.workers.run(differentiate, self.raster.ranges)
        return gradient

    def update(
        self, rates: NDArray[np.float64], beta1: float, beta2: float, eps: float, opposed_share: float = 1.0
    ) -> None:
        """One Adam step from the gradient that `evaluate` left; `rates` holds one rate per raw column."""
        self._updates += 1

        def step(first: int, end: int) -> None:
            # Range by range, so that the gradient may still be in the cache when Adam reads it.
            self.raster.gather_range(self.loss.gradient, first, end)
            adam_step(
                self.raw,
                self.patch_size,
                self._mean,
                self._square,
                self.raster.gradient,
                rates,
                beta1,
                beta2,
                eps,
                opposed_share,
                self._updates,
                first,
                end,
            )

        self.workers.run(step, self.raster.ranges)

    def _activate(self, first: int, end: int) -> None:
        activate_raw(self.raw, self.anchor, self.patch_size, self.raster.parameters, first, end)

    def raw_rows(self) -> FloatArray:
        """The raw numbers, shape (N, 8)."""
        return np.ascontiguousarray(self.raw[:, : self.count].T)


ALL_KERNELS = (
    activate_raw,
    adam_step,
    derive_geometry,
    draw_runs,
    gather_runs,
    sweep,
    chain_to_parameters,
    blur_target,
    sweep_loss,
)
"""Every kernel that a fit calls."""
