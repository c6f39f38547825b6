"""Sections of .air files: which patches have a Gaussian in a stage, and the symbols of these Gaussians.

The neighbours of a Gaussian tell a good deal about it: strengths, sizes and colours are alike from patch to patch and
from stage to stage. This module chooses the contexts of every symbol and remembers the newest Gaussian of every patch;
`air.codec.entropy` codes. docs/format.md is the specification.

What the parts of the kernel pass along, besides the coder and the models of `air.codec.entropy`:

    symbols, row           pointer to the table of symbols; where the Gaussian's eight begin
    features, own, near    pointer to what is remembered of all patches; where the patch's features and those of its
                           `Neighbours` begin

Both are pointers because an array that is handed to an inlined part costs a reference count at each Gaussian.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from air.codec.bitstream import Header
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
    SensitivityQuantizer,
    SymbolTable,
    angle_bits,
    cells,
    energy,
    position_bits,
    scale_bits,
)
from air.codec.uniform import CHANNELS
from air.compute.bits import bit_length, pointer_to
from air.compute.compile import inline, kernel
from air.errors import CodecError

PATCH = CODED - 1
"""The kind of number that says whether a patch has a Gaussian."""

# The highest bits of numbers that are worth a model.
_MODELLED_SCALE_BITS = MAX_MODELLED_BITS
_MODELLED_ANGLE_BITS = 5
_MODELLED_POSITION_BITS = 5

# What is remembered of the newest Gaussian of each patch.
_COUNT, _LAYER, _LUMA, _CR, _CB, _SCALE, _RATIO, _TURN = range(8)
_FEATURES = 8


class Plan(NamedTuple):
    """How a file's numbers are quantised."""

    by_sensitivity: bool
    span: int  # of positions
    weights: tuple[int, int, int]  # of scales, angle and position
    x_bits: int  # these, of the uniform quantiser
    y_bits: int
    scale_bits: int
    ratio_bits: int
    angle_bits: int


class Neighbours(NamedTuple):
    """Where the features of the patches around a patch begin; off the grid, the last row of the table, all zero."""

    left: int
    up: int
    up_left: int
    up_right: int
    right: int
    down: int


@inline
def _sign(value):
    return (value > 0) - (value < 0)


@inline
def _compare_signs(first, second):
    """0 for different signs, 2 for equal ones, 1 where a number is zero."""
    return 1 + _sign(first) * _sign(second)


@inline
def _clipped(value):
    """The nearest number that the table of features can hold."""
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


@inline
def _neighbours(patch, rows, columns):
    """Where the features around a patch begin."""
    off_grid = rows * columns
    column = patch % columns
    has_left, has_right = column > 0, column + 1 < columns
    has_up, has_down = patch >= columns, patch + columns < off_grid
    return Neighbours(
        left=_FEATURES * (patch - 1 if has_left else off_grid),
        up=_FEATURES * (patch - columns if has_up else off_grid),
        up_left=_FEATURES * (patch - columns - 1 if has_up and has_left else off_grid),
        up_right=_FEATURES * (patch - columns + 1 if has_up and has_right else off_grid),
        right=_FEATURES * (patch + 1 if has_right else off_grid),
        down=_FEATURES * (patch + columns if has_down else off_grid),
    )


@inline
def _code_nesting(decode, layer, patches, features, coder, models):
    """Whether only patches with a Gaussian in the section before have one in this; 0 in the first section."""
    nested = np.int64(0)
    if layer > 0:
        if not decode:
            nested = np.int64(1)
            for patch in patches:
                nested &= features[_FEATURES * patch + _LAYER] == layer
        nested, coder = code_raw(decode, nested, 1, coder, models)
    return nested, coder


@inline
def _code_occupancy(decode, occupied, layer, before, features, own, near, coder, models):
    """Whether a patch has a Gaussian; `before` says whether it has one in the section before.

    Neighbours that were coded already may have one in this section, those to come in the section before.
    """
    now = layer + 1
    around = 2 * np.int64(features[near.left + _COUNT]) + 2 * np.int64(features[near.up + _COUNT])
    around += features[near.up_left + _COUNT] + features[near.up_right + _COUNT]
    around += features[near.right + _COUNT] + features[near.down + _COUNT]
    contexts = (
        (features[near.left + _LAYER] == now)
        + 2 * (features[near.up + _LAYER] == now)
        + 4 * before
        + 8 * min(layer, 3),
        (features[near.up_left + _LAYER] == now)
        + 2 * (features[near.up_right + _LAYER] == now)
        + 4 * (features[near.right + _LAYER] == layer)
        + 8 * min(np.int64(features[own + _COUNT]), 3),
        min(around, 15) + 16 * before,
    )
    return code_flag(decode, occupied, where(PATCH, contexts), 0, coder, models)


