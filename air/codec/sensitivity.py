"""A quantiser whose steps follow from how much each number moves the picture.

A coarse step does little harm to a weak or wide Gaussian and much to a strong or thin one. With a Gaussian's strength
e = colour · sqrt(s1 s2), the squared change of the picture that a small error makes is, up to the factor π,

    strength            error²                      position along an axis   e² error² / (2 s²)
    log of a scale      ¾ e² error²                 angle                    ¼ e² (s1/s2 - s2/s1)² error²

So the strength is stored with one step for all Gaussians. It decides how many bits every other number of the Gaussian
needs for an error of the same size: the scales first, then the angle, then the position. Columns are rounded first, in
steps as coarse as the Gaussian's whole width allows; rows then follow the axis from the column that was stored, and
need only be as fine as the Gaussian is at that column.

The numbers of bits are computed in whole numbers, so that all decoders agree; docs/format.md specifies how. The wider
scale is the first one. This module knows nothing of files or of entropy coding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from air.codec.colour import BLUE_BY_CB, GREEN_BY_CB, GREEN_BY_CR, RED_BY_CR
from air.compute.bits import bit_length
from air.compute.compile import inline, kernel

SymbolTable = NDArray[np.int32]
"""One row per Gaussian, columns as below."""

LUMA, CR, CB, LOG_SCALE, LOG_RATIO, ANGLE, COLUMN, ROW = range(8)
SYMBOLS = 8

SUBDIVISIONS = 64
"""The finest log-scales in an octave, and the finest positions in a pixel."""

STEP_UNITS = 1 << 16
"""Units of a quantiser's step in a strength of 1."""

LOG_LEVELS = 12 * SUBDIVISIONS
"""Scales are 2^(k/64 - 3) pixels, k from 0 to LOG_LEVELS - 1: 1/8 to 507 pixels."""

MIN_SCALE, MAX_SCALE = 1 / 8, 500.0
"""Pixels; scales are moved into this range before they are quantised."""

MAX_SCALE_BITS = 6  # of an octave
OCTAVE_BITS = 4
MAX_ANGLE_BITS = 8
MIN_POSITION_BITS, MAX_POSITION_BITS = -4, 6  # steps of 16 pixels to 1/64
MAX_STRENGTH = (1 << 20) - 1
_MAX_ENERGY = 1 << 26
_MAX_WEIGHT = (1 << 12) - 1  # with _MAX_ENERGY, products stay below 2^63

_LUMA_WEIGHT, _CR_WEIGHT, _CB_WEIGHT = 6, 5, 7  # about twice the squared change of (R, G, B) by one of Y, Cr, Cb

