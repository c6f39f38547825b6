"""Compiled kernels of the CPU renderer: geometry, drawing, and gradients (method.md section 1).

With dx, dy the distance of a pixel from the centre, the exponent is written as a sum of two squares,

    q = ½ (κ dx² + c t²),   t = dy - m dx,   κ = 1/Σxx,   m = Σxy/Σxx,   c = Σxx/(s1² s2²),

which keeps its precision for thin Gaussians, where the three terms of dᵀ Σ⁻¹ d cancel.

Drawing cuts each Gaussian into strips of LANES columns and walks down the rows of a strip. There dx is constant, so
the weight w = exp(-q) follows a recurrence of two multiplications a row instead of an exponential:

    w(t+1) = w(t) · r(t),   r(t) = exp(-c (t + ½)),   r(t+1) = r(t) · exp(-c).

Errors grow with the square of the number of rows, and a weight that starts below the smallest float would stay zero,
so a walk is cut into *runs*, each started by true exponentials: of at most MAX_RUN_ROWS rows and 7 conditional
standard deviations, too few for a weight below 2⁻⁸⁶ to come back above 1/255. An image is drawn in bands of BAND_ROWS
rows, at whose borders runs start afresh, so every pixel's value is the same in whatever order they are drawn.

The backward pass gathers instead of scattering: it walks such runs over the image's gradient and sums moments in
registers, so there are no atomics and no dependence on the order of threads.

Most runs are a dozen rows long, so that starting and ending a run takes as long as its rows. Hence lists of runs are
made without branches, exponentials are short, and LLVM leaves loops as they are (`opaque`).

Tables are planar as `air.compute.planes` lays them out. Nothing here checks its arguments.
"""

from __future__ import annotations

import math

import numpy as np

from air.compute.compile import LANES, inline, kernel
from air.compute.planes import PAD_COLUMNS, PAD_ROWS
from air.compute.simd import (
    add_lane_sums,
    aligned_scratch,
    any_positive,
    ceil,
    exp,
    exp2_unclipped,
    floor,
    fma,
    lane_numbers,
    load,
    maximum,
    minimum,
    opaque,
    splat,
    sqrt,
    store,
    store_as_int,
    store_bytes_in_turn,
    where_ge,
)
from air.gaussians import SUPPORT_CUTOFF
from air.rendering.parameters import (
    BLUE,
    GREEN,
    HALF_TURNS,
    LARGEST_SCALE,
    RED,
    SCALE_1,
    SCALE_2,
    SMALLEST_SCALE,
    X,
    Y,
)

f32 = np.float32

# Rows of a geometry table, derived from the parameters.
CENTRE_X, CENTRE_Y, SLOPE, ROW_PRECISION, COLUMN_PRECISION, MINUS_DECAY = range(6)  # x, y, m, c, κ, exp(-c) - 1
HALF_WIDTH, HALF_HEIGHT, LAST_ROW_DX, ROW_VARIANCE, RUN_ROWS, MARGIN = range(6, 12)
BITS_DX, BITS_T = range(12, 14)  # w = 2 to the power (BITS_DX · dx² + BITS_T · t²)
GEOMETRY = 14

# Columns of the moment table, which is one row per Gaussian: Σ w g per channel; then sums of D = w · Σ g · colour.
MOMENTS = 8

MAX_RUN_ROWS = 32
"""Longer runs would let the rounding errors of the recurrence show."""

RUN_CAPACITY = 128
"""Runs collected before they are walked: few enough that their starts stay in the first cache."""

# What a run starts from: two vectors.
START_WEIGHT, START_RATIO = 0, LANES
START_SIZE = 2 * LANES

