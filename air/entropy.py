"""The entropy coder of .air files: adaptive binary models, mixed, and an arithmetic coder. Whole numbers only.

A symbol is cut into binary decisions. Each decision has a place in three tables of probabilities, and each table sees
another context: what is being coded, and views of what lies left, above and in earlier layers. The three
probabilities are mixed as logits with weights that learn (as in the PAQ family of compressors). All of it adapts to the
file as it is read, so no statistics are stored. docs/format.md is the specification.

Encoder and decoder are one kernel with a flag, so that they cannot drift apart. This module knows decisions and
numbers; which contexts a symbol of a Gaussian has is for `air.sections`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from air.render.simd import inline, kernel

CODED = 9
"""The things that are coded: eight symbols, and whether a patch holds a Gaussian. Each has its own models."""

_TABLES = 3
_CONTEXTS = 32
_NODES = 1 << 10  # decisions of a symbol in one context
_DEEPEST = 23  # decisions below this depth share their mixing weights

# Probabilities (that a decision is 1) have 22 bits in the tables and 12 where they meet; logits have 8 fractional bits.
_LARGEST_LOGIT = 2047
STRETCH = np.rint(256 * np.log((np.arange(4096) + 0.5) / (4095.5 - np.arange(4096)))).astype(np.int64)
STRETCH = STRETCH.clip(-_LARGEST_LOGIT, _LARGEST_LOGIT)
SQUASH = np.rint(4096 / (1 + np.exp(-np.arange(-_LARGEST_LOGIT, _LARGEST_LOGIT + 1) / 256))).astype(np.int64)
SQUASH = SQUASH.clip(1, 4095)

_MOST_SEEN = 255
RATE = np.array([131072 // (2 * seen + 3) for seen in range(_MOST_SEEN + 1)], np.int64)  # 65536 / (seen + 1.5)
_FIRST_WEIGHT = 26000  # a mixing weight of 1 is 65536
_LEARNING_SHIFT = 12

# The arithmetic coder's registers.
_LOW, _HIGH, _CODE, _PLACE = range(4)


class Models:
    """Probabilities and mixing weights as at the start of every file; they adapt from section to section."""

    def __init__(self) -> None:
        size = CODED * _TABLES * _CONTEXTS * _NODES
        self.probability = np.full(size, 1 << 21, np.int32)
        self.seen = np.zeros(size, np.uint8)
        self.weight = np.full(CODED * (_DEEPEST + 1) * _TABLES, _FIRST_WEIGHT, np.int64)


def start_registers() -> NDArray[np.int64]:
    """The coder at the start of a section."""
    return np.array([0, 0xFFFFFFFF, 0, 0], np.int64)


def coder_state(models: Models, registers: NDArray[np.int64], data: NDArray[np.uint8]) -> tuple[NDArray, ...]:
    """What the kernels read and change, in one value."""
    return models.probability, models.seen, models.weight, registers, data


@kernel
def start_decoding(registers, data):
    """Takes in a section's first four bytes."""
    for _ in range(4):
        byte = np.int64(data[registers[_PLACE]]) if registers[_PLACE] < data.shape[0] else 0
        registers[_CODE] = (registers[_CODE] << 8) | byte
        registers[_PLACE] += 1


@kernel
def finish_encoding(registers, data):
    """Ends a section; the decoder reads zeros after its end."""
    if registers[_LOW] > 0:
        data[registers[_PLACE]] = (registers[_LOW] >> 24) + 1
        registers[_PLACE] += 1


