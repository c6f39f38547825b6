"""Colour tags of PNG: converted to sRGB as their definitions say, or refused."""

import struct
import zlib

import numpy as np
import pytest
from PIL import ImageCms

from pipeline.formats.images import decode
from tests.support.picture_files import PICTURE, chunk, png, reason_of, saved

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
RAMP_16 = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64, 1)
SRGB_PRIMARIES = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
P3_PRIMARIES = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)


def gamma(value: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(100000 * value)))


def primaries(*numbers: int) -> bytes:
    return chunk(b"cHRM", struct.pack(">8i", *numbers))


def cicp(*numbers: int) -> bytes:
    return chunk(b"cICP", bytes(numbers))


def srgb(light: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, in levels."""
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def light(levels: np.ndarray) -> np.ndarray:
    """The inverse of `srgb`."""
    stored = levels / 255
    return np.where(stored <= 0.04045, stored / 12.92, ((stored + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("value", [1.0, 1 / 1.8, 1 / 2.6, 0.3])
@pytest.mark.parametrize("samples", [RAMP, RAMP_16], ids=["8 bits", "16 bits"])
def test_gamma(samples: np.ndarray, value: float):
    expected = srgb((samples / np.iinfo(samples.dtype).max) ** (1 / (round(100000 * value) / 100000)))
    for channels, colour_type in ((1, 0), (3, 2)):
        data = png(np.repeat(samples, channels, axis=2), colour_type, gamma(value))
        assert np.abs(decode(data) - expected).max() <= 0.5 + 1e-6


def test_gamma_of_a_palette_and_under_alpha():
    palette = chunk(b"PLTE", bytes([128, 64, 0] * 256))
    expected = srgb(np.array([128, 64, 0]) / 255)
    assert np.abs(decode(png(RAMP, 3, palette, gamma(1.0))) - expected).max() <= 0.5
    rgba = np.full((4, 4, 4), 128, np.uint8)
    expected = np.rint(srgb(np.array(128 / 255)))
    assert np.abs(decode(png(rgba, 6, gamma(1.0))) - (expected * 128 + 255 * 127) / 255).max() <= 1


@pytest.mark.parametrize("value", [0.45455, 0.45, 0.46, 0.0])
def test_gamma_of_srgb_changes_nothing(value: float):
    assert np.array_equal(decode(png(PICTURE, 2, gamma(value))), PICTURE)
    assert np.array_equal(decode(png(PICTURE, 2, gamma(value), primaries(*SRGB_PRIMARIES))), PICTURE)


def test_primaries():
    """Display P3 in linear light to sRGB: the matrix is that of CSS Color 4."""
    matrix = np.array([[1.2249402, -0.2249402, 0.0], [-0.0420570, 1.0420571, 0.0], [-0.0196376, -0.0786361, 1.0982736]])
    expected = srgb(np.clip(light(PICTURE) @ matrix.T, 0, 1))
    for chunks in ([primaries(*P3_PRIMARIES)], [gamma(0.45455), primaries(*P3_PRIMARIES)], [cicp(12, 13, 0, 1)]):
        assert np.abs(decode(png(PICTURE, 2, *chunks)) - expected).max() <= 0.55


def test_another_white_stays_white():
    d50 = (34570, 35850, *SRGB_PRIMARIES[2:])
    white = np.full((3, 3, 3), 255, np.uint8)
    assert (decode(png(white, 2, primaries(*d50))) == 255).all()


@pytest.mark.parametrize("numbers", [(0,) * 8, (31270, 32900, *(30000,) * 6), (31270, -1, *SRGB_PRIMARIES[2:])])
def test_primaries_that_are_nonsense_are_ignored(numbers: tuple[int, ...]):
    assert np.array_equal(decode(png(PICTURE, 2, primaries(*numbers))), PICTURE)


def test_the_order_of_chunks_is_that_of_the_specification():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    icc = chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(profile))
    assert np.array_equal(decode(png(PICTURE, 2, chunk(b"sRGB", b"\0"), gamma(1.0))), PICTURE)
    assert np.array_equal(decode(png(PICTURE, 2, icc, gamma(1.0))), PICTURE)
    linear = decode(png(PICTURE, 2, gamma(1.0)))
    assert np.array_equal(decode(png(PICTURE, 2, cicp(1, 8, 0, 1), icc, chunk(b"sRGB", b"\0"))), linear)
    assert np.array_equal(decode(png(PICTURE, 2, cicp(1, 13, 0, 1), gamma(1.0))), PICTURE)


@pytest.mark.parametrize(
    ("transfer", "to_light"),
    [
        (1, lambda v: np.where(v < 0.081, v / 4.5, ((v + 0.099) / 1.099) ** (1 / 0.45))),
        (4, lambda v: v**2.2),
        (5, lambda v: v**2.8),
        (8, lambda v: v),
    ],
)
def test_curves_of_code_points(transfer: int, to_light):
    expected = srgb(to_light(RAMP / 255.0))
    assert np.abs(decode(png(RAMP, 0, cicp(1, transfer, 0, 1))) - expected).max() <= 0.6


@pytest.mark.parametrize(
    "numbers",
    [(9, 16, 0, 1), (9, 18, 0, 1), (1, 16, 0, 1), (1, 13, 1, 1), (1, 13, 0, 0), (3, 13, 0, 1), (1, 99, 0, 1)],
    ids=["PQ", "HLG", "PQ with sRGB's primaries", "YCbCr", "limited range", "primaries 3", "transfer 99"],
)
def test_hdr_and_unknown_code_points_are_unsupported(numbers: tuple[int, ...]):
    assert reason_of(png(PICTURE, 2, cicp(*numbers))) == "unsupported"


@pytest.mark.parametrize(("transfer", "known"), [(16, False), (18, False), (13, True)])
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_hdr_in_an_icc_profile_is_unsupported(format_name: str, transfer: int, known: bool):
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", profile, 128)
    names = [profile[132 + 12 * n : 136 + 12 * n] for n in range(count)]
    place = names.index(b"cprt")  # a tag that no conversion needs
    profile[132 + 12 * place : 144 + 12 * place] = struct.pack(">4sII", b"cicp", len(profile), 12)
    profile += b"cicp\0\0\0\0" + bytes([9, transfer, 0, 1])
    profile[:4] = len(profile).to_bytes(4, "big")
    data = saved(PICTURE, format_name, icc_profile=bytes(profile))
    if known:
        assert decode(data).shape == PICTURE.shape
    else:
        assert reason_of(data) == "unsupported"
