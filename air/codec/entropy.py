"""The entropy coder of .air files: adaptive binary models, added up, and an arithmetic coder. Whole numbers only.

A symbol is cut into binary decisions. Each decision has a place in four tables of logits (logarithms of odds). Three of
the tables have contexts: each sees other features of what lies left, above and in earlier layers. The sum of the four
logits is the logit of the decision; once the decision is known, all four move by the error of the probability, as
in logistic regression. Where no context helps, the fourth table is used alone. The tables adapt to the file as it is
read, so no statistics are stored. The low bits of numbers, which cannot be predicted, are stored as they are, from the
end of a section backwards. docs/format.md is the specification.

Encoder and decoder are one kernel with a flag, so that they cannot drift apart. This module knows decisions and
numbers; `air.codec.sections` chooses the contexts of a Gaussian's symbols.

What kernels pass along:

    coder     (low, span, code, place, raw): the interval of numbers that are still possible starts at `low` (in the
              encoder) and is `span` wide; the file's number is `code` above its start (in the decoder); `place` is the
              next byte; `raw` bits were taken from the end
    models    (cells, rate, data, size): `cells` points to those of `Models`, which learn at `rate`; `data` points to
              the section's bytes, which have `MARGIN` zeros before and after them and end at `size`
"""

from __future__ import annotations

import numpy as np

from air.compute.compile import inline, kernel
from air.compute.simd import opaque

CODED = 9
"""Kinds of numbers that are coded: eight symbols, and whether a patch has a Gaussian. Each has its own cells."""

MARGIN = 4
"""Zeros before and after a section's bytes, so that four can be read at a time."""

_CONTEXTS = 32
_ROWS = 3 * _CONTEXTS + 1  # of cells: three tables with contexts, and one without
_NODES = 64  # decisions of a symbol in one context
SIGN_NODE = _NODES - 1

MAX_MODELLED_BITS = 6  # of a tree
MAX_MAGNITUDE_BITS = 20
_FIRST_BIT_NODE = 20  # plus the length: the decision about the bit below the highest

# Logits count octaves of odds: in the cells in units of 2⁻¹⁹, in the table of 2⁻⁷. Probabilities have 12 bits.
_FINER = 12
_LARGEST_LOGIT = 1535
SQUASH = np.rint(4096 / (1 + 2.0 ** (-np.arange(-_LARGEST_LOGIT, _LARGEST_LOGIT + 1) / 128)))
SQUASH = SQUASH.clip(1, 4095).astype(np.int16)

# What is possible is below 2⁵⁶ wide, and at least 2²⁴ before a decision.
_SPAN_BITS = 56
_MIN_SPAN_BITS = 24


class Models:
    """The adaptive models of a file, as at its start; they learn from section to section.

    Attributes:
        cells: Logits that a decision is 1, for each kind of number, table, context and node.
    """

    def __init__(self) -> None:
        self.cells = np.zeros(CODED * _ROWS * _NODES, np.int32)


@inline
def learning_rate(seen):
    """How quickly cells learn after `seen` Gaussians of a file."""
    return 12 + 6144 // (256 + seen)


@kernel
def start_coding(decode, models):
    """The coder at the start of a section; a decoder takes in its first seven bytes."""
    _, _, data, size = models
    code = np.int64(0)
    place = np.int64(MARGIN)
    if decode:
        code = (_four_bytes(data, place, size) << 24) | (_four_bytes(data, place + 4, size) >> 8)
        place += 7
    return np.int64(0), np.int64(1 << _SPAN_BITS), code, place, np.int64(0)


@inline
def _four_bytes(data, place, size):
    """Four bytes as a number, the first byte highest; beyond the section's end there are zeros."""
    first = min(place, size)
    word = np.int64(0)
    for byte in range(4):
        word = (word << 8) | np.int64(data[first + byte])
    return word


@kernel
def finish_encoding(coder, models):
    """Writes the fewest bytes that lie in the coder's interval, whatever bytes follow. Returns the coder."""
    low, span, code, place, raw = coder
    data = models[2]
    length = np.int64(0)
    while True:
        unit = np.int64(1) << (_SPAN_BITS - 8 * length)
        first = (low + unit - 1) // unit * unit
        if first + unit <= low + span:
            break
        length += 1
    _write_four_bytes(first, place, data)
    _write_four_bytes((first << 32) & ((1 << _SPAN_BITS) - 1), place + 4, data)
    return low, span, code, place + length, raw


@kernel
def _write_four_bytes(low, place, data):
    """Writes the upper four of the seven bytes of `low`; a carry beyond them goes into the bytes before."""
    for byte in range(4):
        data[place + byte] = (low >> (_SPAN_BITS - 8 - 8 * byte)) & 255
    carry = low >> _SPAN_BITS
    while carry:
        place -= 1
        data[place] = (data[place] + 1) & 255
        carry = np.int64(data[place] == 0)


