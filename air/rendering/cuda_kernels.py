"""Triton kernels of the CUDA renderer: geometry, drawing, gradients (method.md section 1).

With dx, dy the distance of a pixel from the centre, the exponent is written as a sum of two squares,

    q = ½ (κ dx² + c t²),   t = dy - m dx,   κ = 1/Σxx,   m = Σxy/Σxx,   c = Σxx/(s1² s2²),

which keeps its precision for thin Gaussians, where the three terms of dᵀ Σ⁻¹ d cancel.

- `draw`, for training: one program per Gaussian adds its pixels with atomics, one 16-byte addition a pixel from
  compute capability 9.0 on. No lists, no host; but float additions in no fixed order, so the last bits of a sum vary.
- `draw_tiles`, for final pictures: one program per tile of pixels adds the Gaussians of the tile's list in the list's
  order. Deterministic.
- `gather`: one program per Gaussian reads the image's gradient under it and sums in registers. No atomics.

A table of Gaussians is float32 (N, 8), one row each: x, y, the scales, the angle in half turns within ±½, and the
colour. Images lie as in `air.compute.ragged`. Nothing here checks its arguments. Importing this module needs triton.
"""

# triton's language has no types that a checker understands.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import math

import triton
import triton.language as tl

from air.compute.ragged import HEIGHT, IMAGE_COLUMNS, ORIGIN, PIXEL, STRIDE, WIDTH
from air.gaussians import SUPPORT_CUTOFF
from air.rendering.parameters import LARGEST_SCALE, SMALLEST_SCALE

# Kernels read global numbers only as tl.constexpr.
PARAMETERS = tl.constexpr(8)
X, Y, SCALE_1, SCALE_2, HALF_TURNS, COLOUR = (tl.constexpr(column) for column in range(6))

# Columns of the geometry table that `draw_tiles` reads, (N, 8): centre, m, κ, c, and half the support's box.
CENTRE_X, CENTRE_Y, SLOPE, COLUMN_PRECISION, ROW_PRECISION = (tl.constexpr(column) for column in range(5))
HALF_WIDTH, HALF_HEIGHT = tl.constexpr(5), tl.constexpr(6)
GEOMETRY = tl.constexpr(8)

BLOCK_ROWS, BLOCK_COLUMNS = 8, 16
"""Pixels that a program of `draw` or `gather` handles at a time; a usual Gaussian needs about four such blocks."""

TILE = 16
"""Edge of a tile in pixels."""

_CUTOFF = tl.constexpr(SUPPORT_CUTOFF)
_REACH = tl.constexpr(-2 * math.log(SUPPORT_CUTOFF))  # dᵀ Σ⁻¹ d on the border of the support
_PI = tl.constexpr(math.pi)
_SMALLEST_SCALE, _LARGEST_SCALE = tl.constexpr(SMALLEST_SCALE), tl.constexpr(LARGEST_SCALE)


@triton.jit
def shear(scale_1, scale_2, half_turns):
    """(Σxx, Σyy, m, κ, c) of Gaussians."""
    scale_1 = tl.minimum(tl.maximum(scale_1, _SMALLEST_SCALE), _LARGEST_SCALE)
    scale_2 = tl.minimum(tl.maximum(scale_2, _SMALLEST_SCALE), _LARGEST_SCALE)
    cosine = tl.cos(half_turns * _PI)
    sine = tl.sin(half_turns * _PI)
    variance_1 = scale_1 * scale_1
    variance_2 = scale_2 * scale_2
    sigma_xx = cosine * cosine * variance_1 + sine * sine * variance_2
    sigma_yy = sine * sine * variance_1 + cosine * cosine * variance_2
    sigma_xy = cosine * sine * (variance_1 - variance_2)
    kappa = 1.0 / sigma_xx
    # Not Σxx / (s1² s2²): the product of two small variances may be too small for a float.
    c = sigma_xx / variance_1 / variance_2
    return sigma_xx, sigma_yy, sigma_xy * kappa, kappa, c


