"""Value and gradient of the training loss on CUDA, for a ragged batch of images (method.md section 5).

    loss = 0.7 · mean |x - y| + 0.3 · (1 - mean SSIM(x, y))

The formulas are those of `air.loss.cpu`: three convolutions of products of x (the image) and y (the target), a
pointwise formula, and three convolutions of its derivatives. Two kernels, `differentiate_ssim` and `finish_gradient`,
do one half each, since the second half needs its neighbours' results of the first.

In both a program walks down some rows of a strip of an image. For each row it blurs along the row, from memory, and
adds the result to the 11 rows of output that the row is part of, which it holds in registers; the uppermost of them is
then complete. Lanes are the (column, channel) pairs of a row.

Importing this module needs triton.
"""

# triton's language has no types that a checker understands.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from air.compute.launch import launch
from air.compute.ragged import HEIGHT, IMAGE_COLUMNS, MARGIN, ORIGIN, PIXEL, STRIDE, WIDTH, RaggedImages
from air.loss.reference import L1_WEIGHT, SSIM_C1, SSIM_C2, SSIM_WEIGHT, WINDOW_SIZE, window_weights

LANES = 128
"""(column, channel) pairs of a strip."""

SEGMENTS = (64, 32, 16)
"""Rows of output per program, longest first: each costs 10 more rows of work, but short ones make more programs."""

ENOUGH_PROGRAMS = 1_000
"""Programs that keep a large GPU busy; the longest segments that make this many are taken."""

SUMS = 3
"""What is summed over the pixels and channels of an image: |x - y|, SSIM, squared error of x clamped to [0, 1]."""

SUM_L1, SUM_SSIM, SUM_SQUARES = (tl.constexpr(column) for column in range(3))
"""Their columns in a table of sums."""

MIN_MEAN_ERROR = 1e-6
"""As in `air.optimization.reference`, where the squared error's gradient is defined."""