@inline
def _code_strength(decode, symbols, row, layer, features, own, near, coder, models):
    """Luma, Cr and Cb. Returns them, and the coder.

    Colours are expected to have the signs, relative to luma's, that those of the neighbours have.
    """
    later = layer > 0
    left_luma, up_luma = np.int64(features[near.left + _LUMA]), np.int64(features[near.up + _LUMA])
    own_luma = np.int64(features[own + _LUMA])
    left_length, up_length = bit_length(left_luma), bit_length(up_luma)
    contexts = (
        min(bit_length(own_luma), 7) + 8 * min(np.int64(features[own + _COUNT]), 3),
        min((left_length + up_length + 1) >> 1, 15) + 16 * later,
        min(left_length, 7) + 8 * min(layer, 3),
    )
    signs = (_sign(left_luma) * 9 + _sign(up_luma) * 3 + _sign(own_luma) + 13, 27, min(layer, 3) + 28)
    luma = np.int64(symbols[row + LUMA])
    luma, coder = _code_signed(decode, luma, np.int64(1), where(LUMA, contexts), where(LUMA, signs), coder, models)
    luma_length = bit_length(luma)

    left_cr, up_cr = np.int64(features[near.left + _CR]), np.int64(features[near.up + _CR])
    own_cr = np.int64(features[own + _CR])
    mean_length = (bit_length(left_cr) + bit_length(up_cr) + 1) >> 1
    contexts = (
        min(luma_length, 7) + 8 * min(mean_length, 3),
        min(mean_length, 7) + 8 * min(bit_length(own_cr), 3),
        min(luma_length, 15) + 16 * later,
    )
    like_neighbours = _compare_signs(left_luma, left_cr) * 9 + _compare_signs(up_luma, up_cr) * 3
    signs = (like_neighbours + _compare_signs(own_luma, own_cr), 27, 28)
    cr = np.int64(symbols[row + CR])
    cr, coder = _code_signed(decode, cr, luma, where(CR, contexts), where(CR, signs), coder, models)

    left_cb, up_cb = np.int64(features[near.left + _CB]), np.int64(features[near.up + _CB])
    own_cb = np.int64(features[own + _CB])
    mean_length = (bit_length(left_cb) + bit_length(up_cb) + 1) >> 1
    contexts = (
        min(luma_length, 7) + 8 * min(mean_length, 3),
        min(mean_length, 7) + 8 * min(bit_length(own_cb), 3),
        min(bit_length(cr), 7) + 8 * min(luma_length >> 1, 3),
    )
    like_neighbours = _compare_signs(left_luma, left_cb) * 9 + _compare_signs(up_luma, up_cb) * 3
    signs = (like_neighbours + _compare_signs(own_luma, own_cb), _compare_signs(luma, cr) + 27, 30)
    cb = np.int64(symbols[row + CB])
    cb, coder = _code_signed(decode, cb, luma, where(CB, contexts), where(CB, signs), coder, models)
    return luma, cr, cb, coder


