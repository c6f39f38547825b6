"""Sections of .air files: which patches hold a Gaussian of a stage, and its symbols, in the contexts of what is around.

What is known of a Gaussian's neighbours tells a good deal about it: strengths, sizes and colours are alike from patch
to patch and from stage to stage. This module chooses the contexts and remembers the newest Gaussian of every patch; the
coding itself is `air.entropy`'s. docs/format.md is the specification.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from air.entropy import (
    CODED,
    Models,
    bit_length,
    code_flag,
    code_magnitude,
    code_tree,
    coder_state,
    finish_encoding,
    start_decoding,
    start_registers,
)
from air.errors import CodecError
from air.render.simd import kernel
from air.sensitivity import (
    ANGLE,
    CB,
    COLUMN,
    CR,
    LOG_LEVELS,
    LOG_RATIO,
    LOG_SCALE,
    LUMA,
    MOST_ANGLE_BITS,
    OCTAVE_BITS,
    ROW,
    SUBDIVISIONS,
    SYMBOLS,
    SymbolTable,
    angle_bits,
    cells,
    energy,
    position_bits,
    scale_bits,
)

MASK = CODED - 1

# What is remembered of the newest Gaussian of each patch.
_COUNT, _LAYER, _Y, _R, _B, _SCALE, _RATIO, _TURN, _X, _YPOS = range(10)
_FEATURES = 10


@kernel
def _sign(value):
    return 1 if value > 0 else (-1 if value < 0 else 0)


@kernel
def _same(first, second):
    """0 for signs that differ, 2 for equal ones, 1 where there is none to compare."""
    return 1 + _sign(first) * _sign(second)


@kernel
def _code_signed(decode, value, coded, contexts, negative_like, sign_contexts, state):
    """A number of either sign; the decision about the sign is whether it differs from that of `negative_like`."""
    magnitude = code_magnitude(decode, abs(value), coded, contexts, state)
    if magnitude == 0:
        return magnitude
    expected = -1 if negative_like < 0 else 1
    bit = 1 if _sign(value) != expected else 0
    bit = code_flag(decode, bit, coded, 1023, sign_contexts, state)
    return -expected * magnitude if bit else expected * magnitude


@kernel
def code_section(decode, layer, rows, columns, plan, mask, symbols, features, state):
    """Codes one section: patch by patch in row-major order the mask, and the symbols of the patches that it has.

    Args:
        decode: False reads `mask` and `symbols` and writes `data`; True the reverse.
        layer: The section's number, from 0.
        rows: Of the patch grid.
        columns: Of the patch grid.
        plan: int64 numbers: the kind of quantiser (1 by sensitivity, 0 uniform); the span of positions; the three
            weights; the bits of the uniform quantiser's eight channels.
        mask: uint8 (patches,).
        symbols: int32 (N, 8); columns as in `air.sensitivity`.
        features: int16 (patches + 1, _FEATURES), zero at the start of a file; the last row stays zero.
        state: See `air.entropy.coder_state`; its data is room enough for what is written, or the section.

    Returns:
        How many Gaussians the mask has. Decoding stops as soon as there are more than `symbols` has rows.
    """
    by_sensitivity = plan[0] == 1
    span = plan[1]
    weights = plan[2:5]
    nothing = rows * columns
    count = 0
    for patch in range(rows * columns):
        column = patch % columns
        left = patch - 1 if column > 0 else nothing
        up = patch - columns if patch >= columns else nothing
        up_left = up - 1 if up != nothing and column > 0 else nothing
        up_right = up + 1 if up != nothing and column + 1 < columns else nothing
        right = patch + 1 if column + 1 < columns else nothing
        down = patch + columns if patch + columns < rows * columns else nothing
        own = features[patch]
        a, b = features[left], features[up]
        now = layer + 1
        held = min(own[_COUNT], 3)
        before = 1 if own[_LAYER] == layer and layer > 0 else 0
        around = 2 * a[_COUNT] + 2 * b[_COUNT] + features[up_left][_COUNT] + features[up_right][_COUNT]
        around += features[right][_COUNT] + features[down][_COUNT]
        contexts = (
            (a[_LAYER] == now) + 2 * (b[_LAYER] == now) + 4 * before + 8 * min(layer, 3),
            (features[up_left][_LAYER] == now)
            + 2 * (features[up_right][_LAYER] == now)
            + 4 * (features[right][_LAYER] == layer)
            + 8 * held,
            min(around, 15) + 16 * before,
        )
        bit = 0 if decode else np.int64(mask[patch])
        bit = code_flag(decode, bit, MASK, 0, contexts, state)
        if decode:
            mask[patch] = bit
        if bit == 0:
            continue
        if count == symbols.shape[0]:
            return count + 1
        row = symbols[count]
        count += 1
        own_y, own_r, own_b = bit_length(own[_Y]), bit_length(own[_R]), bit_length(own[_B])

        # Strength.
        a_y, b_y = bit_length(a[_Y]), bit_length(b[_Y])
        contexts = (
            min(own_y, 7) + 8 * held,
            min((a_y + b_y + 1) >> 1, 15) + 16 * (layer > 0),
            min(a_y, 7) + 8 * min(layer, 3),
        )
        signs = (_sign(a[_Y]) * 9 + _sign(b[_Y]) * 3 + _sign(own[_Y]) + 13, 27, min(layer, 3) + 28)
        luma = np.int64(row[LUMA])
        luma = _code_signed(decode, luma, LUMA, contexts, 1, signs, state)
        strong_luma = bit_length(luma)
        a_r, b_r = bit_length(a[_R]), bit_length(b[_R])
        contexts = (
            min(strong_luma, 7) + 8 * min((a_r + b_r + 1) >> 1, 3),
            min((a_r + b_r + 1) >> 1, 7) + 8 * min(own_r, 3),
            min(strong_luma, 15) + 16 * (layer > 0),
        )
        signs = (_same(a[_Y], a[_R]) * 9 + _same(b[_Y], b[_R]) * 3 + _same(own[_Y], own[_R]), 27, 28)
        cr = np.int64(row[CR])
        cr = _code_signed(decode, cr, CR, contexts, luma, signs, state)
        a_b, b_b = bit_length(a[_B]), bit_length(b[_B])
        contexts = (
            min(strong_luma, 7) + 8 * min((a_b + b_b + 1) >> 1, 3),
            min((a_b + b_b + 1) >> 1, 7) + 8 * min(own_b, 3),
            min(bit_length(cr), 7) + 8 * min(strong_luma >> 1, 3),
        )
        signs = (
            _same(a[_Y], a[_B]) * 9 + _same(b[_Y], b[_B]) * 3 + _same(own[_Y], own[_B]),
            _same(luma, cr) + 27,
            30,
        )
        cb = np.int64(row[CB])
        cb = _code_signed(decode, cb, CB, contexts, luma, signs, state)
        strong = energy(luma, cr, cb)
        strength = min(bit_length(strong) >> 1, 15)

        # Shape.
        seen_around = min(a[_COUNT], 1) + min(b[_COUNT], 1)
        mean_scale = (a[_SCALE] + b[_SCALE]) // max(seen_around, 1)
        mean_ratio = (a[_RATIO] + b[_RATIO]) // max(seen_around, 1)
        bits = scale_bits(strong, weights) if by_sensitivity else np.int64(0)
        scale_tree = bits + OCTAVE_BITS if by_sensitivity else plan[5 + 2]
        unit = SUBDIVISIONS >> bits
        contexts = (
            min(bits, 7) + 8 * min(layer, 3),
            min(mean_scale >> 5, 23) if seen_around else 24,
            strength + 16 * (held > 0),
        )
        log_scale = code_tree(decode, np.int64(row[LOG_SCALE]), scale_tree, LOG_SCALE, contexts, state)
        scale = log_scale * unit if by_sensitivity else (log_scale * LOG_LEVELS) >> scale_tree
        octave = min(max((scale >> 6) - 2, 0), 3)
        contexts = (
            min(bits, 7) + 8 * octave,
            min(mean_ratio >> 4, 7) + 8 * min(strength >> 1, 3),
            min(scale >> 5, 23),
        )
        ratio_tree = scale_tree if by_sensitivity else plan[5 + 3]
        log_ratio = code_tree(decode, np.int64(row[LOG_RATIO]), ratio_tree, LOG_RATIO, contexts, state)
        ratio = log_ratio * unit if by_sensitivity else (log_ratio * LOG_LEVELS) >> ratio_tree
        if decode and by_sensitivity and (scale >= LOG_LEVELS or ratio > scale):
            return -1
        bits = angle_bits(strong, ratio, weights) if by_sensitivity else plan[5 + 4]
        elongated = min(ratio >> 5, 3)
        contexts = (
            min(bits, 9) * 3 + min(ratio >> 5, 2),
            (a[_TURN] >> 5) + 8 * min(a[_RATIO] >> 5, 3),
            (b[_TURN] >> 5) + 8 * min(b[_RATIO] >> 5, 3),
        )
        angle = code_tree(decode, np.int64(row[ANGLE]), bits, ANGLE, contexts, state)
        turn = (angle << MOST_ANGLE_BITS) >> bits

        # Position.
        column_bits, row_bits = (
            position_bits(strong, scale, ratio, turn, weights) if by_sensitivity else (np.int64(0), np.int64(0))
        )
        column_cells = cells(span, column_bits) if by_sensitivity else np.int64(1) << plan[5]
        row_cells = cells(span, row_bits) if by_sensitivity else np.int64(1) << plan[6]
        tree = bit_length(column_cells - 1)
        contexts = (
            min(tree, 15) + 16 * (elongated > 1),
            own[_X] + 8 * held,
            a[_X] + 8 * min(a[_COUNT], 3),
        )
        x = code_tree(decode, np.int64(row[COLUMN]), tree, COLUMN, contexts, state)
        eighth_x = (x << 3) // column_cells
        tree = bit_length(row_cells - 1)
        contexts = (
            min(tree, 15) + 16 * (elongated > 1),
            own[_YPOS] + 8 * held,
            eighth_x + 8 * min(b[_COUNT], 3),
        )
        y = code_tree(decode, np.int64(row[ROW]), tree, ROW, contexts, state)
        if decode:
            if x >= column_cells or y >= row_cells:
                return -1
            row[LUMA], row[CR], row[CB] = luma, cr, cb
            row[LOG_SCALE], row[LOG_RATIO], row[ANGLE] = log_scale, log_ratio, angle
            row[COLUMN], row[ROW] = x, y
        own[_COUNT] = min(own[_COUNT] + 1, 255)
        own[_LAYER] = now
        own[_Y], own[_R], own[_B] = _clipped(luma), _clipped(cr), _clipped(cb)
        own[_SCALE], own[_RATIO], own[_TURN] = scale, ratio, turn
        own[_X], own[_YPOS] = eighth_x, (y << 3) // row_cells
    return count


@kernel
def _clipped(value):
    return min(max(value, -32767), 32767)


class SectionCoder:
    """Codes the sections of one file, in order, either all into bytes or all from them.

    Args:
        rows, columns: Of the patch grid.
        plan: See `code_section`.
    """

    def __init__(self, rows: int, columns: int, plan: NDArray[np.int64]) -> None:
        self._rows, self._columns = rows, columns
        self._plan = plan
        self._models = Models()
        self._features = np.zeros((rows * columns + 1, _FEATURES), np.int16)
        self._layer = 0

    def encode(self, patch: NDArray[np.int64], symbols: SymbolTable) -> bytes:
        """The next section: ascending patches and their symbols, (N, 8)."""
        mask = np.zeros(self._rows * self._columns, np.uint8)
        mask[patch] = 1
        # A decision writes four bytes at most, in the worst of cases; a Gaussian has fewer than 200.
        data = np.zeros(4 * len(mask) + 800 * len(symbols) + 64, np.uint8)
        registers = start_registers()
        self._code(False, mask, np.ascontiguousarray(symbols, np.int32), registers, data)
        finish_encoding(registers, data)
        return data[: int(registers[3])].tobytes()

    def decode(self, count: int, payload: bytes) -> tuple[NDArray[np.int64], SymbolTable]:
        """The patches and symbols of the next section, which says that it has `count` Gaussians.

        Raises:
            CodecError: It has another number, or symbols that mean nothing.
        """
        mask = np.zeros(self._rows * self._columns, np.uint8)
        symbols = np.zeros((count, SYMBOLS), np.int32)
        data = np.frombuffer(bytearray(payload), np.uint8)  # a copy that is writable, as when encoding
        registers = start_registers()
        start_decoding(registers, data)
        found = self._code(True, mask, symbols, registers, data)
        if found != count:
            what = "a symbol out of its range" if found < 0 else f"not the {count} Gaussians that it says"
            raise CodecError(f"stage {self._layer - 1} has {what}: the file is damaged")
        return mask.nonzero()[0], symbols

    def _code(
        self,
        decode: bool,
        mask: NDArray[np.uint8],
        symbols: SymbolTable,
        registers: NDArray[np.int64],
        data: NDArray[np.uint8],
    ) -> int:
        state = coder_state(self._models, registers, data)
        count = code_section(
            decode,
            self._layer,
            self._rows,
            self._columns,
            self._plan,
            mask,
            symbols,
            self._features,
            state,
        )
        self._layer += 1
        return int(count)
