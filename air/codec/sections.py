"""Sections of .air files: which patches hold a Gaussian of a stage, and its symbols, in the contexts of what is around.

What is known of a Gaussian's neighbours tells a good deal about it: strengths, sizes and colours are alike from patch
to patch and from stage to stage. This module chooses the contexts and remembers the newest Gaussian of every patch; the
coding itself is `air.codec.entropy`'s. docs/format.md is the specification.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from air.codec.entropy import (
    CODED,
    MARGIN,
    MAX_MODELLED_BITS,
    SIGN_NODE,
    Models,
    code_flag,
    code_magnitude,
    code_raw,
    code_tree,
    finish_encoding,
    learning_rate,
    start_coding,
    where,
    where_alone,
)
from air.codec.sensitivity import (
    ANGLE,
    CB,
    COLUMN,
    CR,
    LOG_LEVELS,
    LOG_RATIO,
    LOG_SCALE,
    LUMA,
    MAX_ANGLE_BITS,
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
from air.compute.bits import bit_length, pointer_to
from air.compute.compile import inline, kernel
from air.errors import CodecError

MASK = CODED - 1

# The highest bits of numbers that are worth a model.
_MODELLED_SCALE_BITS = MAX_MODELLED_BITS
_MODELLED_ANGLE_BITS = 5
_MODELLED_POSITION_BITS = 5

# What is remembered of the newest Gaussian of each patch.
_COUNT, _LAYER, _Y, _R, _B, _SCALE, _RATIO, _TURN = range(8)
_FEATURES = 8


@inline
def _sign(value):
    return (value > 0) - (value < 0)


@inline
def _same(first, second):
    """0 for signs that differ, 2 for equal ones, 1 where there is none to compare."""
    return 1 + _sign(first) * _sign(second)


@inline
def _clipped(value):
    return min(max(value, -32767), 32767)


@kernel
def _code_signed(decode, value, negative_like, places, sign_places, coder, models):
    """A number of either sign; the decision about the sign is whether it differs from that of `negative_like`."""
    magnitude, coder = code_magnitude(decode, abs(value), places, coder, models)
    if magnitude == 0:
        return magnitude, coder
    expected = -1 if negative_like < 0 else 1
    bit = np.int64(_sign(value) != expected)
    bit, coder = code_flag(decode, bit, sign_places, SIGN_NODE, coder, models)
    return -expected * magnitude if bit else expected * magnitude, coder


@kernel
def code_section(decode, layer, rows, columns, plan, earlier, patches, symbols, features, logits, data):
    """Codes one section: patch by patch in row-major order whether it has a Gaussian, and the symbols of those.

    Args:
        decode: False reads `patches` and `symbols` and writes `data`; True the reverse.
        layer: The section's number, from 0.
        rows: Of the patch grid.
        columns: Of the patch grid.
        plan: int64 numbers: the kind of quantiser (1 by sensitivity, 0 uniform); the span of positions; the three
            weights; the bits of the uniform quantiser's eight channels.
        earlier: How many Gaussians the sections before had.
        patches: int64 (N,), ascending.
        symbols: int32 (N, 8); columns as in `air.codec.sensitivity`.
        features: int16 (rows · columns + 1, _FEATURES), zero at the start of a file; the last row stays zero.
        logits: The cells of `air.codec.entropy.Models`.
        data: uint8, room enough for what is written, or the section; see `air.codec.entropy.MARGIN`.

    Returns:
        How many Gaussians there are, and the coder. Decoding stops as soon as there are more than `symbols` has rows,
        and returns -1 at a symbol that means nothing.
    """
    by_sensitivity = plan[0] == 1
    span = plan[1]
    weights = (plan[2], plan[3], plan[4])
    size = data.shape[0] - MARGIN
    models = (pointer_to(logits), learning_rate(earlier), pointer_to(data), size)
    nothing = rows * columns
    now = layer + 1
    coder = start_coding(decode, models)
    none = np.int64(0)
    nested = none
    if layer > 0:
        if not decode:
            nested = np.int64(1)
            for patch in patches:
                nested &= features[patch, _LAYER] == layer
        nested, coder = code_raw(decode, nested, 1, coder, models)
    count = 0
    for patch in range(rows * columns):
        own = np.uint64(patch)
        before = np.int64(layer > 0 and features[own, _LAYER] == layer)
        if nested and not before:
            continue
        column = patch % columns
        has_left, has_right = column > 0, column + 1 < columns
        has_up, has_down = patch >= columns, patch + columns < nothing
        a = np.uint64(patch - 1 if has_left else nothing)
        b = np.uint64(patch - columns if has_up else nothing)
        c = np.uint64(patch - columns - 1 if has_up and has_left else nothing)
        d = np.uint64(patch - columns + 1 if has_up and has_right else nothing)
        e = np.uint64(patch + 1 if has_right else nothing)
        f = np.uint64(patch + columns if has_down else nothing)
        a_count, b_count = np.int64(features[a, _COUNT]), np.int64(features[b, _COUNT])
        own_count = np.int64(features[own, _COUNT])
        held = min(own_count, 3)
        around = 2 * a_count + 2 * b_count + features[c, _COUNT] + features[d, _COUNT]
        around += features[e, _COUNT] + features[f, _COUNT]
        contexts = (
            (features[a, _LAYER] == now) + 2 * (features[b, _LAYER] == now) + 4 * before + 8 * min(layer, 3),
            (features[c, _LAYER] == now)
            + 2 * (features[d, _LAYER] == now)
            + 4 * (features[e, _LAYER] == layer)
            + 8 * held,
            min(around, 15) + 16 * before,
        )
        bit = np.int64(not decode and count < patches.shape[0] and patches[count] == patch)
        bit, coder = code_flag(decode, bit, where(MASK, contexts), 0, coder, models)
        if bit == 0:
            continue
        if count == symbols.shape[0]:
            return count + 1, coder
        if decode:
            patches[count] = patch
        row = np.uint64(count)
        count += 1

        # Strength.
        a_luma, b_luma = np.int64(features[a, _Y]), np.int64(features[b, _Y])
        own_luma = np.int64(features[own, _Y])
        a_y, b_y = bit_length(a_luma), bit_length(b_luma)
        contexts = (
            min(bit_length(own_luma), 7) + 8 * held,
            min((a_y + b_y + 1) >> 1, 15) + 16 * (layer > 0),
            min(a_y, 7) + 8 * min(layer, 3),
        )
        signs = (_sign(a_luma) * 9 + _sign(b_luma) * 3 + _sign(own_luma) + 13, 27, min(layer, 3) + 28)
        luma = np.int64(symbols[row, LUMA])
        luma, coder = _code_signed(decode, luma, np.int64(1), where(LUMA, contexts), where(LUMA, signs), coder, models)
        strong_luma = bit_length(luma)
        a_red, b_red = np.int64(features[a, _R]), np.int64(features[b, _R])
        own_red = np.int64(features[own, _R])
        mean = (bit_length(a_red) + bit_length(b_red) + 1) >> 1
        contexts = (
            min(strong_luma, 7) + 8 * min(mean, 3),
            min(mean, 7) + 8 * min(bit_length(own_red), 3),
            min(strong_luma, 15) + 16 * (layer > 0),
        )
        signs = (_same(a_luma, a_red) * 9 + _same(b_luma, b_red) * 3 + _same(own_luma, own_red), 27, 28)
        cr = np.int64(symbols[row, CR])
        cr, coder = _code_signed(decode, cr, luma, where(CR, contexts), where(CR, signs), coder, models)
        a_blue, b_blue = np.int64(features[a, _B]), np.int64(features[b, _B])
        own_blue = np.int64(features[own, _B])
        mean = (bit_length(a_blue) + bit_length(b_blue) + 1) >> 1
        contexts = (
            min(strong_luma, 7) + 8 * min(mean, 3),
            min(mean, 7) + 8 * min(bit_length(own_blue), 3),
            min(bit_length(cr), 7) + 8 * min(strong_luma >> 1, 3),
        )
        signs = (
            _same(a_luma, a_blue) * 9 + _same(b_luma, b_blue) * 3 + _same(own_luma, own_blue),
            _same(luma, cr) + 27,
            30,
        )
        cb = np.int64(symbols[row, CB])
        cb, coder = _code_signed(decode, cb, luma, where(CB, contexts), where(CB, signs), coder, models)
        strong = energy(luma, cr, cb)
        strength = min(bit_length(strong) >> 1, 15)

        # Shape. Sums of one or two neighbours, and their means.
        seen_around = min(a_count, 1) + min(b_count, 1)
        halving = np.int64(seen_around == 2)
        a_ratio, b_ratio = np.int64(features[a, _RATIO]), np.int64(features[b, _RATIO])
        mean_scale = (np.int64(features[a, _SCALE]) + features[b, _SCALE]) >> halving
        mean_ratio = (a_ratio + b_ratio) >> halving
        bits = scale_bits(strong, weights) if by_sensitivity else np.int64(0)
        scale_tree = bits + OCTAVE_BITS if by_sensitivity else plan[5 + 2]
        unit = SUBDIVISIONS >> bits
        contexts = (
            bits + 8 * min(layer, 3),
            min(mean_scale >> 5, 23) if seen_around else 24,
            strength + 16 * (held > 0),
        )
        log_scale = np.int64(symbols[row, LOG_SCALE])
        places = where(LOG_SCALE, contexts)
        log_scale, coder = code_tree(decode, log_scale, scale_tree, none, _MODELLED_SCALE_BITS, places, coder, models)
        scale = log_scale * unit if by_sensitivity else (log_scale * LOG_LEVELS) >> scale_tree
        octave = min(max((scale >> 6) - 2, 0), 3)
        contexts = (
            bits + 8 * octave,
            min(mean_ratio >> 4, 7) + 8 * min(strength >> 1, 3),
            min(scale >> 5, 23),
        )
        ratio_tree = scale_tree if by_sensitivity else plan[5 + 3]
        known = scale_tree - bit_length(log_scale) if by_sensitivity else np.int64(0)
        log_ratio = np.int64(symbols[row, LOG_RATIO])
        places = where(LOG_RATIO, contexts)
        log_ratio, coder = code_tree(decode, log_ratio, ratio_tree, known, _MODELLED_SCALE_BITS, places, coder, models)
        ratio = log_ratio * unit if by_sensitivity else (log_ratio * LOG_LEVELS) >> ratio_tree
        if decode and by_sensitivity and (scale >= LOG_LEVELS or ratio > scale):
            return -1, coder
        bits = angle_bits(strong, ratio, weights) if by_sensitivity else plan[5 + 4]
        contexts = (
            min(bits, 9) * 3 + min(ratio >> 5, 2),
            (features[a, _TURN] >> 5) + 8 * min(a_ratio >> 5, 3),
            (features[b, _TURN] >> 5) + 8 * min(b_ratio >> 5, 3),
        )
        angle = np.int64(symbols[row, ANGLE])
        places = where(ANGLE, contexts)
        angle, coder = code_tree(decode, angle, bits, none, _MODELLED_ANGLE_BITS, places, coder, models)
        turn = (angle << MAX_ANGLE_BITS) >> bits

        # Position.
        column_bits, row_bits = (
            position_bits(strong, scale, ratio, turn, weights) if by_sensitivity else (np.int64(0), np.int64(0))
        )
        column_cells = cells(span, column_bits) if by_sensitivity else np.int64(1) << plan[5]
        row_cells = cells(span, row_bits) if by_sensitivity else np.int64(1) << plan[6]
        x, y = np.int64(symbols[row, COLUMN]), np.int64(symbols[row, ROW])
        tree = bit_length(column_cells - 1)
        x, coder = code_tree(decode, x, tree, none, _MODELLED_POSITION_BITS, where_alone(COLUMN), coder, models)
        tree = bit_length(row_cells - 1)
        y, coder = code_tree(decode, y, tree, none, _MODELLED_POSITION_BITS, where_alone(ROW), coder, models)
        if decode:
            if x >= column_cells or y >= row_cells:
                return -1, coder
            symbols[row, LUMA], symbols[row, CR], symbols[row, CB] = luma, cr, cb
            symbols[row, LOG_SCALE], symbols[row, LOG_RATIO], symbols[row, ANGLE] = log_scale, log_ratio, angle
            symbols[row, COLUMN], symbols[row, ROW] = x, y
        features[own, _COUNT] = min(own_count + 1, 255)
        features[own, _LAYER] = now
        features[own, _Y], features[own, _R], features[own, _B] = _clipped(luma), _clipped(cr), _clipped(cb)
        features[own, _SCALE], features[own, _RATIO], features[own, _TURN] = scale, ratio, turn
        models = (pointer_to(logits), learning_rate(earlier + count), pointer_to(data), size)
    return count, coder if decode else finish_encoding(coder, models)


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
        self._earlier = 0

    def encode(self, patches: NDArray[np.int64], symbols: SymbolTable) -> tuple[bytes, bytes]:
        """The next section, ascending patches and their symbols (N, 8): what a payload starts and ends with."""
        # A decision writes four bytes at most, in the worst of cases; a Gaussian has fewer than 200.
        data = np.zeros(4 * self._rows * self._columns + 800 * len(symbols) + 64, np.uint8)
        patches = np.ascontiguousarray(patches, np.int64)
        _, coder = self._code(False, patches, np.ascontiguousarray(symbols, np.int32), data)
        _, _, _, place, raw = coder
        end = len(data) - MARGIN
        return data[MARGIN:place].tobytes(), data[end - (raw + 7) // 8 : end].tobytes()

    def decode(self, count: int, payload: bytes) -> tuple[NDArray[np.int64], SymbolTable]:
        """The patches and symbols of the next section, which says that it has `count` Gaussians.

        Raises:
            CodecError: It has another number, or symbols that mean nothing.
        """
        patches = np.zeros(count, np.int64)
        symbols = np.zeros((count, SYMBOLS), np.int32)
        data = np.zeros(MARGIN + len(payload) + MARGIN, np.uint8)
        data[MARGIN:-MARGIN] = np.frombuffer(payload, np.uint8)
        found, _ = self._code(True, patches, symbols, data)
        if found != count:
            what = "a symbol out of its range" if found < 0 else f"not the {count} Gaussians that it says"
            raise CodecError(f"stage {self._layer - 1} has {what}: the file is damaged")
        return patches, symbols

    def _code(
        self, decode: bool, patches: NDArray[np.int64], symbols: SymbolTable, data: NDArray[np.uint8]
    ) -> tuple[int, tuple[int, ...]]:
        found, coder = code_section(
            decode,
            self._layer,
            self._rows,
            self._columns,
            self._plan,
            self._earlier,
            patches,
            symbols,
            self._features,
            self._models.cells,
            data,
        )
        self._layer += 1
        self._earlier += found
        return found, coder