@inline
def _code_shape(decode, symbols, row, layer, plan, strong, features, own, near, coder, models):
    """Log-scale and log-ratio, each as its symbol and in the finest steps. Returns the four, and the coder.

    `strong` is the Gaussian's `energy`. Symbols that mean nothing give a scale beyond the last or a ratio beyond it.
    """
    by_sensitivity = plan.by_sensitivity
    strength = min(bit_length(strong) >> 1, 15)
    # Sums of one or two neighbours, and their means.
    num_seen = min(np.int64(features[near.left + _COUNT]), 1) + min(np.int64(features[near.up + _COUNT]), 1)
    halving = np.int64(num_seen == 2)
    mean_scale = (np.int64(features[near.left + _SCALE]) + features[near.up + _SCALE]) >> halving
    mean_ratio = (np.int64(features[near.left + _RATIO]) + features[near.up + _RATIO]) >> halving
    bits = scale_bits(strong, plan.weights) if by_sensitivity else np.int64(0)
    unit = SUBDIVISIONS >> bits

    scale_tree = bits + OCTAVE_BITS if by_sensitivity else plan.scale_bits
    contexts = (
        bits + 8 * min(layer, 3),
        min(mean_scale >> 5, 23) if num_seen else 24,
        strength + 16 * (features[own + _COUNT] > 0),
    )
    log_scale = np.int64(symbols[row + LOG_SCALE])
    places = where(LOG_SCALE, contexts)
    log_scale, coder = code_tree(
        decode, log_scale, scale_tree, np.int64(0), _MODELLED_SCALE_BITS, places, coder, models
    )
    scale = log_scale * unit if by_sensitivity else (log_scale * LOG_LEVELS) >> scale_tree

    octave = min(max((scale >> 6) - 2, 0), 3)
    contexts = (
        bits + 8 * octave,
        min(mean_ratio >> 4, 7) + 8 * min(strength >> 1, 3),
        min(scale >> 5, 23),
    )
    ratio_tree = scale_tree if by_sensitivity else plan.ratio_bits
    known = scale_tree - bit_length(log_scale) if by_sensitivity else np.int64(0)
    log_ratio = np.int64(symbols[row + LOG_RATIO])
    places = where(LOG_RATIO, contexts)
    log_ratio, coder = code_tree(decode, log_ratio, ratio_tree, known, _MODELLED_SCALE_BITS, places, coder, models)
    ratio = log_ratio * unit if by_sensitivity else (log_ratio * LOG_LEVELS) >> ratio_tree
    return log_scale, log_ratio, scale, ratio, coder


@inline
def _code_angle(decode, symbols, row, plan, strong, ratio, features, near, coder, models):
    """The angle, as its symbol and in 256ths of half a turn. Returns both, and the coder."""
    bits = angle_bits(strong, ratio, plan.weights) if plan.by_sensitivity else plan.angle_bits
    contexts = (
        min(bits, 9) * 3 + min(ratio >> 5, 2),
        (features[near.left + _TURN] >> 5) + 8 * min(np.int64(features[near.left + _RATIO]) >> 5, 3),
        (features[near.up + _TURN] >> 5) + 8 * min(np.int64(features[near.up + _RATIO]) >> 5, 3),
    )
    angle = np.int64(symbols[row + ANGLE])
    places = where(ANGLE, contexts)
    angle, coder = code_tree(decode, angle, bits, np.int64(0), _MODELLED_ANGLE_BITS, places, coder, models)
    return angle, (angle << MAX_ANGLE_BITS) >> bits, coder


@inline
def _code_position(decode, symbols, row, plan, strong, scale, ratio, turn, coder, models):
    """Column and row in cells. Returns them, whether the range of positions has such cells, and the coder."""
    column_cells, row_cells = np.int64(1) << plan.x_bits, np.int64(1) << plan.y_bits
    if plan.by_sensitivity:
        column_bits, row_bits = position_bits(strong, scale, ratio, turn, plan.weights)
        column_cells, row_cells = cells(plan.span, column_bits), cells(plan.span, row_bits)
    x, y = np.int64(symbols[row + COLUMN]), np.int64(symbols[row + ROW])
    none = np.int64(0)
    tree = bit_length(column_cells - 1)
    x, coder = code_tree(decode, x, tree, none, _MODELLED_POSITION_BITS, where_alone(COLUMN), coder, models)
    tree = bit_length(row_cells - 1)
    y, coder = code_tree(decode, y, tree, none, _MODELLED_POSITION_BITS, where_alone(ROW), coder, models)
    return x, y, x < column_cells and y < row_cells, coder


