"""JPEG: a picture whose data ends early is refused, also where an end marker follows; odd frames are unsupported."""

import numpy as np
import pytest
from PIL import Image

from pipeline.formats.images import decode
from tests.support.picture_files import GRAY, HEIGHT, PICTURE, WIDTH, reason_of, saved

NOISE = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
END = b"\xff\xd9"
KINDS = {
    "baseline": saved(NOISE, "JPEG", quality=90),
    "gray": saved(NOISE[..., 0], "JPEG", quality=90),
    "progressive": saved(NOISE, "JPEG", quality=90, progressive=True),
    "4:4:4": saved(NOISE, "JPEG", quality=90, subsampling=0),
    "CMYK": saved(Image.frombytes("CMYK", (80, 64), np.dstack([NOISE, NOISE[..., 0]]).tobytes()), "JPEG"),
}


@pytest.mark.parametrize("name", KINDS)
def test_data_that_ends_early_before_an_end_marker(name: str):
    data = KINDS[name]
    assert decode(data).shape == (64, 80, 3)
    scan = data.rindex(b"\xff\xda") + 14
    for end in np.linspace(scan + 100, len(data) - 12, 12).astype(int):
        assert reason_of(data[:end].rstrip(b"\xff") + END) == "truncated"


@pytest.mark.parametrize("name", KINDS)
def test_bytes_around_the_picture_are_harmless(name: str):
    data = KINDS[name]
    expected = decode(data)
    for odd in (data + b"\0" * 500, data[:-2] + b"\0\0\0" + END, data + data):
        assert np.array_equal(decode(odd), expected)


def test_flat_grey_pictures_are_whole():
    """What is missing is drawn as this grey."""
    assert np.abs(decode(saved(np.full((40, 48, 3), 128, np.uint8), "JPEG")).astype(int) - 128).max() <= 1


@pytest.mark.parametrize(
    ("position", "value"),
    [(4, 12), (9, 2), (1, 0xC3), (1, 0xC5)],
    ids=["12 bits", "2 components", "lossless", "hierarchical"],
)
def test_odd_frames_are_unsupported(position: int, value: int):
    data = bytearray(saved(PICTURE, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + position] = value
    assert reason_of(bytes(data)) == "unsupported"


def test_a_height_behind_the_pixels_is_unsupported():
    data = bytearray(saved(GRAY, "JPEG"))
    frame = data.index(b"\xff\xc0")
    assert data[frame + 5 : frame + 9] == HEIGHT.to_bytes(2, "big") + WIDTH.to_bytes(2, "big")
    data[frame + 5 : frame + 7] = b"\0\0"
    assert reason_of(bytes(data)) == "unsupported"