_CUTOFF = f32(SUPPORT_CUTOFF)
_REACH = f32(-2 * math.log(SUPPORT_CUTOFF))  # dᵀ Σ⁻¹ d on the border of the support
_HALF_BITS = f32(-0.5 / math.log(2))  # exp(-½ v) is 2 to the power _HALF_BITS · v
_LOWEST_BITS = f32(-86)
_SMALLEST_RATIO_BITS = f32(-126)  # 2⁻¹²⁶ is the smallest normal float
# Added to every weight, for the CPU takes a hundred cycles where it meets a subnormal number. A run multiplies it by
# less than 2⁸⁰ (from 2⁻⁸⁶ to below 1/255), which leaves nothing to be seen.
_SMALLEST_WEIGHT = f32(1e-36)
_OUTSIDE = f32(-1e4)  # below _LOWEST_BITS
_SMALLEST_SCALE, _LARGEST_SCALE = f32(SMALLEST_SCALE), f32(LARGEST_SCALE)
ZERO, HALF, ONE, TWO, PI = f32(0), f32(0.5), f32(1), f32(2), f32(math.pi)


@inline
def cos_sin(half_turns):
    """Cosine and sine of π · half_turns for |half_turns| <= ½, to 2e-7: least-squares polynomials in the square."""
    u = half_turns * half_turns
    sine = fma(u, f32(0.07765766233205795), splat(f32(-0.598291277885437)))
    sine = fma(sine, u, f32(2.550077438354492))
    sine = fma(sine, u, f32(-5.167710304260254))
    sine = fma(sine, u, f32(3.1415927410125732)) * half_turns
    cosine = fma(u, f32(-0.024396324530243874), splat(f32(0.23493731021881104)))
    cosine = fma(cosine, u, f32(-1.335211992263794))
    cosine = fma(cosine, u, f32(4.058709144592285))
    cosine = fma(cosine, u, f32(-4.934802055358887))
    cosine = fma(cosine, u, ONE)
    return cosine, sine


@kernel
def derive_geometry(parameters, geometry, first, end):
    """Fills the geometry of Gaussians first .. end - 1; both are multiples of LANES."""
    row = parameters.shape[1]
    for i in range(first, end, LANES):
        x = load(parameters, X * row + i)
        y = load(parameters, Y * row + i)
        scale_1 = maximum(minimum(load(parameters, SCALE_1 * row + i), _LARGEST_SCALE), _SMALLEST_SCALE)
        scale_2 = maximum(minimum(load(parameters, SCALE_2 * row + i), _LARGEST_SCALE), _SMALLEST_SCALE)
        cosine, sine = cos_sin(load(parameters, HALF_TURNS * row + i))
        variance_1 = scale_1 * scale_1
        variance_2 = scale_2 * scale_2
        cos2 = cosine * cosine
        sin2 = sine * sine
        sigma_xx = fma(cos2, variance_1, sin2 * variance_2)
        sigma_yy = fma(sin2, variance_1, cos2 * variance_2)
        sigma_xy = cosine * sine * (variance_1 - variance_2)
        kappa = splat(ONE) / sigma_xx
        row_variance = variance_1 * variance_2 * kappa
        c = splat(ONE) / row_variance
        half_width = sqrt(sigma_xx * _REACH)
        half_height = sqrt(sigma_yy * _REACH)
        # 1 - exp(-c) to full relative precision: r -= r · decay then follows exp(-c) even where that is almost 1.
        series = fma(c, f32(-1 / 24), splat(f32(1 / 6)))
        series = fma(series, c, f32(-0.5))
        series = fma(series, c, ONE) * c
        decay = where_ge(c, f32(0.05), splat(ONE) - exp(splat(ZERO) - c), series)
        store(geometry, CENTRE_X * row + i, x)
        store(geometry, CENTRE_Y * row + i, y)
        store(geometry, SLOPE * row + i, sigma_xy * kappa)
        store(geometry, ROW_PRECISION * row + i, c)
        store(geometry, COLUMN_PRECISION * row + i, kappa)
        store(geometry, MINUS_DECAY * row + i, splat(ZERO) - decay)
        store(geometry, BITS_DX * row + i, kappa * _HALF_BITS)
        store(geometry, BITS_T * row + i, c * _HALF_BITS)
        store(geometry, HALF_WIDTH * row + i, half_width)
        store(geometry, HALF_HEIGHT * row + i, half_height)
        store(geometry, LAST_ROW_DX * row + i, sigma_xy * _REACH / half_height)
        store(geometry, ROW_VARIANCE * row + i, row_variance)
        rows = floor(sqrt(row_variance) * f32(7))
        store(geometry, RUN_ROWS * row + i, maximum(minimum(rows, f32(MAX_RUN_ROWS)), ONE))
        # Rounding may move the computed border of the support; walking a row too many costs little, as each pixel
        # is tested again.
        size = maximum(x, splat(ZERO) - x) + maximum(y, splat(ZERO) - y) + half_width + half_height
        store(geometry, MARGIN * row + i, fma(size, f32(1e-6), f32(1e-3)))


