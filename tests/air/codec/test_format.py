"""docs/format.md says all there is to say: a decoder written from it alone decodes the same bits."""

import struct
import zlib
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch

from air.codec import entropy, sensitivity
from air.codec.file import decode_stages, encode_stages
from air.codec.sensitivity import SensitivityQuantizer
from air.codec.symbols import lay_out
from air.codec.uniform import channel_values, fit_uniform_quantizer
from air.gaussians import anchors
from tests.support.cases import random_gaussians
from tests.support.format_decoder import File


def both_decoders_agree(blob: bytes) -> int:
    """How many Gaussians both decoders find, equal bit for bit."""
    independent = File(blob).gaussians()
    ours = decode_stages(blob)
    assert len(ours) == len(independent)
    for stage, expected in zip(ours, independent, strict=True):
        assert stage.patch.tolist() == [patch for patch, _ in expected]
        own = stage.gaussians
        rows = torch.cat([own.xy, own.scale, own.angle[:, None], own.colour], dim=1).numpy()
        values = np.array([values for _, values in expected]).reshape(-1, 8).astype(np.float32)
        assert np.array_equal(rows, values)
    return sum(len(stage) for stage in independent)


@pytest.mark.parametrize(("step", "patch_size"), [(200, 4), (3000, 6), (30000, 9)])
def test_files_by_sensitivity_decode_alike(step: int, patch_size: int):
    gaussians = random_gaussians(150, 37, 45, step, outside=4.0)
    # Some very wide, some very thin, some strong: all the bits that there can be.
    gaussians.scale[::7] *= 30
    gaussians.scale[::5, 1] *= 0.2
    gaussians.colour[::11] *= 50
    quantizer = SensitivityQuantizer(step, scale_weight=20, angle_weight=90, position_weight=40)
    blob = encode_stages(lay_out(gaussians, 37, 45, patch_size), 37, 45, patch_size, quantizer)
    assert both_decoders_agree(blob) > 80


@pytest.mark.parametrize("bits", [(8, 8, 7, 7, 7, 8, 4, 4), (12, 3, 1, 10, 16, 16, 2, 9)])
def test_uniform_files_decode_alike(bits: tuple[int, ...]):
    gaussians = random_gaussians(120, 37, 45, 1)
    stages = lay_out(gaussians, 37, 45, 6)
    grid = anchors(37, 45, 6)
    values = [channel_values(stage.gaussians, grid[torch.from_numpy(stage.patch)]) for stage in stages]
    blob = encode_stages(stages, 37, 45, 6, fit_uniform_quantizer(torch.cat(values), bits))
    assert both_decoders_agree(blob) == len(gaussians)


def test_an_empty_file_decodes_alike():
    blob = encode_stages([], 5, 7, 3, SensitivityQuantizer(100))
    assert both_decoders_agree(blob) == 0


def test_a_file_made_of_whole_numbers_is_what_the_page_says():
    # A header from the page's table and a payload of any bytes: if it means something, it means the same to both.
    start = bytes.fromhex("89414952") + struct.pack("<BBBBIIHiI", 1, 1, 1, 0, 10, 20, 10, -64, 768)
    start += struct.pack("<IHHH", 1500, 15, 105, 21)
    generator = np.random.default_rng(3)
    agreed = 0
    for _ in range(60):
        payload = generator.bytes(30)
        for count in (1, 2):
            body = bytes([count, len(payload)]) + payload
            header = start + struct.pack("<I", zlib.crc32(start))
            blob = header + body + struct.pack("<I", zlib.crc32(body, zlib.crc32(start)))
            try:
                stages = decode_stages(blob)
            except ValueError:
                continue
            assert len(stages[0].patch) == count
            agreed += both_decoders_agree(blob) > 0
            break
    assert agreed >= 3


def test_the_frame_is_what_the_page_says():
    blob = encode_stages([], 300, 200, 7, SensitivityQuantizer(4660, 1, 2, 3))
    start = bytes.fromhex("89414952 01 01 00 00 2c010000 c8000000 0700 00000000 c0010000 34120000 0100 0200 0300")
    assert blob == start + struct.pack("<I", zlib.crc32(start))


def assert_rounded(table: np.ndarray, exact: list[Decimal], least: int | None = None, most: int | None = None) -> None:
    for own, value in zip(table.tolist(), exact, strict=True):
        nearest = int(value.to_integral_value())
        assert abs(value - nearest) < Decimal("0.499999")
        expected = nearest if least is None else max(least, nearest)
        assert own == (expected if most is None else min(most, expected))


def test_the_tables_are_the_nearest_whole_numbers_beyond_doubt():
    getcontext().prec = 50
    logarithm = Decimal(2).ln()

    def power(exponent: Decimal) -> Decimal:
        return (logarithm * exponent).exp()

    steps = [Decimal(j) / 64 for j in range(768)]
    assert_rounded(sensitivity.SCALE, [power(20 + j) for j in steps])
    assert_rounded(sensitivity.SQUARED_SCALE, [4096 * power(2 * (j - 3)) for j in steps])
    assert_rounded(sensitivity.SQUARED_RATIO, [256 * power(2 * j) for j in steps])
    assert_rounded(sensitivity.AMPLITUDE, [power(40 - Decimal(j) / 128) for j in range(1536)])
    exact = [4096 / (1 + power(-Decimal(level) / 128)) for level in range(-1535, 1536)]
    assert_rounded(entropy.SQUASH, exact, 1, 4095)


def test_the_squared_cosines_are_the_nearest_whole_numbers_beyond_doubt():
    getcontext().prec = 50
    # cos² x = (1 + cos 2x) / 2, with cos from its series.
    pi = Decimal("3.14159265358979323846264338327950288419716939937510")
    for j, own in enumerate(sensitivity.SQUARED_COSINE.tolist()):
        x = 2 * pi * j / 256
        term = total = Decimal(1)
        for n in range(1, 60):
            term = -term * x * x / ((2 * n - 1) * (2 * n))
            total += term
        exact = 4096 * (1 + total) / 2
        assert own == int(exact.to_integral_value())
        distance = abs(exact - exact.to_integral_value())
        assert distance < Decimal("0.499999")