@triton.jit
def half_box(x, y, sigma_xx, sigma_yy):
    """Half width and height in pixels of the box around the support, a little more than exact.

    Rounding may move the computed border of the support; a pixel too many costs little, as each is tested again.
    """
    half_width = tl.sqrt(sigma_xx * _REACH)
    half_height = tl.sqrt(sigma_yy * _REACH)
    margin = 1e-3 + 1e-6 * (tl.abs(x) + tl.abs(y) + half_width + half_height)
    return half_width + margin, half_height + margin


@triton.jit
def pixel_range(centre, half, size):
    """First and last pixel, as integers, of centre ± half in 0 .. size - 1; the first is above the last if none.

    Comparisons instead of minimum and maximum, so that a centre that is not a number gives a range inside the image.
    """
    limit = size.to(tl.float32)
    first = tl.ceil(centre - half)
    last = tl.floor(centre + half)
    first = tl.where(first > 0, first, 0.0)
    first = tl.where(first < limit, first, limit)
    last = tl.where(last < limit - 1, last, limit - 1)
    last = tl.where(last > -1, last, -1.0)
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def load_support(row, image):
    """Centre, m, κ, c and range of pixels of the Gaussian at `row` of a table, in the image at `image` of another."""
    x = tl.load(row + X)
    y = tl.load(row + Y)
    sigma_xx, sigma_yy, m, kappa, c = shear(tl.load(row + SCALE_1), tl.load(row + SCALE_2), tl.load(row + HALF_TURNS))
    half_width, half_height = half_box(x, y, sigma_xx, sigma_yy)
    left, right = pixel_range(x, half_width, tl.load(image + WIDTH))
    top, bottom = pixel_range(y, half_height, tl.load(image + HEIGHT))
    return x, y, m, kappa, c, left, right, top, bottom


@triton.jit
def load_colour(row):
    """Red, green, blue and 0, shape (PIXEL,)."""
    channel = tl.arange(0, PIXEL)
    return tl.load(row + COLOUR + channel, mask=channel < 3, other=0.0)


@triton.jit
def weigh(x, y, m, kappa, c, rows, columns):
    """(w, dx, t) at pixels; w is zero outside the support, and where it is not a number."""
    dx = columns.to(tl.float32) - x
    t = (rows.to(tl.float32) - y) - m * dx
    weight = tl.exp(-0.5 * (kappa * dx * dx + c * t * t))
    return tl.where(weight >= _CUTOFF, weight, 0.0), dx, t