@inline
def touches_rows(geometry, i, first_row, end_row):
    """Whether the support of one of Gaussians i .. i + LANES - 1 reaches into the rows first_row .. end_row - 1."""
    row = geometry.shape[1]
    y = load(geometry, CENTRE_Y * row + i)
    reach = load(geometry, HALF_HEIGHT * row + i) + load(geometry, MARGIN * row + i)
    above = where_ge(y + reach, f32(first_row), splat(ONE), ZERO)
    return any_positive(where_ge(f32(end_row - 1), y - reach, above, ZERO))


@inline
def column_range(geometry, i, width):
    """Leftmost columns of Gaussians i .. i + LANES - 1, and their numbers of strips.

    Both are zero for a Gaussian that is not finite.
    """
    row = geometry.shape[1]
    x = load(geometry, CENTRE_X * row + i)
    reach = load(geometry, HALF_WIDTH * row + i) + load(geometry, MARGIN * row + i)
    left = maximum(ceil(x - reach), ZERO)
    right = minimum(floor(x + reach), f32(width - 1))
    strips = where_ge(right, left, floor((right - left) * f32(1 / LANES)) + ONE, ZERO)
    return where_ge(strips, HALF, left, ZERO), strips


@inline
def row_range(geometry, i, left, first_row, end_row):
    """First and last of the rows first_row .. end_row - 1 in strips of Gaussians i .. i + LANES - 1.

    The strips start at the columns `left`. Where a strip touches none of the rows, the last comes before the first.
    """
    row = geometry.shape[1]
    x = load(geometry, CENTRE_X * row + i)
    y = load(geometry, CENTRE_Y * row + i)
    slope = load(geometry, SLOPE * row + i)
    kappa = load(geometry, COLUMN_PRECISION * row + i)
    half_width = load(geometry, HALF_WIDTH * row + i)
    last_row_dx = load(geometry, LAST_ROW_DX * row + i)
    row_variance = load(geometry, ROW_VARIANCE * row + i)
    margin = load(geometry, MARGIN * row + i)
    # The support's border over the columns dx is m·dx ± sqrt((reach - κ dx²)/c); each sign has one extremum, so
    # the extreme row of a strip is at that point clamped into the strip.
    start = left - x
    stop = minimum(start + f32(LANES - 1), half_width)
    start = maximum(start, splat(ZERO) - half_width)
    low = minimum(maximum(last_row_dx, start), stop)
    high = minimum(maximum(splat(ZERO) - last_row_dx, start), stop)
    below = sqrt(maximum(splat(_REACH) - kappa * low * low, ZERO) * row_variance)
    above = sqrt(maximum(splat(_REACH) - kappa * high * high, ZERO) * row_variance)
    last = floor(fma(slope, low, y) + below + margin)
    first = ceil(fma(slope, high, y) - above - margin)
    # A bound replaces a number that is not finite.
    last = minimum(maximum(last, f32(-1)), f32(end_row - 1))
    return maximum(minimum(first, f32(end_row)), f32(first_row)), last