@inline
def _code_decision(decode, bit, places, mixer, state):
    """Codes one decision, whose places in the tables are given, and learns from it. Returns it."""
    probability, seen, weight, registers, data = state
    logits = (
        STRETCH[np.int64(probability[places[0]]) >> 10],
        STRETCH[np.int64(probability[places[1]]) >> 10],
        STRETCH[np.int64(probability[places[2]]) >> 10],
    )
    total = weight[mixer] * logits[0] + weight[mixer + 1] * logits[1] + weight[mixer + 2] * logits[2]
    logit = min(max(total >> 16, -_LARGEST_LOGIT), _LARGEST_LOGIT)
    chance = SQUASH[logit + _LARGEST_LOGIT]
    low, high = registers[_LOW], registers[_HIGH]
    middle = low + ((high - low) >> 12) * chance
    if decode:
        bit = 1 if registers[_CODE] <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + 1
    while (low ^ high) < (1 << 24):
        if decode:
            byte = np.int64(data[registers[_PLACE]]) if registers[_PLACE] < data.shape[0] else 0
            registers[_CODE] = ((registers[_CODE] << 8) & 0xFFFFFFFF) | byte
        else:
            data[registers[_PLACE]] = high >> 24
        registers[_PLACE] += 1
        low = (low << 8) & 0xFFFFFFFF
        high = ((high << 8) & 0xFFFFFFFF) | 255
    registers[_LOW], registers[_HIGH] = low, high
    error = (bit << 12) - chance
    for table in range(_TABLES):
        weight[mixer + table] += (logits[table] * error) >> _LEARNING_SHIFT
        place = places[table]
        old = np.int64(probability[place])
        probability[place] = old + ((((bit << 22) - bit - old) * RATE[seen[place]]) >> 16)
        seen[place] = min(np.int64(seen[place]) + 1, _MOST_SEEN)
    return bit


@kernel
def _place(coded, table, context):
    return ((coded * _TABLES + table) * _CONTEXTS + context) * _NODES


@kernel
def code_tree(decode, value, bits, coded, contexts, state):
    """A number of `bits` bits, highest first. A decision's node is the bits before it; after the tenth, node 0."""
    base = (_place(coded, 0, contexts[0]), _place(coded, 1, contexts[1]), _place(coded, 2, contexts[2]))
    result = 0
    node = 1
    for depth in range(bits):
        bit = (value >> (bits - 1 - depth)) & 1
        places = (base[0] + node, base[1] + node, base[2] + node)
        mixer = (coded * (_DEEPEST + 1) + min(depth, _DEEPEST)) * _TABLES
        bit = _code_decision(decode, bit, places, mixer, state)
        result = 2 * result + bit
        node = 2 * node + bit if depth < 9 else 0
    return result


@kernel
def code_magnitude(decode, value, coded, contexts, state):
    """A number from 0: how many bits it has in unary, then the bits below the highest one."""
    base = (_place(coded, 0, contexts[0]), _place(coded, 1, contexts[1]), _place(coded, 2, contexts[2]))
    length = 0
    while True:
        bit = 1 if value >> length else 0
        places = (base[0] + length, base[1] + length, base[2] + length)
        mixer = (coded * (_DEEPEST + 1) + min(length, 15)) * _TABLES
        bit = _code_decision(decode, bit, places, mixer, state)
        if bit == 0:
            break
        length += 1
        if length == 20:
            break
    if length < 2:
        return length
    result = 1
    for depth in range(length - 1):
        bit = (value >> (length - 2 - depth)) & 1
        node = 32 * (length + 1) + (result if depth < 4 else 12 + depth)
        places = (base[0] + node, base[1] + node, base[2] + node)
        mixer = (coded * (_DEEPEST + 1) + 16 + min(depth, 5)) * _TABLES
        bit = _code_decision(decode, bit, places, mixer, state)
        result = 2 * result + bit
    return result


@inline
def code_flag(decode, bit, coded, node, contexts, state):
    places = (
        _place(coded, 0, contexts[0]) + node,
        _place(coded, 1, contexts[1]) + node,
        _place(coded, 2, contexts[2]) + node,
    )
    mixer = (coded * (_DEEPEST + 1) + _DEEPEST) * _TABLES
    return _code_decision(decode, bit, places, mixer, state)


@kernel
def bit_length(value):
    """The number of bits of |value|."""
    value = abs(value)
    length = 0
    while value:
        value >>= 1
        length += 1
    return length
