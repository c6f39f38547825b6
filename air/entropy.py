"""The entropy coder of .air files: adaptive binary models, mixed, and an arithmetic coder. Whole numbers only.

A symbol is cut into binary decisions. Each decision has a place in three tables of probabilities, and each table sees
another context: what is being coded, and views of what lies left, above and in earlier layers. The three
probabilities are mixed as logits with weights that learn (as in the PAQ family of compressors). All of it adapts to the
file as it is read, so no statistics are stored. The low bits of numbers, which nothing foretells, are stored as they
are, from the end of a section backwards. docs/format.md is the specification.

Encoder and decoder are one kernel with a flag, so that they cannot drift apart. This module knows decisions and
numbers; which contexts a symbol of a Gaussian has is for `air.sections`.

What kernels pass along:

    coder     (low, high, code, place, raw): the arithmetic coder's registers; the next byte; bits taken from the end
    models    (cells, weights, data, size): pointers to those of `Models` and to the section's bytes, `MARGIN` zeros
              before them included; and how many bytes there are
"""

from __future__ import annotations

import numpy as np

from air.render.simd import inline, kernel

CODED = 9
"""The things that are coded: eight symbols, and whether a patch holds a Gaussian. Each has its own models."""

MARGIN = 4
"""Zeros before a section's bytes, so that bits from its end can be read four bytes at a time."""

_TABLES = 3
_CONTEXTS = 32
_NODES = 64  # decisions of a symbol in one context
SIGN_NODE = _NODES - 1

MODELLED_BITS = 6  # of a tree; the others are stored as they are
MOST_MAGNITUDE_BITS = 20
_FIRST_BIT_NODE = 20  # plus the length: the decision about the bit below the highest

# Which mixing weights a decision has.
_LENGTH_DEPTHS = 16
_FIRST_BIT_DEPTH = 16
_FLAG_DEPTH = 17
_DEPTHS = 18

# Probabilities (that a decision is 1) have 22 bits in the tables and 12 where they meet; logits have 8 fractional bits.
_LARGEST_LOGIT = 2047
STRETCH = np.rint(256 * np.log((np.arange(4096) + 0.5) / (4095.5 - np.arange(4096))))
STRETCH = STRETCH.clip(-_LARGEST_LOGIT, _LARGEST_LOGIT).astype(np.int16)
SQUASH = np.rint(4096 / (1 + np.exp(-np.arange(-_LARGEST_LOGIT, _LARGEST_LOGIT + 1) / 256)))
SQUASH = SQUASH.clip(1, 4095).astype(np.int16)