@inline
def start_runs(runs, count, geometry, starts, width):
    """Fills `starts` with (w, r) of the first LANES pixels of each run, from true exponentials.

    Both are zero where the run never shows: too far away, or beyond the image's width.

    All runs at once, since this loop has no branches: started one by one, the exponentials would be thrown away
    whenever the CPU guesses the length of the preceding run wrongly.
    """
    for k in range(count):
        gaussian = runs[k, 0]
        bits_t = geometry[BITS_T, gaussian]
        columns = lane_numbers() + f32(runs[k, 1])
        dx = columns - geometry[CENTRE_X, gaussian]
        t = fma(dx, -geometry[SLOPE, gaussian], f32(runs[k, 2]) - geometry[CENTRE_Y, gaussian])
        bits = fma(dx * dx, geometry[BITS_DX, gaussian], t * t * bits_t)
        # Where the weight is above 2 to the power _LOWEST_BITS, the ratio is below 2¹²⁶.
        ratio_bits = maximum(fma(t, TWO, ONE) * bits_t, _SMALLEST_RATIO_BITS)
        key = where_ge(f32(width - 1), columns, bits, _OUTSIDE)
        store(starts, k * START_SIZE + START_WEIGHT, where_ge(key, _LOWEST_BITS, exp2_unclipped(bits), ZERO))
        store(starts, k * START_SIZE + START_RATIO, where_ge(key, _LOWEST_BITS, exp2_unclipped(ratio_bits), ZERO))


@kernel
def draw_runs(runs, starts, count, parameters, geometry, planes, top, width):
    """Adds the pixels of `count` runs (Gaussian, column, first row, rows) to planes that start with row `top`."""
    stride = planes.shape[2]
    plane = planes.shape[1] * stride
    origin = (PAD_ROWS - top) * stride + PAD_COLUMNS
    smallest = splat(_SMALLEST_WEIGHT)
    start_runs(runs, count, geometry, starts, width)
    for k in range(count):
        gaussian = runs[k, 0]
        weight = load(starts, k * START_SIZE + START_WEIGHT)
        ratio = load(starts, k * START_SIZE + START_RATIO)
        red = splat(parameters[RED, gaussian])
        green = splat(parameters[GREEN, gaussian])
        blue = splat(parameters[BLUE, gaussian])
        minus_decay = splat(geometry[MINUS_DECAY, gaussian])
        pixel = origin + runs[k, 2] * stride + runs[k, 1]
        end = pixel + runs[k, 3] * stride
        while pixel != end:
            visible = where_ge(weight, _CUTOFF, weight, ZERO)
            store(planes, pixel, fma(visible, red, load(planes, pixel)))
            store(planes, pixel + plane, fma(visible, green, load(planes, pixel + plane)))
            store(planes, pixel + 2 * plane, fma(visible, blue, load(planes, pixel + 2 * plane)))
            weight = fma(weight, ratio, smallest)
            ratio = fma(ratio, minus_decay, ratio)
            pixel = opaque(pixel + stride)