# Tables of whole numbers: the nearest to the formula, which nowhere lies near the middle between two of them.
_OCTAVES = np.arange(LOG_LEVELS) / SUBDIVISIONS
SCALE = np.rint(2.0 ** (_OCTAVES + 20)).astype(np.int64)  # pixels · 2^23
SQUARED_SCALE = np.rint(4.0 ** (_OCTAVES - 3) * 4096).astype(np.int64)  # square pixels · 2^12
SQUARED_RATIO = np.rint(4.0**_OCTAVES * 256).astype(np.int64)  # (s1/s2)² · 2^8, by the log-ratio
ELONGATION = np.maximum(SQUARED_RATIO - 512 + 65536 // SQUARED_RATIO, 0)  # (s1/s2 - s2/s1)² · 2^8
SQUARED_COSINE = np.rint(np.cos(np.arange(256) * (math.pi / 256)) ** 2 * 4096).astype(np.int64)
AMPLITUDE = np.rint(2.0 ** (40 - np.arange(2 * LOG_LEVELS) / (2 * SUBDIVISIONS))).astype(np.int64)  # 1/sqrt(8s1 8s2)


@dataclass(frozen=True)
class SensitivityQuantizer:
    """The parameters that a file carries.

    Attributes:
        step: Of the strength, in units of 1 / STEP_UNITS.
        scale_weight, angle_weight, position_weight: Squared fineness of the other numbers, in units of 2^-8. The
            defaults make every number's error count as much as the strength's.
    """

    step: int
    scale_weight: int = 15
    angle_weight: int = 105
    position_weight: int = 21

    def __post_init__(self) -> None:
        limits = {"step": (1 << 24) - 1}
        for name in ("step", "scale_weight", "angle_weight", "position_weight"):
            most = limits.get(name, _MAX_WEIGHT)
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be from 1 to {most}, got {getattr(self, name)}")

    def weights(self) -> NDArray[np.int64]:
        """The weights of scales, angle and position, shape (3,)."""
        return np.array([self.scale_weight, self.angle_weight, self.position_weight], np.int64)


@inline
def _half_log2(value):
    """round(log2(value) / 2), 0 for 0: with it, 4^-bits is the error that `value` allows, to a factor of two."""
    return bit_length(value) >> 1


@inline
def _half_log2_of_quotient(dividend, divisor):
    """`_half_log2(dividend // divisor)`, both positive or the dividend zero; a division would take longer."""
    longer = bit_length(dividend) - bit_length(divisor)
    if longer < 0:
        return np.int64(0)
    return (longer + ((dividend >> longer) >= divisor)) >> 1


@kernel
def energy(luma, cr, cb):
    """How strong a Gaussian is: a weighted sum of its squared strengths, with a bound."""
    return min(_LUMA_WEIGHT * luma * luma + _CR_WEIGHT * cr * cr + _CB_WEIGHT * cb * cb, _MAX_ENERGY)


@kernel
def scale_bits(energy, weights):
    """Fraction bits of log2 of the scales."""
    return min(_half_log2(energy * weights[0] >> 8), MAX_SCALE_BITS)


@kernel
def angle_bits(energy, log_ratio, weights):
    """Half a turn is cut in 2^bits angles."""
    return min(_half_log2((energy * weights[1] >> 8) * ELONGATION[log_ratio] >> 8), MAX_ANGLE_BITS)


@kernel
def position_bits(energy, log_scale, log_ratio, angle, weights):
    """Fraction bits of column and row in pixels, possibly negative; the angle in 256ths of half a turn."""
    cosine = SQUARED_COSINE[angle]
    spread = (SQUARED_RATIO[log_ratio] * cosine + ((4096 - cosine) << 8)) >> 12
    across = max(SQUARED_SCALE[log_scale - log_ratio] * spread >> 8, 1)
    along = max((SQUARED_SCALE[log_scale] << 8) // spread, 1)
    need = (energy * weights[2]) << 12
    column_bits = min(max(_half_log2_of_quotient(need, across) - 4, MIN_POSITION_BITS), MAX_POSITION_BITS)
    row_bits = min(max(_half_log2_of_quotient(need, along) - 4, MIN_POSITION_BITS), MAX_POSITION_BITS)
    return column_bits, row_bits


@kernel
def cells(span, bits):
    """How many cells of 2^-bits pixels cover `span`, which is in 64ths of a pixel."""
    shift = MAX_POSITION_BITS - bits
    return (span + (1 << shift) - 1) >> shift


@kernel
def _shape(log_scale, log_ratio):
    """Both scales in pixels, exact: whole numbers over a power of two."""
    return SCALE[log_scale] / 8388608.0, SCALE[log_scale - log_ratio] / 8388608.0


@kernel
def _level(value, last):
    """The nearest whole number from 0 to `last`."""
    return min(max(np.int64(math.floor(value + 0.5)), 0), last)


@kernel
def quantize(parameters, corner, span, step, weights, symbols):
    """Fills `symbols` (N, 8) with the levels nearest to the parameters, each given the ones before it.

    Args:
        parameters: float64 (8, N): x, y, wider and other scale in pixels; angle in half turns; strength in Y, Cr, Cb.
        corner: int64 (2, N), where positions count from, in 64ths of a pixel.
        span: The range of positions from there, in 64ths of a pixel.
        step: Of the quantiser.
        weights: Of the quantiser.
        symbols: int32, filled. A Gaussian whose three strengths are zero is to be dropped.
    """
    unit = 65536.0 / step
    weights = (weights[0], weights[1], weights[2])
    for i in range(parameters.shape[1]):
        for k in range(3):
            level = math.floor(abs(parameters[5 + k, i]) * unit + 0.5)
            strength = np.int64(min(level, float(MAX_STRENGTH)))
            symbols[i, k] = strength if parameters[5 + k, i] >= 0 else -strength
        strong = energy(np.int64(symbols[i, LUMA]), np.int64(symbols[i, CR]), np.int64(symbols[i, CB]))
        bits = scale_bits(strong, weights)
        width = SUBDIVISIONS >> bits
        wide = (math.log2(parameters[2, i]) + 3.0) * SUBDIVISIONS
        narrow = (math.log2(parameters[3, i]) + 3.0) * SUBDIVISIONS
        log_scale = _level(wide / width, LOG_LEVELS // width - 1)
        log_ratio = _level(log_scale - narrow / width, log_scale)
        symbols[i, LOG_SCALE] = log_scale
        symbols[i, LOG_RATIO] = log_ratio
        log_scale *= width
        log_ratio *= width
        bits = angle_bits(strong, log_ratio, weights)
        angle = np.int64(math.floor(parameters[4, i] * (1 << bits) + 0.5)) & ((1 << bits) - 1)
        symbols[i, ANGLE] = angle
        angle <<= MAX_ANGLE_BITS - bits
        column_bits, row_bits = position_bits(strong, log_scale, log_ratio, angle, weights)
        width = 1 << (MAX_POSITION_BITS - column_bits)
        x = parameters[0, i] * SUBDIVISIONS - corner[0, i]
        column = min(max(np.int64(math.floor(x / width)), 0), cells(span, column_bits) - 1)
        symbols[i, COLUMN] = column
        # Along a slanted axis the row that fits depends on the column: follow it to the stored column.
        first, second = _shape(log_scale, log_ratio)
        cosine, sine = math.cos(angle * (math.pi / 256)), math.sin(angle * (math.pi / 256))
        variance = first * first * cosine * cosine + second * second * sine * sine
        slope = (first * first - second * second) * cosine * sine / variance
        width_of_row = 1 << (MAX_POSITION_BITS - row_bits)
        y = parameters[1, i] * SUBDIVISIONS - corner[1, i] + slope * ((column + 0.5) * width - x)
        symbols[i, ROW] = min(max(np.int64(math.floor(y / width_of_row)), 0), cells(span, row_bits) - 1)


@kernel
def dequantize(symbols, corner, step, weights, parameters):
    """Fills `parameters` (8, N), float64, with what the symbols stand for: x, y, scales, half turns, red, green, blue.

    Every operation is exact or rounded once, as docs/format.md states them, so that all machines agree.
    """
    weights = (weights[0], weights[1], weights[2])
    for i in range(symbols.shape[0]):
        strong = energy(np.int64(symbols[i, LUMA]), np.int64(symbols[i, CR]), np.int64(symbols[i, CB]))
        width = SUBDIVISIONS >> scale_bits(strong, weights)
        log_scale, log_ratio = symbols[i, LOG_SCALE] * width, symbols[i, LOG_RATIO] * width
        bits = angle_bits(strong, log_ratio, weights)
        angle = symbols[i, ANGLE] << (MAX_ANGLE_BITS - bits)
        column_bits, row_bits = position_bits(strong, log_scale, log_ratio, angle, weights)
        column_width = 1 << (MAX_POSITION_BITS - column_bits)
        row_width = 1 << (MAX_POSITION_BITS - row_bits)
        parameters[0, i] = (2 * (corner[0, i] + symbols[i, COLUMN] * column_width) + column_width) / 128.0
        parameters[1, i] = (2 * (corner[1, i] + symbols[i, ROW] * row_width) + row_width) / 128.0
        parameters[2, i], parameters[3, i] = _shape(log_scale, log_ratio)
        parameters[4, i] = angle / 256.0
        amplitude = AMPLITUDE[2 * log_scale - log_ratio] / 137438953472.0  # 2^37: scales count from 1/8 pixel
        luma = symbols[i, LUMA] * step / 65536.0 * amplitude
        cr = symbols[i, CR] * step / 65536.0 * amplitude
        cb = symbols[i, CB] * step / 65536.0 * amplitude
        parameters[5, i] = luma + RED_BY_CR * cr
        parameters[6, i] = luma + GREEN_BY_CR * cr + GREEN_BY_CB * cb
        parameters[7, i] = luma + BLUE_BY_CB * cb