@kernel
def code_section(decode, layer, rows, columns, quantiser, earlier, patches, symbol_table, feature_table, logits, data):
    """Codes one section: patch by patch in row-major order whether it has a Gaussian, and the symbols of those.

    Args:
        decode: False reads `patches` and symbols and writes `data`; True the reverse.
        layer: The section's number, from 0.
        rows: Of the patch grid.
        columns: Of the patch grid.
        quantiser: int64 (13,): the kind of quantiser (1 by sensitivity, 0 uniform); the span of positions; the three
            weights; the bits of the uniform quantiser's eight channels.
        earlier: How many Gaussians the sections before had.
        patches: int64 (N,), ascending.
        symbol_table: int32 (N, 8), contiguous; columns as in `air.codec.sensitivity`.
        feature_table: int16 (rows · columns + 1, _FEATURES), zero at the start of a file; the last row stays zero.
        logits: The cells of `air.codec.entropy.Models`.
        data: uint8, room enough for what is written, or the section; see `air.codec.entropy.MARGIN`.

    Returns:
        How many Gaussians there are, and the coder. Decoding stops as soon as there are more than the table has rows,
        and returns -1 at a symbol that means nothing.
    """
    # Loaded once: in the loop, each store might have changed them.
    weights = (quantiser[2], quantiser[3], quantiser[4])
    uniform_bits = (quantiser[5], quantiser[6], quantiser[7], quantiser[8], quantiser[9])
    plan = Plan(quantiser[0] == 1, quantiser[1], weights, *uniform_bits)
    size = data.shape[0] - MARGIN
    symbols, features = pointer_to(symbol_table), pointer_to(feature_table)
    models = (pointer_to(logits), learning_rate(earlier), pointer_to(data), size)
    coder = start_coding(decode, models)
    nested, coder = _code_nesting(decode, layer, patches, features, coder, models)
    count = 0
    for patch in range(rows * columns):
        own = _FEATURES * patch
        before = np.int64(layer > 0 and features[own + _LAYER] == layer)
        if nested and not before:
            continue
        near = _neighbours(patch, rows, columns)
        occupied = np.int64(not decode and count < patches.shape[0] and patches[count] == patch)
        occupied, coder = _code_occupancy(decode, occupied, layer, before, features, own, near, coder, models)
        if occupied == 0:
            continue
        if count == symbol_table.shape[0]:
            return count + 1, coder
        if decode:
            patches[count] = patch
        row = SYMBOLS * count
        count += 1

        luma, cr, cb, coder = _code_strength(decode, symbols, row, layer, features, own, near, coder, models)
        strong = energy(luma, cr, cb)
        log_scale, log_ratio, scale, ratio, coder = _code_shape(
            decode, symbols, row, layer, plan, strong, features, own, near, coder, models
        )
        # Checked before the ratio is looked up in tables.
        if decode and plan.by_sensitivity and (scale >= LOG_LEVELS or ratio > scale):
            return -1, coder
        angle, turn, coder = _code_angle(decode, symbols, row, plan, strong, ratio, features, near, coder, models)
        x, y, is_in_range, coder = _code_position(decode, symbols, row, plan, strong, scale, ratio, turn, coder, models)
        if decode:
            if not is_in_range:
                return -1, coder
            symbols[row + LUMA], symbols[row + CR], symbols[row + CB] = luma, cr, cb
            symbols[row + LOG_SCALE], symbols[row + LOG_RATIO], symbols[row + ANGLE] = log_scale, log_ratio, angle
            symbols[row + COLUMN], symbols[row + ROW] = x, y
        features[own + _COUNT] = min(np.int64(features[own + _COUNT]) + 1, 255)
        features[own + _LAYER] = layer + 1
        features[own + _LUMA], features[own + _CR], features[own + _CB] = _clipped(luma), _clipped(cr), _clipped(cb)
        features[own + _SCALE], features[own + _RATIO], features[own + _TURN] = scale, ratio, turn
        models = (pointer_to(logits), learning_rate(earlier + count), pointer_to(data), size)
    return count, coder if decode else finish_encoding(coder, models)


def _quantiser_numbers(header: Header) -> NDArray[np.int64]:
    """The numbers of a header that `code_section` reads; see there."""
    own = header.quantizer
    if isinstance(own, SensitivityQuantizer):
        return np.array([1, header.reach_span, *own.weights(), *[0] * len(CHANNELS)], np.int64)
    return np.array([0, 1, 1, 1, 1, *own.bits], np.int64)


class SectionCoder:
    """Codes the sections of one file, in order, either all into bytes or all from them."""

    def __init__(self, header: Header) -> None:
        self._rows, self._columns = header.grid
        self._quantiser = _quantiser_numbers(header)
        self._models = Models()
        self._features = np.zeros((self._rows * self._columns + 1, _FEATURES), np.int16)
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
            self._quantiser,
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