@kernel
def gather_runs(runs, starts, count, parameters, geometry, planes, moments, width):
    """Adds the moments of the image gradient in `planes` under `count` runs to their Gaussians' moments."""
    stride = planes.shape[2]
    plane = planes.shape[1] * stride
    origin = PAD_ROWS * stride + PAD_COLUMNS
    smallest = splat(_SMALLEST_WEIGHT)
    start_runs(runs, count, geometry, starts, width)
    for k in range(count):
        gaussian = runs[k, 0]
        weight = load(starts, k * START_SIZE + START_WEIGHT)
        ratio = load(starts, k * START_SIZE + START_RATIO)
        red = splat(parameters[RED, gaussian])
        green = splat(parameters[GREEN, gaussian])
        blue = splat(parameters[BLUE, gaussian])
        minus_decay = splat(geometry[MINUS_DECAY, gaussian])
        pixel = origin + runs[k, 2] * stride + runs[k, 1]
        end = pixel + runs[k, 3] * stride
        sum_red = splat(ZERO)
        sum_green = splat(ZERO)
        sum_blue = splat(ZERO)
        sum_t = splat(ZERO)
        sum_tt = splat(ZERO)
        dx = lane_numbers() + f32(runs[k, 1]) - geometry[CENTRE_X, gaussian]
        t = fma(dx, -geometry[SLOPE, gaussian], f32(runs[k, 2]) - geometry[CENTRE_Y, gaussian])
        while pixel != end:
            visible = where_ge(weight, _CUTOFF, weight, ZERO)
            grad_red = load(planes, pixel)
            grad_green = load(planes, pixel + plane)
            grad_blue = load(planes, pixel + 2 * plane)
            sum_red = fma(visible, grad_red, sum_red)
            sum_green = fma(visible, grad_green, sum_green)
            sum_blue = fma(visible, grad_blue, sum_blue)
            along = fma(grad_blue, blue, fma(grad_green, green, grad_red * red))
            dt = visible * t * along
            sum_t = sum_t + dt
            sum_tt = fma(dt, t, sum_tt)
            weight = fma(weight, ratio, smallest)
            ratio = fma(ratio, minus_decay, ratio)
            t = t + ONE
            pixel = opaque(pixel + stride)
        sum_d = fma(sum_blue, blue, fma(sum_green, green, sum_red * red))
        sum_dx = sum_d * dx
        add_lane_sums(
            moments, MOMENTS * gaussian, sum_red, sum_green, sum_blue, sum_dx, sum_t, sum_dx * dx, sum_t * dx, sum_tt
        )


@kernel
def sweep(parameters, geometry, planes, top, moments, width, first, end, first_row, end_row, gather):
    """Draws Gaussians first .. end - 1 into rows first_row .. end_row - 1, or gathers their moments from them.

    Drawing (`gather` false) adds to `planes`; the rows must be one band, from a multiple of BAND_ROWS to the next or
    to the height. Gathering reads the image gradient from `planes` and overwrites the `moments` of these
    Gaussians. `first` and `end` are multiples of LANES.
    """
    padded = geometry.shape[1]
    columns = np.empty(LANES, np.int32)
    firsts = np.empty(LANES, np.int32)
    counts = np.empty(LANES, np.int32)
    runs = np.empty((RUN_CAPACITY + LANES, 4), np.uint32)
    starts = aligned_scratch((RUN_CAPACITY + LANES) * START_SIZE)
    pending = 0
    if gather:
        moments[first:end] = ZERO
    for i in range(first, end, LANES):
        # Neighbours in the table are mostly neighbours in the image: a band skips most Gaussians of other bands here.
        if not touches_rows(geometry, i, first_row, end_row):
            continue
        most_rows = load(geometry, RUN_ROWS * padded + i)
        left, strips = column_range(geometry, i, width)
        while any_positive(strips):
            row, last = row_range(geometry, i, left, first_row, end_row)
            rows = where_ge(strips, HALF, last - row + ONE, ZERO)
            while any_positive(rows):
                run_rows = maximum(minimum(most_rows, rows), ZERO)
                store_as_int(columns, 0, left)
                store_as_int(firsts, 0, row)
                store_as_int(counts, 0, run_rows)
                # Every lane is written, and the next one overwrites a lane without rows: no branch to guess wrongly.
                for lane in range(LANES):
                    runs[pending, 0] = i + lane
                    runs[pending, 1] = columns[lane]
                    runs[pending, 2] = firsts[lane]
                    runs[pending, 3] = counts[lane]
                    pending += counts[lane] > 0
                if pending >= RUN_CAPACITY:
                    if gather:
                        gather_runs(runs, starts, pending, parameters, geometry, planes, moments, width)
                    else:
                        draw_runs(runs, starts, pending, parameters, geometry, planes, top, width)
                    pending = 0
                row = row + run_rows
                rows = rows - run_rows
            left = left + f32(LANES)
            strips = strips - ONE
    if gather:
        gather_runs(runs, starts, pending, parameters, geometry, planes, moments, width)
    else:
        draw_runs(runs, starts, pending, parameters, geometry, planes, top, width)


