"""Raw Gaussians in the CPU kernels: raw numbers -> parameters, gradients back, Gauss-Newton steps, and `RawRaster`.

Raw numbers, their gradients and their steps are planar tables (`air.compute.planes`) with the rows of `air.gaussians`:
offset x, y; scale 1, 2; angle; red, green, blue.
"""

from __future__ import annotations

import numpy as np

from air.compute.compile import LANES, inline, kernel
from air.compute.planes import FloatArray, table
from air.compute.simd import absolute, exp, fma, load, round_even, splat, store
from air.compute.threads import Workers
from air.gaussians import MIN_RAW_SCALE, RAW_CHANNELS
from air.rendering.cpu import Raster
from air.rendering.cpu_kernels import ONE, PI, TWO, ZERO
from air.rendering.parameters import BLUE, GREEN, HALF_TURNS, OFF_IMAGE, RED, SCALE_1, SCALE_2

f32 = np.float32


@inline
def sigmoid(x):
    return splat(ONE) / (exp(splat(ZERO) - x) + ONE)


@inline
def tanh(x):
    return fma(sigmoid(x * TWO), TWO, f32(-1))


@inline
def sigmoid_slope(x):
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
            store(parameters, k * row + i, fma(tanh(load(raw, k * row + i)), patch, load(anchor, k * row + i)))
        for k in range(SCALE_1, SCALE_1 + 2):
            store(parameters, k * row + i, fma(sigmoid(load(raw, k * row + i)), patch, f32(MIN_RAW_SCALE)))
        # The angle is 2π σ, that is 2 σ half turns; whole half turns change nothing.
        turns = sigmoid(load(raw, HALF_TURNS * row + i)) * TWO
        store(parameters, HALF_TURNS * row + i, turns - round_even(turns))
        for k in range(RED, RED + 3):
            store(parameters, k * row + i, tanh(load(raw, k * row + i)))


@inline
def slope_factors(k, patch_size):
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
        a, b = slope_factors(k, patch_size)
        for i in range(k * row + first, k * row + end, LANES):
            store(gradient, i, load(gradient, i) * (sigmoid_slope(load(raw, i) * a) * b))


@kernel
def gauss_newton(raw, patch_size, parameters, gradient, ridge, steps, first, end):
    """Sets `steps` to the Gauss-Newton step -g / (h + ridge · area) of each raw number of Gaussians first .. end - 1.

    `gradient` is that of half the squared error with respect to the parameters; the curvatures h are those of
    `air.predictor.compact.feedback`.
    """
    row = raw.shape[1]
    for i in range(first, end, LANES):
        scale_1 = load(parameters, SCALE_1 * row + i)
        scale_2 = load(parameters, SCALE_2 * row + i)
        red = load(parameters, RED * row + i)
        green = load(parameters, GREEN * row + i)
        blue = load(parameters, BLUE * row + i)
        area = scale_1 * scale_2 * PI
        energy = area * fma(red, red, fma(green, green, blue * blue))
        least = area * f32(ridge)
        ratio = scale_1 / scale_2
        stretch = ratio - splat(ONE) / ratio
        along_1 = energy / (scale_1 * scale_1)
        along_2 = energy / (scale_2 * scale_2)
        for k in range(RAW_CHANNELS):
            a, b = slope_factors(k, patch_size)
            bend = area
            if k == 0:
                bend = along_1 * f32(0.5)
            elif k == 1:
                bend = along_2 * f32(0.5)
            elif k == SCALE_1:
                bend = along_1 * f32(0.75)
            elif k == SCALE_2:
                bend = along_2 * f32(0.75)
            elif k == HALF_TURNS:
                bend = energy * stretch * stretch * f32(0.25)
            slope = sigmoid_slope(load(raw, k * row + i) * a) * b
            minus = splat(ZERO) - load(gradient, k * row + i) * slope
            store(steps, k * row + i, minus / fma(bend * slope, slope, least))


class RawRaster:
    """Buffers to draw raw Gaussians of one image, again and again, and to take gradients back to them.

    Attributes:
        raw: Table (8, padded count), zero where it only pads; set it, then `draw`.
        raster: Draws the parameters that `activate` sets; `draw` calls both.
    """

    def __init__(self, anchor: FloatArray, height: int, width: int, patch_size: int, workers: Workers) -> None:
        """`anchor` is float32 (N, 2), in pixels."""
        self.count = len(anchor)
        self.patch_size = float(patch_size)
        self.raster = Raster(self.count, height, width, workers)
        self.raw = table(RAW_CHANNELS, self.count)
        self._anchor = table(2, self.count)
        self._anchor[:] = OFF_IMAGE
        self._anchor[:, : self.count] = anchor.T

    def set_rows(self, raw: FloatArray) -> None:
        """Sets the raw numbers from rows, shape (N, 8)."""
        self.raw[:, : self.count] = raw.T

    def rows(self) -> FloatArray:
        """The raw numbers as rows, shape (N, 8)."""
        return np.ascontiguousarray(self.raw[:, : self.count].T)

    def activate(self) -> None:
        """Sets the raster's parameters."""
        self.raster.workers.run(self._activate, self.raster.ranges)

    def draw(self, planes: FloatArray, background: FloatArray | None = None) -> None:
        """Sets an image's planes to the Gaussians, added to a background if there is one."""
        self.activate()
        self.raster.draw(planes, background)

    def raw_gradient(self, planes: FloatArray) -> FloatArray:
        """The table of the gradient with respect to raw numbers, from the image's. Call after `draw`."""
        gradient = self.raster.gradient

        def differentiate(first: int, end: int) -> None:
            differentiate_raw(self.raw, self.patch_size, gradient, first, end)

        self.raster.gather(planes)
        self.raster.workers.run(differentiate, self.raster.ranges)
        return gradient

    def newton_steps(self, planes: FloatArray, ridge: float) -> FloatArray:
        """The table of Gauss-Newton steps (`gauss_newton`), where the planes hold image drawn minus image wanted."""
        steps = table(RAW_CHANNELS, self.count)
        raster = self.raster

        def run(first: int, end: int) -> None:
            gauss_newton(self.raw, self.patch_size, raster.parameters, raster.gradient, ridge, steps, first, end)

        raster.gather(planes)
        raster.workers.run(run, raster.ranges)
        return steps

    def _activate(self, first: int, end: int) -> None:
        activate_raw(self.raw, self._anchor, self.patch_size, self.raster.parameters, first, end)
