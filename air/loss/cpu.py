"""Value and gradient of the training loss in one sweep over the image (method.md section 5).

    loss = 0.7 · mean |x - y| + 0.3 · (1 - mean SSIM(x, y))

SSIM needs the windowed moments of x (the image) and y (the target): with G* the convolution with the Gaussian window,
μx = G*x, Exx = G*x², Exy = G*(x y). A window is symmetric, so the gradient of Σ SSIM is

    G*(∂S/∂μx) + 2 x · G*(∂S/∂Exx) + y · G*(∂S/∂Exy).

That is three convolutions before and three after a pointwise formula, each split into columns and rows. The sweep goes
down the image four rows at a time; the three derivative maps live in a ring of 16 rows that never leaves the cache.
The moments of the target alone are computed once per target.

Images are padded planes (`air.compute.planes`), whose zero margins are the loss's zero padding. Results do not depend
on how the rows are split into bands: every row's numbers are computed alike and added up in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from air.compute.compile import LANES, inline, kernel
from air.compute.planes import PAD_COLUMNS, PAD_ROWS, FloatArray, image_planes, pixels
from air.compute.simd import (
    absolute,
    aligned_scratch,
    fma,
    lane_numbers,
    lane_sum,
    load,
    maximum,
    minimum,
    splat,
    store,
    where_ge,
)
from air.compute.stencil import define_column_convolution, define_row_convolution, define_row_loader, multiply_rows
from air.compute.threads import Workers, bands
from air.loss.reference import L1_WEIGHT, MIN_MEAN_ERROR, SSIM_C1, SSIM_C2, SSIM_WEIGHT, window_weights

f32 = np.float32
ZERO, ONE = f32(0), f32(1)
C1, C2 = f32(SSIM_C1), f32(SSIM_C2)

ROWS = 4
"""Rows per step of the sweep: 14 input rows then give 4 output rows, and fit in the registers."""

RING = 16
"""Rows of derivative maps kept: 4 results need 14, rounded up to a power of two."""

_WEIGHTS = tuple(float(weight) for weight in window_weights())
_REACH = len(_WEIGHTS) // 2

_load_rows = define_row_loader(ROWS + 2 * _REACH)
_blur_columns = define_column_convolution(_WEIGHTS)
_blur_row = define_row_convolution(_WEIGHTS, shuffled=2)

# Columns of the table of sums that the sweep fills, one row per channel and image row.
_SUM_L1, _SUM_SSIM, _SUM_SQUARES = range(3)


@inline
def _load_ring(ring, offset, stride, row):
    """The 14 rows row - 5 .. row + 8 of a ring's map that starts at `offset`."""
    return (
        load(ring, offset + ((row - 5) & 15) * stride),
        load(ring, offset + ((row - 4) & 15) * stride),
        load(ring, offset + ((row - 3) & 15) * stride),
        load(ring, offset + ((row - 2) & 15) * stride),
        load(ring, offset + ((row - 1) & 15) * stride),
        load(ring, offset + (row & 15) * stride),
        load(ring, offset + ((row + 1) & 15) * stride),
        load(ring, offset + ((row + 2) & 15) * stride),
        load(ring, offset + ((row + 3) & 15) * stride),
        load(ring, offset + ((row + 4) & 15) * stride),
        load(ring, offset + ((row + 5) & 15) * stride),
        load(ring, offset + ((row + 6) & 15) * stride),
        load(ring, offset + ((row + 7) & 15) * stride),
        load(ring, offset + ((row + 8) & 15) * stride),
    )


@inline
def _inside(value, column, width):
    """`value` with zeros in the lanes at or beyond the image's width."""
    return where_ge(f32(width - 1 - column), lane_numbers(), value, ZERO)


@kernel
def blur_target(target, mean, variance, channel, first_row, end_row, height, width):
    """Windowed mean and variance of a channel of the target, rows first_row (a multiple of ROWS) .. end_row - 1."""
    stride = target.shape[2]
    base = (channel * target.shape[1] + PAD_ROWS) * stride + PAD_COLUMNS
    blurred = aligned_scratch(2 * ROWS * stride)
    squares = ROWS * stride
    for row in range(first_row, end_row, ROWS):
        for column in range(0, width, LANES):
            values = _load_rows(target, base + (row - _REACH) * stride + column, stride)
            _blur_columns(blurred, PAD_COLUMNS + column, stride, values)
            _blur_columns(blurred, squares + PAD_COLUMNS + column, stride, multiply_rows(values, values))
        for j in range(min(ROWS, height - row)):
            source = j * stride + PAD_COLUMNS
            out = base + (row + j) * stride
            for column in range(0, width, LANES):
                mu = _blur_row(blurred, source + column)
                second = _blur_row(blurred, squares + source + column)
                store(mean, out + column, _inside(mu, column, width))
                store(variance, out + column, _inside(second - mu * mu, column, width))


