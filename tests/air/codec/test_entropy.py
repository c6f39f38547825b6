"""The arithmetic coder by itself: any decisions come back, whatever follows them, for about what they are worth."""

import math

import numpy as np
import pytest
from numba import njit

from air.codec.entropy import MARGIN, Models, code_flag, code_raw, finish_encoding, learning_rate, start_coding, where
from air.compute.bits import pointer_to

NODES = 8


@njit
def code_decisions(decode, seen, decisions, raw_bits, cells, data):
    """Decisions about one symbol at nodes 0, 1, ..., each followed by some raw bits of 1 and 0 in turn."""
    models = (pointer_to(cells), learning_rate(seen), pointer_to(data), data.shape[0] - MARGIN)
    coder = start_coding(decode, models)
    raw_are_right = True
    for i in range(decisions.shape[0]):
        decisions[i], coder = code_flag(decode, decisions[i], where(i % 2, (1, 2, 3)), i % NODES, coder, models)
        expected = 0x555555 & ((1 << raw_bits) - 1)
        value, coder = code_raw(decode, expected, raw_bits, coder, models)
        raw_are_right = raw_are_right and value == expected
    return raw_are_right, coder if decode else finish_encoding(coder, models)


def encode(decisions: np.ndarray, raw_bits: int, seen: int) -> tuple[bytes, bytes]:
    data = np.zeros(4 * len(decisions) + 64 + raw_bits * len(decisions) // 8, np.uint8)
    _, (_, _, _, place, raw) = code_decisions(False, seen, decisions.copy(), raw_bits, Models().cells, data)
    end = len(data) - MARGIN
    return data[MARGIN:place].tobytes(), data[end - (raw + 7) // 8 : end].tobytes()


def decode(payload: bytes, number: int, raw_bits: int, seen: int) -> np.ndarray:
    data = np.frombuffer(bytes(MARGIN) + payload + bytes(MARGIN), np.uint8).copy()
    decisions = np.zeros(number, np.int64)
    raw_are_right, _ = code_decisions(True, seen, decisions, raw_bits, Models().cells, data)
    assert raw_are_right
    return decisions


@pytest.mark.parametrize("ones", [0.0, 0.0005, 0.03, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("number", [0, 1, 2, 7, 100, 30_000])
def test_decisions_come_back_whatever_follows(ones: float, number: int) -> None:
    generator = np.random.default_rng(number + round(1000 * ones))
    decisions = (generator.random(number) < ones).astype(np.int64)
    for raw_bits in (0, 5):
        start, end = encode(decisions, raw_bits, 0)
        for between in (b"", b"\0", b"\xff" * 9, generator.bytes(5)):
            assert np.array_equal(decode(start + between + end, number, raw_bits, 0), decisions)


@pytest.mark.parametrize("ones", [0.02, 0.2, 0.5])
def test_decisions_cost_about_their_entropy(ones: float) -> None:
    number = 60_000
    decisions = (np.random.default_rng(1).random(number) < ones).astype(np.int64)
    start, end = encode(decisions, 0, 10**6)
    entropy = -number * (ones * math.log2(ones) + (1 - ones) * math.log2(1 - ones))
    assert end == b""
    assert 0.98 * entropy < 8 * len(start) < 1.08 * entropy  # what was seen last counts more than what was long ago


def test_what_is_carried_runs_through_bytes_that_are_full() -> None:
    # Likely decisions that then fail, at every distance: the coder's lower end creeps over borders of bytes.
    decisions = np.concatenate([np.r_[np.zeros(distance, np.int64), 1, 1] for distance in range(400)])
    for shift in range(8):
        own = decisions[shift:]
        start, _ = encode(own, 0, 0)
        assert np.array_equal(decode(start, len(own), 0, 0), own)
