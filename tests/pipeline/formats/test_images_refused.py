"""Decoding: every kind of damage has its name, and costs neither memory nor time."""

import struct
import time
import tracemalloc
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageFile

from pipeline.errors import Rejected
from pipeline.formats.images import decode, probe
from tests.support.picture_files import FILES, HEIGHT, PICTURE, WIDTH, chunk, png, reason_of, saved, smooth_picture

# Pillow's remarks on odd TIFF and EXIF tags.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def test_empty():
    assert reason_of(b"") == "empty"


@pytest.mark.parametrize("data", [b"hello", b"\0" * 1000, b"<html></html>", b"\x89PNG", b"RIFF\0\0\0\0WAVE"])
def test_not_an_image(data: bytes):
    assert reason_of(data) == "not_an_image"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIF"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "AVIF"),
        (b"%PDF-1.7", "PDF"),
        (b"8BPS\0\x01", "Photoshop"),
        (saved(PICTURE, "ICO"), "icon"),
        (saved(PICTURE, "PPM"), "Netpbm"),
        (saved(Image.fromarray(PICTURE[..., 0].astype(np.float32)), "TIFF"), "32 bits float"),
        (saved(Image.fromarray(PICTURE[..., 0].astype(np.int32)), "TIFF"), "32 bits signed"),
    ],
)
def test_unsupported_is_named(data: bytes, name: str):
    with pytest.raises(Rejected, match=name) as caught:
        decode(data)
    assert caught.value.reason == "unsupported"


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_refused(name: str):
    """A picture that is whole although its file is not (a GIF without its last byte) may be read; never a part."""
    data = FILES[name]
    whole = decode(data)
    reasons = []
    for length in range(len(data)):
        try:
            assert np.array_equal(decode(data[:length]), whole)
        except Rejected as error:
            reasons.append(error.reason)
    assert len(reasons) > len(data) - 4
    # The first bytes do not name the format yet, and in rare places the cut looks like an end.
    assert reasons.count("truncated") > 0.95 * len(data)
    if name in ("png", "jpeg", "progressive", "webp", "webp lossless"):
        assert set(reasons[12:]) == {"truncated"}
        assert len(reasons) == len(data)


@pytest.mark.parametrize("name", FILES)
def test_damage_gives_an_array_or_a_reason(name: str):
    rng = np.random.default_rng(7)
    start = time.monotonic()
    for _ in range(400):
        data = bytearray(FILES[name])
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            data[position] = rng.integers(256)
        with suppress(Rejected):  # anything else fails the test
            rgb = decode(bytes(data), max_pixels=10**6)
            assert (rgb.dtype, rgb.shape[2]) == (np.uint8, 3)
    assert time.monotonic() - start < 30


def test_any_flipped_byte_of_a_png_is_found():
    data = FILES["png"]
    for position in range(8, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        assert reason_of(bytes(damaged)) in ("corrupt", "truncated")


def test_corrupt_and_truncated_are_told_apart():
    assert reason_of(png(PICTURE, 2, stream=b"not a zlib stream")) == "corrupt"
    assert reason_of(png(PICTURE, 2, stream=zlib.compress(b"\0" * 9))) == "corrupt"
    assert reason_of(FILES["png"][:-12]) == "truncated"
    jpeg = FILES["jpeg"]
    assert reason_of(jpeg[: len(jpeg) // 2] + b"\0" * 2000) == "truncated"  # a preallocated download
    assert reason_of(b"\xff\xd8\xff\xe0" + b"\0" * 50 + b"\xff\xd9") in ("corrupt", "truncated")
    thumbnail = saved(smooth_picture(1)[:8, :8], "JPEG")
    with_thumbnail = saved(PICTURE, "JPEG", exif=b"Exif\0\0" + thumbnail)
    assert reason_of(with_thumbnail[:-300]) == "truncated"


@pytest.mark.parametrize("keep", [1, HEIGHT // 2, HEIGHT - 1])
@pytest.mark.parametrize("colour_type", [0, 2, 6])
def test_a_png_with_missing_rows_is_corrupt(keep: int, colour_type: int):
    channels = {0: 1, 2: 3, 6: 4}[colour_type]
    samples = np.full((HEIGHT, WIDTH, channels), 200, np.uint8)
    stream = zlib.compress((b"\0" + b"\xc8" * (WIDTH * channels)) * keep)
    if keep == HEIGHT - 1:
        samples[-2] = 0
        stream = zlib.compress((b"\0" + b"\xc8" * (WIDTH * channels)) * (keep - 1))
    assert reason_of(png(samples, colour_type, stream=stream)) == "corrupt"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 9)])
def test_black_pngs_are_whole(mode: str, size: tuple[int, int]):
    assert decode(saved(Image.new(mode, size), "PNG")).shape == (size[1], size[0], 3)


def test_black_interlaced_png_is_whole():
    # Adam7 by hand, 5 x 3 gray pixels: the columns in each row of passes 1, 2, 4, 5, 6, 6, 7; pass 3 is empty.
    stream = zlib.compress(b"".join(b"\0" + b"\0" * columns for columns in (1, 1, 1, 3, 2, 2, 5)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 3, 8, 0, 0, 0, 1))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", stream) + chunk(b"IEND", b"")
    assert (decode(data) == 0).all()


def huge_files() -> dict[str, bytes]:
    bmp = bytearray(FILES["bmp"])
    bmp[18:26] = struct.pack("<ii", 60000, 60000)
    gif = bytearray(FILES["gif"])
    gif[6:10] = struct.pack("<HH", 60000, 60000)
    jpeg = bytearray(FILES["jpeg"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 60000)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return {"png": b"\x89PNG\r\n\x1a\n" + header + body, "bmp": bytes(bmp), "gif": bytes(gif), "jpeg": bytes(jpeg)}


@pytest.mark.parametrize("name", huge_files())
def test_huge_headers_cost_nothing(name: str):
    tracemalloc.start()
    assert reason_of(huge_files()[name]) == "too_many_pixels"
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_the_limit_is_exact():
    assert decode(FILES["png"], max_pixels=HEIGHT * WIDTH).shape == PICTURE.shape
    assert reason_of(FILES["png"], max_pixels=HEIGHT * WIDTH - 1) == "too_many_pixels"
    assert probe(FILES["png"], max_pixels=HEIGHT * WIDTH).width == WIDTH
    with pytest.raises(Rejected, match="too_many_pixels"):
        probe(FILES["png"], max_pixels=HEIGHT * WIDTH - 1)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_compressed_chunks_that_unpack_to_gigabytes(kind: bytes):
    """The pixels are good without them, and nothing unpacks them beyond a bound."""
    bomb = chunk(kind, b"name\0\0" + zlib.compress(b"\0" * 2**28, 1))
    tracemalloc.start()
    assert np.array_equal(decode(png(PICTURE, 2, bomb)), PICTURE)
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


def test_a_pixel_stream_that_unpacks_to_gigabytes():
    """Only as much is unpacked as the header asks for."""
    data = png(np.zeros((4, 4, 3), np.uint8), 2, stream=zlib.compress(b"\0" * 2**28, 1))
    start = time.monotonic()
    assert decode(data).shape == (4, 4, 3)
    assert time.monotonic() - start < 2


def test_out_of_memory_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch):
    def no_memory(self: ImageFile.ImageFile) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", no_memory)
    with pytest.raises(MemoryError):
        decode(FILES["jpeg"])