@inline
def _blur_products(image, target, blurred, base, row, stride, width):
    """Columns of G*x, G*x² and G*(x y) for the rows row .. row + 3."""
    size = ROWS * stride
    for column in range(0, width, LANES):
        offset = base + (row - _REACH) * stride + column
        x = _load_rows(image, offset, stride)
        out = PAD_COLUMNS + column
        _blur_columns(blurred, out, stride, x)
        _blur_columns(blurred, size + out, stride, multiply_rows(x, x))
        _blur_columns(blurred, 2 * size + out, stride, multiply_rows(x, _load_rows(target, offset, stride)))


@inline
def _derivatives(blurred, mean, variance, source, moments, ring, out, stride, width):
    """One row of the derivative maps into the ring; returns the row's sum of SSIM."""
    size = ROWS * stride
    ring_size = RING * stride
    total = splat(ZERO)
    for column in range(0, width, LANES):
        mu_x = _blur_row(blurred, source + column)
        e_xx = _blur_row(blurred, size + source + column)
        e_xy = _blur_row(blurred, 2 * size + source + column)
        mu_y = load(mean, moments + column)
        mu_xy = mu_x * mu_y
        mu_xx = mu_x * mu_x
        # SSIM = A1 A2 / (B1 B2); k = 2 / (B1 B2).
        a1 = fma(mu_xy, f32(2), C1)
        a2 = fma(e_xy - mu_xy, f32(2), C2)
        b1 = fma(mu_y, mu_y, mu_xx + C1)
        b2 = e_xx - mu_xx + load(variance, moments + column) + C2
        k = splat(f32(2)) / (b1 * b2)
        by_xy = k * a1
        ssim = by_xy * a2 * f32(0.5)
        by_xx = splat(ZERO) - k * ssim * b1  # twice ∂S/∂Exx
        by_mu = k * (mu_y * (a2 - a1) - mu_x * ssim * (b2 - b1))
        if column + LANES > width:
            ssim = _inside(ssim, column, width)
            by_mu = _inside(by_mu, column, width)
            by_xx = _inside(by_xx, column, width)
            by_xy = _inside(by_xy, column, width)
        store(ring, out + column, by_mu)
        store(ring, ring_size + out + column, by_xx)
        store(ring, 2 * ring_size + out + column, by_xy)
        total = total + ssim
    return lane_sum(total)


@inline
def _blur_derivatives(ring, blurred, row, stride, width):
    """Columns of the blurred derivative maps for the rows row .. row + 3."""
    for k in range(3):
        for column in range(PAD_COLUMNS, PAD_COLUMNS + width, LANES):
            values = _load_ring(ring, k * RING * stride + column, stride, row)
            _blur_columns(blurred, k * ROWS * stride + column, stride, values)


@kernel
def sweep_loss(
    image,
    target,
    mean,
    variance,
    gradient,
    sums,
    sign_weight,
    difference_weight,
    channel,
    first_row,
    end_row,
    height,
    width,
):
    """Loss gradient of rows first_row (a multiple of ROWS) .. end_row - 1 of a channel, and their sums.

    The part of the gradient beside SSIM's is sign_weight · sign(d) + difference_weight · d of a difference d, over
    the number of values.
    """
    stride = image.shape[2]
    base = (channel * image.shape[1] + PAD_ROWS) * stride + PAD_COLUMNS
    size = ROWS * stride
    pixel_count = 3 * height * width
    by_sign = f32(sign_weight / pixel_count)
    by_difference = f32(difference_weight / pixel_count)
    ssim_weight = f32(-SSIM_WEIGHT / pixel_count)
    blurred = aligned_scratch(3 * ROWS * stride)
    ring = aligned_scratch(3 * RING * stride)
    # Results trail the derivative maps by the window's reach; starting 7 rows early puts them on multiples of ROWS.
    for row in range(first_row - 7, end_row + _REACH, ROWS):
        if row + ROWS > 0 and row < height:
            _blur_products(image, target, blurred, base, row, stride, width)
        for j in range(ROWS):
            out = ((row + j) & (RING - 1)) * stride
            if 0 <= row + j < height:
                source = j * stride + PAD_COLUMNS
                moments = base + (row + j) * stride
                ssim = _derivatives(blurred, mean, variance, source, moments, ring, out + PAD_COLUMNS, stride, width)
                if first_row <= row + j < end_row:
                    sums[channel, row + j, _SUM_SSIM] = ssim
            else:
                for k in range(3):
                    for column in range(0, stride, LANES):
                        store(ring, k * RING * stride + out + column, splat(ZERO))
        result = row - _REACH
        if result < first_row:
            continue
        _blur_derivatives(ring, blurred, result, stride, width)
        for j in range(min(ROWS, end_row - result)):
            source = j * stride + PAD_COLUMNS
            out = base + (result + j) * stride
            sum_l1 = splat(ZERO)
            sum_squares = splat(ZERO)
            for column in range(0, width, LANES):
                x = load(image, out + column)
                y = load(target, out + column)
                difference = x - y
                slope = fma(x, _blur_row(blurred, size + source + column), _blur_row(blurred, source + column))
                slope = fma(y, _blur_row(blurred, 2 * size + source + column), slope)
                sign = where_ge(difference, ZERO, ONE, f32(-1))
                slope = fma(sign, by_sign, fma(difference, by_difference, slope * ssim_weight))
                shown = minimum(maximum(x, ZERO), ONE) - y
                # Beyond the width both images are zero, so only the gradient needs the mask there.
                if column + LANES > width:
                    slope = _inside(slope, column, width)
                store(gradient, out + column, slope)
                sum_l1 = sum_l1 + absolute(difference)
                sum_squares = fma(shown, shown, sum_squares)
            sums[channel, result + j, _SUM_L1] = lane_sum(sum_l1)
            sums[channel, result + j, _SUM_SQUARES] = lane_sum(sum_squares)


