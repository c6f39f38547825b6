"""PNG: every depth and colour type, with and without a transparent colour, has the pixels that pypng reads."""

import io
import struct
import zlib
from itertools import product

import numpy as np
import png as pypng
import pytest

from pipeline.formats.images import decode, probe
from tests.support.picture_files import PICTURE, chunk, png, reason_of

HEIGHT, WIDTH = 9, 13
BACKGROUND = np.array([10, 200, 90])
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def rows_of(samples: np.ndarray, depth: int) -> bytes:
    """Rows with filter 0, packed to `depth` bits."""
    if depth == 16:
        flat = samples.astype(">u2").reshape(len(samples), -1)
        return b"".join(b"\0" + row.tobytes() for row in flat)
    bits = (samples.reshape(len(samples), -1)[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    packed = np.packbits(bits.reshape(len(samples), -1).astype(np.uint8), axis=1)
    return b"".join(b"\0" + row.tobytes() for row in packed)


def made(samples: np.ndarray, depth: int, colour_type: int, *extra: bytes, interlaced: bool = False) -> bytes:
    passes = [samples]
    if interlaced:
        passes = [samples[y::down, x::across] for x, y, across, down in ADAM7]
        passes = [part for part in passes if part.size]
    stream = zlib.compress(b"".join(rows_of(part, depth) for part in passes))
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, colour_type, 0, 0, interlaced)
    body = chunk(b"IDAT", stream) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + body


def shown(data: bytes) -> np.ndarray:
    """The picture over `BACKGROUND`, from pypng's samples."""
    width, height, rows, info = pypng.Reader(bytes=data).asRGBA()
    rgba = np.array([list(row) for row in rows], dtype=np.float64).reshape(height, width, 4) / (
        2 ** info["bitdepth"] - 1
    )
    return np.rint(255 * rgba[..., :3] * rgba[..., 3:] + BACKGROUND * (1 - rgba[..., 3:]))


@pytest.mark.parametrize("interlaced", [False, True], ids=["", "interlaced"])
@pytest.mark.parametrize(("colour_type", "depth"), [(kind, depth) for kind in DEPTHS for depth in DEPTHS[kind]])
def test_every_depth_with_transparent_colours(colour_type: int, depth: int, interlaced: bool):
    rng = np.random.default_rng(depth)
    channels = CHANNELS[colour_type]
    samples = rng.integers(0, 2**depth, (HEIGHT, WIDTH, channels))
    palette = chunk(b"PLTE", rng.integers(0, 256, 3 * 2**depth, dtype=np.uint8).tobytes()) if colour_type == 3 else b""
    transparencies = [b""]
    if colour_type == 3:
        for count in {1, 2**depth // 2, 2**depth}:
            transparencies.append(chunk(b"tRNS", rng.integers(0, 256, count, dtype=np.uint8).tobytes()))
        transparencies.append(chunk(b"tRNS", b"\xff\0"))
    elif colour_type in (0, 2):
        stored = {tuple(samples[y, x]) for y, x in product(range(3), range(3))}
        transparencies += [chunk(b"tRNS", struct.pack(f">{channels}H", *colour)) for colour in stored]
    for transparency in transparencies:
        data = made(samples, depth, colour_type, palette, transparency, interlaced=interlaced)
        # Alpha of 8 bits is one more rounding.
        assert np.abs(decode(data, background=(10, 200, 90)) - shown(data)).max() <= (colour_type in (3, 4, 6)), (
            transparency
        )
        if transparency and colour_type != 3:
            assert (shown(data) != shown(made(samples, depth, colour_type, palette, interlaced=interlaced))).any()


def test_only_the_low_bits_of_a_transparent_colour_count():
    samples = np.array([[[5], [6]]])
    assert decode(made(samples, 4, 0, chunk(b"tRNS", struct.pack(">H", 0xFFF5))))[0, :, 0].tolist() == [255, 102]


def test_metadata_of_any_size_does_not_cost_the_pixels():
    text = b"Comment\0\0" + zlib.compress(b"x" * 3 * 2**20)
    for extra in (
        chunk(b"zTXt", text),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + text[9:]),
        chunk(b"tEXt", b"a\0" + b"x" * 2**21),
    ):
        for data in (png(PICTURE, 2, extra), png(PICTURE, 2, after=extra)):
            assert np.array_equal(decode(data), PICTURE)
            assert probe(data).width == PICTURE.shape[1]
    many = [chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 2**19)) for _ in range(150)]  # 75 MiB together
    assert np.array_equal(decode(png(PICTURE, 2, *many)), PICTURE)


def test_damage_to_dropped_chunks_is_still_damage():
    data = bytearray(png(PICTURE, 2, chunk(b"tEXt", b"a\0some text")))
    data[data.index(b"some")] ^= 1
    assert reason_of(bytes(data)) == "corrupt"


def test_apples_variant_is_unsupported():
    data = png(PICTURE, 2)
    assert reason_of(data[:8] + chunk(b"CgBI", b"\x50\0\x20\x02") + data[8:]) == "unsupported"


def test_saved_by_pypng_itself():
    rows = PICTURE.reshape(len(PICTURE), -1).tolist()
    file = io.BytesIO()
    pypng.Writer(PICTURE.shape[1], PICTURE.shape[0], greyscale=False).write(file, rows)
    assert np.array_equal(decode(file.getvalue()), PICTURE)