_MOST_SEEN = 255
RATE = np.array([131072 // (2 * seen + 3) for seen in range(_MOST_SEEN + 1)], np.int32)  # 65536 / (seen + 1.5)
_FIRST_WEIGHT = 26000  # a mixing weight of 1 is 65536
_LEARNING_SHIFT = 12
_SEEN_BITS = 10  # of a cell; the probability is above them


class Models:
    """Probabilities and mixing weights as at the start of every file; they adapt from section to section.

    Attributes:
        cells: A probability and how often it was used, in one number, for each thing, table, context and node.
        weights: For each thing, depth and table.
    """

    def __init__(self) -> None:
        self.cells = np.full(CODED * _TABLES * _CONTEXTS * _NODES, 1 << (21 + _SEEN_BITS), np.uint32)
        self.weights = np.full(CODED * _DEPTHS * _TABLES, _FIRST_WEIGHT, np.int32)


@kernel
def start_coding(decode, models):
    """The coder at the start of a section; a decoder takes in its first four bytes."""
    _, _, data, size = models
    code = np.int64(0)
    place = np.int64(MARGIN)
    if decode:
        for _ in range(4):
            code = (code << 8) | (np.int64(data[place]) if place < size else 0)
            place += 1
    return np.int64(0), np.int64(0xFFFFFFFF), code, place, np.int64(0)


@kernel
def finish_encoding(coder, models):
    """Writes the fewest bytes that say where the coder is, whatever comes after them. Returns the coder."""
    low, high, code, place, raw = coder
    data = models[2]
    for length in range(5):
        shift = 32 - 8 * length
        first = (low + (1 << shift) - 1) >> shift
        if ((first + 1) << shift) - 1 <= high:
            for byte in range(length):
                data[place] = (first >> (8 * (length - 1 - byte))) & 255
                place += 1
            break
    return low, high, code, place, raw


@inline
def _code_decision(decode, bit, places, node, depth, coder, models):
    """Codes one decision, and learns from it. Returns it, and the coder."""
    first, second, third, mixer = places[0] + node, places[1] + node, places[2] + node, places[3] + _TABLES * depth
    low, high, code, place, raw = coder
    cells, weights, data, size = models
    cell_0 = np.int64(cells[first])
    cell_1 = np.int64(cells[second])
    cell_2 = np.int64(cells[third])
    logit_0 = np.int64(STRETCH[np.uint64(cell_0 >> 20)])
    logit_1 = np.int64(STRETCH[np.uint64(cell_1 >> 20)])
    logit_2 = np.int64(STRETCH[np.uint64(cell_2 >> 20)])
    weight_0 = np.int64(weights[mixer])
    weight_1 = np.int64(weights[mixer + 1])
    weight_2 = np.int64(weights[mixer + 2])
    total = (weight_0 * logit_0 + weight_1 * logit_1 + weight_2 * logit_2) >> 16
    logit = min(max(total, -_LARGEST_LOGIT), _LARGEST_LOGIT)
    chance = np.int64(SQUASH[np.uint64(logit + _LARGEST_LOGIT)])
    middle = low + ((high - low) >> 12) * chance
    if decode:
        bit = np.int64(code <= middle)
    if bit:
        high = middle
    else:
        low = middle + 1
    while (low ^ high) < (1 << 24):
        if decode:
            byte = np.int64(data[place]) if place < size else 0
            code = ((code << 8) & 0xFFFFFFFF) | byte
        else:
            data[place] = high >> 24
        place += 1
        low = (low << 8) & 0xFFFFFFFF
        high = ((high << 8) & 0xFFFFFFFF) | 255
    error = (bit << 12) - chance
    weights[mixer] = weight_0 + ((logit_0 * error) >> _LEARNING_SHIFT)
    weights[mixer + 1] = weight_1 + ((logit_1 * error) >> _LEARNING_SHIFT)
    weights[mixer + 2] = weight_2 + ((logit_2 * error) >> _LEARNING_SHIFT)
    aim = (bit << 22) - bit
    cells[first] = _learned(cell_0, aim)
    cells[second] = _learned(cell_1, aim)
    cells[third] = _learned(cell_2, aim)
    return bit, (low, high, code, place, raw)


@inline
def _learned(cell, aim):
    """A cell after a decision: its probability is nearer to `aim`, the more so the less it has seen."""
    probability = cell >> _SEEN_BITS
    seen = cell & ((1 << _SEEN_BITS) - 1)
    probability += ((aim - probability) * np.int64(RATE[np.uint64(seen)])) >> 16
    return (probability << _SEEN_BITS) | min(seen + 1, _MOST_SEEN)


@kernel
def code_raw(decode, value, bits, coder, models):
    """The lowest `bits` bits of a number, at most 24, without a model. Returns them, and the coder."""
    low, high, code, place, raw = coder
    _, _, data, size = models
    # The byte that holds the next bit; beyond the section's start a reader gets zeros.
    last = max(size - 1 - (raw >> 3), MARGIN - 1)
    shift = raw & 7
    if decode:
        word = np.int64(0)
        for byte in range(4):
            word |= np.int64(data[last - byte]) << (8 * byte)
        value = word >> shift
    value &= (1 << bits) - 1
    if not decode:
        word = value << shift
        for byte in range(4):
            data[last - byte] |= (word >> (8 * byte)) & 255
    return value, (low, high, code, place, raw + bits)


@inline
def where(coded, contexts):
    """Where the three tables have the decisions about a symbol, and where its mixing weights are."""
    return (
        (coded * _TABLES * _CONTEXTS + contexts[0]) * _NODES,
        ((coded * _TABLES + 1) * _CONTEXTS + contexts[1]) * _NODES,
        ((coded * _TABLES + 2) * _CONTEXTS + contexts[2]) * _NODES,
        np.int64(coded * _DEPTHS * _TABLES),
    )


@kernel
def code_tree(decode, value, bits, known, places, coder, models):
    """A number of `bits` bits of which the `known` highest are zeros. Returns it, and the coder.

    A decision for each of the highest bits, its node being the bits before it; the others raw.
    """
    modelled = min(bits, MODELLED_BITS)
    result = np.int64(0)
    for depth in range(known, modelled):
        bit = (value >> (bits - 1 - depth)) & 1
        bit, coder = _code_decision(decode, bit, places, (1 << depth) + result, depth, coder, models)
        result = 2 * result + bit
    rest = bits - max(modelled, known)
    if rest > 0:
        low_bits, coder = code_raw(decode, value, rest, coder, models)
        result = (result << rest) | low_bits
    return result, coder


@kernel
def code_magnitude(decode, value, places, coder, models):
    """A number from 0: how many bits it has in unary, the bit below the highest one, and the others raw."""
    length = np.int64(0)
    while length < MOST_MAGNITUDE_BITS:
        bit = np.int64((value >> length) > 0)
        bit, coder = _code_decision(decode, bit, places, length, min(length, _LENGTH_DEPTHS - 1), coder, models)
        if bit == 0:
            break
        length += 1
    if length < 2:
        return length, coder
    bit = (value >> (length - 2)) & 1
    bit, coder = _code_decision(decode, bit, places, _FIRST_BIT_NODE + length, _FIRST_BIT_DEPTH, coder, models)
    rest = length - 2
    result = 2 + bit
    if rest > 0:
        low_bits, coder = code_raw(decode, value, rest, coder, models)
        result = (result << rest) | low_bits
    return result, coder


@kernel
def code_flag(decode, bit, places, node, coder, models):
    """One decision. Returns it, and the coder."""
    return _code_decision(decode, bit, places, node, _FLAG_DEPTH, coder, models)