@kernel
def sum_differences(image, target, sums, channel, first_row, end_row, width):
    """The column of L1 in the table of sums alone, for rows first_row .. end_row - 1 of a channel."""
    stride = image.shape[2]
    base = (channel * image.shape[1] + PAD_ROWS) * stride + PAD_COLUMNS
    for row in range(first_row, end_row):
        total = splat(ZERO)
        for i in range(base + row * stride, base + row * stride + width, LANES):
            total = total + absolute(load(image, i) - load(target, i))
        sums[channel, row, _SUM_L1] = lane_sum(total)


@dataclass(frozen=True)
class LossValues:
    """The loss and the squared error that one sweep measures.

    Attributes:
        loss: 0.7 L1 + 0.3 (1 - SSIM).
        squared_error: Mean over pixels and channels of the squared error of the image clamped to [0, 1].
    """

    loss: float
    squared_error: float


class FusedLoss:
    """The loss against one target, with buffers for repeated evaluation.

    Args:
        target: float32 array of shape (3, height, width).
        workers: The threads to use.
        squared_fraction: As in `air.optimization.config.OptimizeConfig`: the gradient has that of the squared error in
            place of a part of L1's, scaled by the mean difference at the evaluation before.
    """

    def __init__(self, target: FloatArray, workers: Workers, squared_fraction: float = 0.0) -> None:
        _, self.height, self.width = target.shape
        self.begin(workers, squared_fraction)
        self.target = image_planes(self.height, self.width)
        self.mean = image_planes(self.height, self.width)
        self.variance = image_planes(self.height, self.width)
        self.gradient = image_planes(self.height, self.width)
        self._sums = np.zeros((3, self.height, 3))
        pixels(self.target, self.height, self.width)[:] = target
        workers.run(self._blur_target, self._tasks)

    def begin(self, workers: Workers, squared_fraction: float) -> None:
        """Begins a series of evaluations; the first knows of none before it."""
        self.workers = workers
        self._tasks = [(channel, *band) for channel in range(3) for band in bands(self.height, workers.count)]
        self._squared_fraction = squared_fraction
        self._mean_difference: float | None = None

    def _blur_target(self, channel: int, first_row: int, end_row: int) -> None:
        blur_target(self.target, self.mean, self.variance, channel, first_row, end_row, self.height, self.width)

    def evaluate(self, image: FloatArray) -> LossValues:
        """Fills `gradient` (planes) with the loss's gradient at `image` (planes) and returns the values."""
        sign_weight, difference_weight = self._weights(image)

        def sweep(channel: int, first_row: int, end_row: int) -> None:
            sweep_loss(
                image,
                self.target,
                self.mean,
                self.variance,
                self.gradient,
                self._sums,
                sign_weight,
                difference_weight,
                channel,
                first_row,
                end_row,
                self.height,
                self.width,
            )

        self.workers.run(sweep, self._tasks)
        l1, ssim, squares = self._sums.sum(axis=(0, 1)) / (3 * self.height * self.width)
        self._mean_difference = float(l1)
        return LossValues(float(L1_WEIGHT * l1 + SSIM_WEIGHT * (1 - ssim)), float(squares))

    def _weights(self, image: FloatArray) -> tuple[float, float]:
        """The weights of a difference's sign and of the difference in the gradient (`air.optimization.reference`)."""
        if not self._squared_fraction:
            return L1_WEIGHT, 0.0
        if self._mean_difference is None:

            def add_up(channel: int, first_row: int, end_row: int) -> None:
                sum_differences(image, self.target, self._sums, channel, first_row, end_row, self.width)

            self.workers.run(add_up, self._tasks)
            self._mean_difference = float(self._sums[:, :, _SUM_L1].sum()) / (3 * self.height * self.width)
        squared = L1_WEIGHT * self._squared_fraction
        return L1_WEIGHT - squared, squared / max(self._mean_difference, MIN_MEAN_ERROR)