@kernel
def chain_to_parameters(parameters, geometry, moments, gradient, first, end):
    """Gradient table (rows as the parameters; the angle's per radian) of Gaussians first .. end - 1 from their moments.

    With w = exp(-½ (κ dx² + c t²)) and M· = Σ D ·, the derivatives with respect to (x, y, κ, m, c) are
    κ Mdx - c m Mt, c Mt, -½ Mdxdx, c Mdxt and -½ Mtt; then through A = Σxx, B = Σxy to scales and angle.
    """
    row = parameters.shape[1]
    planar = np.empty(MOMENTS * LANES, np.float32)
    for i in range(first, end, LANES):
        for lane in range(LANES):
            for k in range(MOMENTS):
                planar[k * LANES + lane] = moments[i + lane, k]
        moment_x = load(planar, 3 * LANES)
        moment_t = load(planar, 4 * LANES)
        grad_kappa = load(planar, 5 * LANES) * f32(-0.5)
        moment_xt = load(planar, 6 * LANES)
        grad_c = load(planar, 7 * LANES) * f32(-0.5)
        kappa = load(geometry, COLUMN_PRECISION * row + i)
        slope = load(geometry, SLOPE * row + i)
        c = load(geometry, ROW_PRECISION * row + i)
        scale_1 = load(parameters, SCALE_1 * row + i)
        scale_2 = load(parameters, SCALE_2 * row + i)
        cosine, sine = cos_sin(load(parameters, HALF_TURNS * row + i))
        grad_y = c * moment_t
        grad_slope = c * moment_xt
        grad_a = (grad_c * c - kappa * grad_kappa - slope * grad_slope) * kappa
        grad_b = grad_slope * kappa
        cos_times_sin = cosine * sine
        cos2 = cosine * cosine
        sin2 = sine * sine
        grad_variance_1 = fma(grad_a, cos2, grad_b * cos_times_sin) - grad_c * c / (scale_1 * scale_1)
        grad_variance_2 = fma(grad_a, sin2, splat(ZERO) - grad_b * cos_times_sin) - grad_c * c / (scale_2 * scale_2)
        turn = grad_b * (cos2 - sin2) - grad_a * cos_times_sin * TWO
        store(gradient, X * row + i, kappa * moment_x - slope * grad_y)
        store(gradient, Y * row + i, grad_y)
        store(gradient, SCALE_1 * row + i, grad_variance_1 * scale_1 * TWO)
        store(gradient, SCALE_2 * row + i, grad_variance_2 * scale_2 * TWO)
        store(gradient, HALF_TURNS * row + i, (scale_1 * scale_1 - scale_2 * scale_2) * turn)
        store(gradient, RED * row + i, load(planar, 0))
        store(gradient, GREEN * row + i, load(planar, LANES))
        store(gradient, BLUE * row + i, load(planar, 2 * LANES))


@kernel
def round_to_levels(planes, levels):
    """Fills `levels` (rows, columns, 3), uint8, with the first rows of planes: 0 to 1 are the levels 0 to 255."""
    rows, columns, _ = levels.shape
    stride = planes.shape[2]
    plane = planes.shape[1] * stride
    # The last vector of a row would reach into the next one.
    block = np.empty((1, 3 * LANES), np.uint8)
    for row in range(rows):
        pixel = (PAD_ROWS + row) * stride + PAD_COLUMNS
        for column in range(0, columns, LANES):
            red = _level(load(planes, pixel + column))
            green = _level(load(planes, pixel + plane + column))
            blue = _level(load(planes, pixel + 2 * plane + column))
            if column + LANES <= columns:
                store_bytes_in_turn(levels, 3 * (row * columns + column), red, green, blue)
            else:
                store_bytes_in_turn(block, 0, red, green, blue)
                for k in range(3 * (columns - column)):
                    levels[row, column + k // 3, k % 3] = block[0, k]


@inline
def _level(value):
    return maximum(minimum(value, ONE), ZERO) * f32(255) + HALF