_WINDOW = tl.constexpr(tuple(float(weight) for weight in window_weights()))
_TAPS = tl.constexpr(WINDOW_SIZE)
_HALF = tl.constexpr(WINDOW_SIZE // 2)
_C1, _C2 = tl.constexpr(SSIM_C1), tl.constexpr(SSIM_C2)
_L1_WEIGHT, _SSIM_WEIGHT = tl.constexpr(L1_WEIGHT), tl.constexpr(SSIM_WEIGHT)
_SUMS = tl.constexpr(SUMS)
_MIN_MEAN_ERROR = tl.constexpr(MIN_MEAN_ERROR)
_BY_MEAN, _BY_SQUARE, _BY_PRODUCT = (tl.constexpr(column) for column in range(3))


if WINDOW_SIZE // 2 > MARGIN:
    raise ValueError(f"the SSIM window of {WINDOW_SIZE} pixels reaches beyond the images' margin of {MARGIN}")


@triton.jit
def _load_strip(work, images, STRIP: tl.constexpr, ROWS: tl.constexpr):
    """Reads a program's row (image, first row, first column · 3) of the work table.

    Returns the image's number; the first row and the end of the rows; for each lane the offset of its column and
    channel from the first pixel of a row, and whether the lane is inside the image; where the image starts in a buffer;
    and the floats from row to row.
    """
    row = work + tl.program_id(0) * 3
    image = tl.load(row)
    first_row = tl.load(row + 1)
    lane = tl.load(row + 2) + tl.arange(0, STRIP)
    table = images + image * IMAGE_COLUMNS
    end_row = tl.minimum(first_row + ROWS, tl.load(table + HEIGHT).to(tl.int32))
    offset = lane // 3 * PIXEL + lane % 3
    inside = lane < 3 * tl.load(table + WIDTH).to(tl.int32)
    return image, first_row, end_row, offset, inside, tl.load(table + ORIGIN) * PIXEL, tl.load(table + STRIDE) * PIXEL


@triton.jit
def _no_rows(like):
    """The 11 rows in registers, all zero."""
    zero = tl.zeros_like(like).to(tl.float32)
    return zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def _add_row(rows, blurred):
    """Adds a row to the 11 rows around it; returns the uppermost, now complete, and the others with a new one below.

    The added row is the lowest in the window of the uppermost, the second lowest in that of the next, and so on; the
    window is symmetric.
    """
    done = rows[0] + _WINDOW[0] * blurred
    waiting = (
        rows[1] + _WINDOW[1] * blurred,
        rows[2] + _WINDOW[2] * blurred,
        rows[3] + _WINDOW[3] * blurred,
        rows[4] + _WINDOW[4] * blurred,
        rows[5] + _WINDOW[5] * blurred,
        rows[6] + _WINDOW[6] * blurred,
        rows[7] + _WINDOW[7] * blurred,
        rows[8] + _WINDOW[8] * blurred,
        rows[9] + _WINDOW[9] * blurred,
        rows[10] + _WINDOW[10] * blurred,
        tl.zeros_like(blurred),
    )
    return done, waiting


@triton.jit
def blur_targets(work, images, target, mean, variance, STRIP: tl.constexpr, ROWS: tl.constexpr):
    """Windowed mean and variance of the targets."""
    _, first_row, end_row, offset, inside, origin, stride = _load_strip(work, images, STRIP, ROWS)
    means = _no_rows(offset)
    squares = _no_rows(offset)
    for row in range(first_row - _HALF, end_row + _HALF):
        line = origin + row * stride
        y_here = target + line + offset
        blurred = tl.zeros((STRIP,), tl.float32)
        blurred_square = tl.zeros((STRIP,), tl.float32)
        for tap in tl.static_range(_TAPS):
            y = tl.load(y_here + (tap - _HALF) * PIXEL)
            blurred += _WINDOW[tap] * y
            blurred_square += _WINDOW[tap] * y * y
        mu, means = _add_row(means, blurred)
        second, squares = _add_row(squares, blurred_square)
        if row - _HALF >= first_row:
            out = line - _HALF * stride + offset
            tl.store(mean + out, mu, mask=inside)
            tl.store(variance + out, second - mu * mu, mask=inside)


@triton.jit
def _add_to_sum(sums, clock, num_images, number, which, lanes):
    """Adds all lanes to one of an image's sums in the row of `sums` that is the clock's (which counts from 1)."""
    time = tl.load(clock) - 1
    place = sums + (time * num_images + number) * _SUMS + which
    # float64, so that the order of additions cannot be seen.
    tl.atomic_add(place, tl.sum(lanes).to(tl.float64), sem="relaxed")


@triton.jit
def differentiate_ssim(
    work,
    images,
    num_images,
    image,
    target,
    mean,
    variance,
    slopes,
    map_size,
    sums,
    clock,
    STRIP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Writes ∂S/∂μx, twice ∂S/∂E[x²] and ∂S/∂E[x y] of SSIM to the three maps of `slopes`; sums SSIM."""
    number, first_row, end_row, offset, inside, origin, stride = _load_strip(work, images, STRIP, ROWS)
    x_rows = _no_rows(offset)
    xx_rows = _no_rows(offset)
    xy_rows = _no_rows(offset)
    total = tl.zeros((STRIP,), tl.float32)
    for row in range(first_row - _HALF, end_row + _HALF):
        line = origin + row * stride
        # Taps are then at constant distances from an address, which a load has room for.
        x_here = image + line + offset
        y_here = target + line + offset
        blurred_x = tl.zeros((STRIP,), tl.float32)
        blurred_xx = tl.zeros((STRIP,), tl.float32)
        blurred_xy = tl.zeros((STRIP,), tl.float32)
        for tap in tl.static_range(_TAPS):
            x = tl.load(x_here + (tap - _HALF) * PIXEL)
            y = tl.load(y_here + (tap - _HALF) * PIXEL)
            weighted = _WINDOW[tap] * x
            blurred_x += weighted
            blurred_xx += weighted * x
            blurred_xy += weighted * y
        mu_x, x_rows = _add_row(x_rows, blurred_x)
        e_xx, xx_rows = _add_row(xx_rows, blurred_xx)
        e_xy, xy_rows = _add_row(xy_rows, blurred_xy)
        if row - _HALF >= first_row:
            out = line - _HALF * stride + offset
            mu_y = tl.load(mean + out)
            # SSIM = A1 A2 / (B1 B2); k = 2 / (B1 B2).
            a1 = 2 * mu_x * mu_y + _C1
            a2 = 2 * (e_xy - mu_x * mu_y) + _C2
            b1 = mu_x * mu_x + mu_y * mu_y + _C1
            b2 = e_xx - mu_x * mu_x + tl.load(variance + out) + _C2
            k = 2.0 / (b1 * b2)
            ssim = 0.5 * k * a1 * a2
            by_mean = k * (mu_y * (a2 - a1) - mu_x * ssim * (b2 - b1))
            tl.store(slopes + _BY_MEAN * map_size + out, by_mean, mask=inside)
            tl.store(slopes + _BY_SQUARE * map_size + out, -k * ssim * b1, mask=inside)
            tl.store(slopes + _BY_PRODUCT * map_size + out, k * a1, mask=inside)
            total += tl.where(inside, ssim, 0.0)
    _add_to_sum(sums, clock, num_images, number, SUM_SSIM, total)


@triton.jit
def finish_gradient(
    work,
    images,
    num_images,
    image,
    target,
    background,
    slopes,
    map_size,
    gradient,
    first_errors,
    squared_fraction,
    sums,
    clock,
    STRIP: tl.constexpr,
    ROWS: tl.constexpr,
    SQUARED: tl.constexpr,
):
    """Writes the loss's gradient from the maps of `differentiate_ssim`; sums |x - y| and squares.

    With SQUARED, `squared_fraction` of the L1 term's gradient is that of the squared error, scaled by the mean |x - y|
    of one time before. For the first time, `first_errors` holds the sum of |x - y| of each image.

    Then resets the image to the background, onto which it is drawn next; no other kernel reads the image after this.
    """
    number, first_row, end_row, offset, inside, origin, stride = _load_strip(work, images, STRIP, ROWS)
    table = images + number * IMAGE_COLUMNS
    values = 3.0 * tl.load(table + HEIGHT).to(tl.float32) * tl.load(table + WIDTH).to(tl.float32)
    l1_weight = _L1_WEIGHT / values
    ssim_weight = -_SSIM_WEIGHT / values
    if SQUARED:
        time = tl.load(clock) - 1
        error = tl.load(sums + ((time - 1) * num_images + number) * _SUMS + SUM_L1, mask=time > 0, other=0.0)
        error += tl.load(first_errors + number, mask=time == 0, other=0.0)
        by_difference = squared_fraction / tl.maximum(error.to(tl.float32) / values, _MIN_MEAN_ERROR)
    mean_rows = _no_rows(offset)
    square_rows = _no_rows(offset)
    product_rows = _no_rows(offset)
    total = tl.zeros((STRIP,), tl.float32)
    squares = tl.zeros((STRIP,), tl.float32)
    for row in range(first_row - _HALF, end_row + _HALF):
        line = origin + row * stride
        mean_here = slopes + _BY_MEAN * map_size + line + offset
        square_here = slopes + _BY_SQUARE * map_size + line + offset
        product_here = slopes + _BY_PRODUCT * map_size + line + offset
        blurred_mean = tl.zeros((STRIP,), tl.float32)
        blurred_square = tl.zeros((STRIP,), tl.float32)
        blurred_product = tl.zeros((STRIP,), tl.float32)
        for tap in tl.static_range(_TAPS):
            blurred_mean += _WINDOW[tap] * tl.load(mean_here + (tap - _HALF) * PIXEL)
            blurred_square += _WINDOW[tap] * tl.load(square_here + (tap - _HALF) * PIXEL)
            blurred_product += _WINDOW[tap] * tl.load(product_here + (tap - _HALF) * PIXEL)
        by_mean, mean_rows = _add_row(mean_rows, blurred_mean)
        by_square, square_rows = _add_row(square_rows, blurred_square)
        by_product, product_rows = _add_row(product_rows, blurred_product)
        if row - _HALF >= first_row:
            out = line - _HALF * stride + offset
            x = tl.load(image + out, mask=inside, other=0.0)
            y = tl.load(target + out, mask=inside, other=0.0)
            difference = x - y
            sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
            if SQUARED:
                sign = (1 - squared_fraction) * sign + by_difference * difference
            by_ssim = by_mean + x * by_square + y * by_product
            tl.store(gradient + out, l1_weight * sign + ssim_weight * by_ssim, mask=inside)
            tl.store(image + out, tl.load(background + out, mask=inside, other=0.0), mask=inside)
            shown = tl.where(x > 0, x, 0.0)
            shown = tl.where(shown < 1, shown, 1.0) - y
            total += tl.abs(difference)
            squares += shown * shown
    _add_to_sum(sums, clock, num_images, number, SUM_L1, total)
    _add_to_sum(sums, clock, num_images, number, SUM_SQUARES, squares)


class BatchLoss:
    """The loss against the targets of a batch, with buffers for repeated evaluation.

    Args:
        layout: Where images lie in a buffer.
        targets: One per image, float32 (3, height, width).
        squared_fraction: As in `air.optimization.config.OptimizeConfig`.

    Attributes:
        gradient: Buffer of the loss's gradient with respect to the images, set by `evaluate`.
        first_errors: float64 (images,), set by `measure_first_errors`; only needed with a squared fraction.
    """

    def __init__(self, layout: RaggedImages, targets: list[Tensor], squared_fraction: float = 0.0) -> None:
        self.layout = layout
        self.target = layout.pack(targets)
        self.gradient = layout.buffer()
        self._mean = layout.buffer()
        self._variance = layout.buffer()
        self._slopes = layout.buffer(maps=3)
        self._squared_fraction = squared_fraction
        self.first_errors = torch.zeros(len(targets), dtype=torch.float64, device=layout.device)
        self._rows, work = _divide_work(layout.sizes)
        self._work = torch.tensor(work, dtype=torch.int32, device=layout.device)
        strips = {"STRIP": LANES, "ROWS": self._rows}
        launch(blur_targets, len(work), self._work, layout.table, self.target, self._mean, self._variance, **strips)

    def evaluate(self, image: Tensor, background: Tensor, sums: Tensor, clock: Tensor) -> None:
        """Sets `gradient`, adds to the sums of this time, and resets the image to the background.

        Args:
            image: Buffer of what was drawn.
            background: Buffer of what it is reset to.
            sums: float64 (times, images, SUMS), zero where nothing was added yet.
            clock: int32 (1,), which of the times it is, counted from 1.
        """
        programs = len(self._work)
        strips = {"STRIP": LANES, "ROWS": self._rows}
        num_images = len(self.layout.sizes)
        map_size = self._mean.numel()
        launch(
            differentiate_ssim,
            programs,
            self._work,
            self.layout.table,
            num_images,
            image,
            self.target,
            self._mean,
            self._variance,
            self._slopes,
            map_size,
            sums,
            clock,
            **strips,
        )
        self._finish_gradient(image, background, sums, clock)

    def measure_first_errors(self, image: Tensor, background: Tensor, sums: Tensor, clock: Tensor) -> None:
        """Sets `first_errors` from the first image, and resets the image to the background.

        Arguments are as for `evaluate`. `sums` is zero before and after. The clock is 1.
        """
        self._finish_gradient(image, background, sums, clock)
        self.first_errors.copy_(sums[0, :, SUM_L1.value])
        sums[0].zero_()

    def _finish_gradient(self, image: Tensor, background: Tensor, sums: Tensor, clock: Tensor) -> None:
        launch(
            finish_gradient,
            len(self._work),
            self._work,
            self.layout.table,
            len(self.layout.sizes),
            image,
            self.target,
            background,
            self._slopes,
            self._mean.numel(),
            self.gradient,
            self.first_errors,
            self._squared_fraction,
            sums,
            clock,
            STRIP=LANES,
            ROWS=self._rows,
            SQUARED=self._squared_fraction > 0,
        )

    def values(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, mean squared error of the clamped image) of every time and image, each float64 (times, images)."""
        counts = torch.tensor([3 * height * width for height, width in self.layout.sizes], device=sums.device)
        l1, ssim, squares = (sums / counts[None, :, None]).unbind(dim=2)
        return L1_WEIGHT * l1 + SSIM_WEIGHT * (1 - ssim), squares


def _divide_work(sizes: tuple[tuple[int, int], ...]) -> tuple[int, list[tuple[int, int, int]]]:
    """Rows per program, and the programs' (image, first row, first column · 3)."""
    strips = [-(-3 * width // LANES) for _, width in sizes]

    def programs(rows: int) -> int:
        return sum(-(-height // rows) * count for (height, _), count in zip(sizes, strips, strict=True))

    rows = next((rows for rows in SEGMENTS if programs(rows) >= ENOUGH_PROGRAMS), SEGMENTS[-1])
    work = [
        (image, first_row, strip * LANES)
        for image, (height, _) in enumerate(sizes)
        for first_row in range(0, height, rows)
        for strip in range(strips[image])
    ]
    return rows, work