@inline
def _chance(places, node, models):
    """The probability, of 4096, that a decision is 1."""
    cells = models[0]
    logit = np.int64(0)
    for place in places:
        logit += cells[place + node]
    logit = min(max(logit >> _FINER, -_LARGEST_LOGIT), _LARGEST_LOGIT)
    return np.int64(SQUASH[np.uint64(logit + _LARGEST_LOGIT)])


@inline
def _code(decode, bit, chance, coder, models):
    """Codes a decision that has this probability of being 1. Returns it, and the coder.

    Decisions are hard to predict, so nothing here branches on them: the CPU would guess every few branches wrongly, and
    a wrong guess costs more than a decision. `opaque` keeps LLVM from making branches of it.
    """
    low, span, code, place, raw = coder
    _, _, data, size = models
    bound = (span >> 12) * chance
    all_bits = opaque((code - bound) >> 63 if decode else -bit)  # of a number if the decision is 1, else none
    span -= bound
    if decode:
        code -= bound & ~all_bits
    else:
        low += bound & ~all_bits
    span += (bound - span) & all_bits
    if span < (1 << _MIN_SPAN_BITS):
        span <<= 32
        if decode:
            code = (code << 32) | _four_bytes(data, place, size)
        else:
            _write_four_bytes(low, place, data)
            low = (low & ((1 << _MIN_SPAN_BITS) - 1)) << 32
        place += 4
    return all_bits & 1, (low, span, code, place, raw)


@inline
def _learn(bit, chance, places, node, models):
    """Moves the logit of a decision towards what the decision was."""
    cells, rate, _, _ = models
    step = ((bit << 12) - chance) * rate
    for place in places:
        cells[place + node] += step


@inline
def _code_decision(decode, bit, places, node, coder, models):
    """Codes one decision, and learns from it. Returns it, and the coder."""
    chance = _chance(places, node, models)
    bit, coder = _code(decode, bit, chance, coder, models)
    _learn(bit, chance, places, node, models)
    return bit, coder


@kernel
def code_raw(decode, value, bits, coder, models):
    """The lowest `bits` bits of a number, at most 24, without a model. Returns them, and the coder."""
    low, span, code, place, raw = coder
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
    return value, (low, span, code, place, raw + bits)


@inline
def where(coded, contexts):
    """Where the four tables have the decisions about a symbol in these contexts."""
    row = coded * _ROWS
    return (
        (row + contexts[0]) * _NODES,
        (row + _CONTEXTS + contexts[1]) * _NODES,
        (row + 2 * _CONTEXTS + contexts[2]) * _NODES,
        np.int64((row + 3 * _CONTEXTS) * _NODES),
    )


@inline
def where_alone(coded):
    """Where the table without contexts has the decisions about a symbol for which no context helps."""
    return (np.int64((coded * _ROWS + 3 * _CONTEXTS) * _NODES),)


@kernel
def code_tree(decode, value, bits, known, most, places, coder, models):
    """A number of `bits` bits of which the `known` highest are zeros. Returns it, and the coder.

    A decision for each of the `most` highest bits, its node being a one and the bits before it; the others raw.
    """
    modelled = max(min(bits, most), known)
    node = np.int64(1) << known
    chance = _chance(places, node, models)
    for depth in range(known, modelled):
        # Both probabilities that the next decision may have, so that they need not wait for this one. After the last
        # decision they lie beyond the tree's nodes, in rows that exist, and are not used.
        chance_after_0 = _chance(places, 2 * node, models)
        chance_after_1 = _chance(places, 2 * node + 1, models)
        bit = (value >> (bits - 1 - depth)) & 1
        bit, coder = _code(decode, bit, chance, coder, models)
        _learn(bit, chance, places, node, models)
        node = 2 * node + bit
        chance = chance_after_0 + ((chance_after_1 - chance_after_0) & -bit)
    result = node - (np.int64(1) << modelled)
    rest = bits - modelled
    if rest > 0:
        low_bits, coder = code_raw(decode, value, rest, coder, models)
        result = (result << rest) | low_bits
    return result, coder


@kernel
def code_magnitude(decode, value, places, coder, models):
    """A number from 0: how many bits it has in unary, the bit below the highest one, and the others raw."""
    length = np.int64(0)
    while length < MAX_MAGNITUDE_BITS:
        bit = np.int64((value >> length) > 0)
        bit, coder = _code_decision(decode, bit, places, length, coder, models)
        if bit == 0:
            break
        length += 1
    if length < 2:
        return length, coder
    bit = (value >> (length - 2)) & 1
    bit, coder = _code_decision(decode, bit, places, _FIRST_BIT_NODE + length, coder, models)
    rest = length - 2
    result = 2 + bit
    if rest > 0:
        low_bits, coder = code_raw(decode, value, rest, coder, models)
        result = (result << rest) | low_bits
    return result, coder


@kernel
def code_flag(decode, bit, places, node, coder, models):
    """One decision. Returns it, and the coder."""
    return _code_decision(decode, bit, places, node, coder, models)