@triton.jit
def draw(parameters, image_of, images, planes, clock, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds Gaussian number program_id to its image, in blocks of ROWS x COLUMNS pixels; adds 1 to the clock.

    `image_of` (N,) is the row of `images` that each Gaussian belongs to.
    """
    gaussian = tl.program_id(0)
    if gaussian == 0:
        # No other program of this kernel reads the clock.
        tl.store(clock, tl.load(clock) + 1)
    row = parameters + gaussian * PARAMETERS
    image = images + tl.load(image_of + gaussian) * IMAGE_COLUMNS
    x, y, m, kappa, c, left, right, top, bottom = load_support(row, image)
    colour = load_colour(row)[None, None, :]
    stride = tl.load(image + STRIDE).to(tl.int32)
    pixels = planes + tl.load(image + ORIGIN) * PIXEL
    channel = tl.arange(0, PIXEL)[None, None, :]
    for first_row in range(top, bottom + 1, ROWS):
        for first_column in range(left, right + 1, COLUMNS):
            rows = first_row + tl.arange(0, ROWS)[:, None]
            columns = first_column + tl.arange(0, COLUMNS)[None, :]
            weight, _, _ = weigh(x, y, m, kappa, c, rows, columns)
            inside = (weight > 0) & (rows <= bottom) & (columns <= right)
            place = (rows * stride + columns)[:, :, None] * PIXEL + channel
            tl.atomic_add(pixels + place, weight[:, :, None] * colour, mask=inside[:, :, None], sem="relaxed")


@triton.jit
def gather_gradient(row, image, gradient, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Gradient with respect to the 8 parameters (the angle's per radian) of the Gaussian at `row`, shape (8,).

    `gradient` holds the gradient with respect to the image's pixels.

    With D = w · Σ g · colour at a pixel and M· = Σ D ·, the derivatives with respect to (x, y, κ, m, c) are
    κ Mdx - c m Mt, c Mt, -½ Mdxdx, c Mdxt and -½ Mtt; then through A = Σxx, B = Σxy to scales and angle.
    """
    x, y, m, kappa, c, left, right, top, bottom = load_support(row, image)
    colour = load_colour(row)[None, None, :]
    stride = tl.load(image + STRIDE).to(tl.int32)
    pixels = gradient + tl.load(image + ORIGIN) * PIXEL
    channel = tl.arange(0, PIXEL)[None, None, :]
    by_colour = tl.zeros((ROWS, COLUMNS, PIXEL), tl.float32)
    sum_x = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_t = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_xx = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_xt = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_tt = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first_row in range(top, bottom + 1, ROWS):
        for first_column in range(left, right + 1, COLUMNS):
            rows = first_row + tl.arange(0, ROWS)[:, None]
            columns = first_column + tl.arange(0, COLUMNS)[None, :]
            weight, dx, t = weigh(x, y, m, kappa, c, rows, columns)
            inside = (weight > 0) & (rows <= bottom) & (columns <= right)
            place = (rows * stride + columns)[:, :, None] * PIXEL + channel
            # Where the mask is off, the gradient is 0, so nothing is added.
            weighted = weight[:, :, None] * tl.load(pixels + place, mask=inside[:, :, None], other=0.0)
            by_colour += weighted
            along = tl.sum(weighted * colour, axis=2)
            sum_x += along * dx
            sum_t += along * t
            sum_xx += along * dx * dx
            sum_xt += along * dx * t
            sum_tt += along * t * t
    moment_t = tl.sum(sum_t)
    grad_y = c * moment_t
    grad_x = kappa * tl.sum(sum_x) - m * grad_y
    grad_kappa = -0.5 * tl.sum(sum_xx)
    grad_slope = c * tl.sum(sum_xt)
    grad_c = -0.5 * tl.sum(sum_tt)

    scale_1 = tl.load(row + SCALE_1)
    scale_2 = tl.load(row + SCALE_2)
    half_turns = tl.load(row + HALF_TURNS)
    cosine = tl.cos(half_turns * _PI)
    sine = tl.sin(half_turns * _PI)
    grad_a = (grad_c * c - kappa * grad_kappa - m * grad_slope) * kappa
    grad_b = grad_slope * kappa
    # 2 s ∂/∂s², where c contains 1/s² for itself.
    grad_scale_1 = 2 * scale_1 * (cosine * cosine * grad_a + cosine * sine * grad_b) - 2 * grad_c * c / scale_1
    grad_scale_2 = 2 * scale_2 * (sine * sine * grad_a - cosine * sine * grad_b) - 2 * grad_c * c / scale_2
    turn = grad_b * (cosine * cosine - sine * sine) - 2 * grad_a * cosine * sine
    grad_angle = (scale_1 * scale_1 - scale_2 * scale_2) * turn

    grad_colour = tl.sum(tl.sum(by_colour, axis=1), axis=0)
    colour_channel = tl.arange(0, PIXEL)
    column = tl.arange(0, PARAMETERS)
    result = tl.where(column == X, grad_x, 0.0)
    result = tl.where(column == Y, grad_y, result)
    result = tl.where(column == SCALE_1, grad_scale_1, result)
    result = tl.where(column == SCALE_2, grad_scale_2, result)
    result = tl.where(column == HALF_TURNS, grad_angle, result)
    for k in tl.static_range(3):
        one = tl.sum(tl.where(colour_channel == k, grad_colour, 0.0))
        result = tl.where(column == COLOUR + k, one, result)
    return result


@triton.jit
def gather(parameters, image_of, images, planes, gradient, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row program_id of the parameters' `gradient` (N, 8) from the images' gradient in `planes`."""
    gaussian = tl.program_id(0)
    image = images + tl.load(image_of + gaussian) * IMAGE_COLUMNS
    row = parameters + gaussian * PARAMETERS
    found = gather_gradient(row, image, planes, ROWS, COLUMNS)
    tl.store(gradient + gaussian * PARAMETERS + tl.arange(0, PARAMETERS), found)


@triton.jit
def derive_geometry(parameters, geometry, count, BLOCK: tl.constexpr):
    """The geometry table of `count` Gaussians from their parameters, BLOCK of them per program."""
    gaussian = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = gaussian < count
    row = parameters + gaussian * PARAMETERS
    x = tl.load(row + X, mask=exists, other=0.0)
    y = tl.load(row + Y, mask=exists, other=0.0)
    scale_1 = tl.load(row + SCALE_1, mask=exists, other=1.0)
    scale_2 = tl.load(row + SCALE_2, mask=exists, other=1.0)
    half_turns = tl.load(row + HALF_TURNS, mask=exists, other=0.0)
    sigma_xx, sigma_yy, m, kappa, c = shear(scale_1, scale_2, half_turns)
    half_width, half_height = half_box(x, y, sigma_xx, sigma_yy)
    out = geometry + gaussian * GEOMETRY
    tl.store(out + CENTRE_X, x, mask=exists)
    tl.store(out + CENTRE_Y, y, mask=exists)
    tl.store(out + SLOPE, m, mask=exists)
    tl.store(out + COLUMN_PRECISION, kappa, mask=exists)
    tl.store(out + ROW_PRECISION, c, mask=exists)
    tl.store(out + HALF_WIDTH, half_width, mask=exists)
    tl.store(out + HALF_HEIGHT, half_height, mask=exists)


@triton.jit
def draw_tiles(parameters, geometry, starts, members, image, height, width, tile_columns, SIDE: tl.constexpr):
    """Sets tile number program_id (row-major) of an image (3, height, width) to the sum of the tile's Gaussians.

    They are members[starts[tile]] .. members[starts[tile + 1] - 1], added in that order.
    """
    tile = tl.program_id(0)
    rows = tile // tile_columns * SIDE + tl.arange(0, SIDE)[:, None]
    columns = tile % tile_columns * SIDE + tl.arange(0, SIDE)[None, :]
    red = tl.zeros((SIDE, SIDE), tl.float32)
    green = tl.zeros((SIDE, SIDE), tl.float32)
    blue = tl.zeros((SIDE, SIDE), tl.float32)
    for position in range(tl.load(starts + tile), tl.load(starts + tile + 1)):
        gaussian = tl.load(members + position)
        shape = geometry + gaussian * GEOMETRY
        weight, _, _ = weigh(
            tl.load(shape + CENTRE_X),
            tl.load(shape + CENTRE_Y),
            tl.load(shape + SLOPE),
            tl.load(shape + COLUMN_PRECISION),
            tl.load(shape + ROW_PRECISION),
            rows,
            columns,
        )
        colour = parameters + gaussian * PARAMETERS + COLOUR
        red += weight * tl.load(colour)
        green += weight * tl.load(colour + 1)
        blue += weight * tl.load(colour + 2)
    inside = (rows < height) & (columns < width)
    pixel = image + rows * width + columns
    plane = height * width
    tl.store(pixel, red, mask=inside)
    tl.store(pixel + plane, green, mask=inside)
    tl.store(pixel + 2 * plane, blue, mask=inside)
