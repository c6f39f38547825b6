"""Image files of every kind, made from one small picture, for the tests of decoding."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import Reason, Rejected
from pipeline.formats.images import decode

HEIGHT, WIDTH = 40, 48


def smooth_picture(seed: int = 0) -> np.ndarray:
    """A colourful picture without hard edges and without black; lossy formats keep it well."""
    noise = np.random.default_rng(seed).integers(30, 226, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))


PICTURE = smooth_picture()
GRAY = PICTURE[..., 1]


def saved(image: Image.Image | np.ndarray, format_name: str, **options) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, format_name, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(samples: np.ndarray, colour_type: int, *extra: bytes, after: bytes = b"", stream: bytes | None = None) -> bytes:
    """A PNG, made by hand, of `samples`, shape (height, width, channels), uint8 or uint16."""
    height, width = samples.shape[:2]
    depth = 8 * samples.dtype.itemsize
    rows = samples.astype(samples.dtype.newbyteorder(">")).reshape(height, -1)
    stream = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)) if stream is None else stream
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", stream) + after + chunk(b"IEND", b"")


def reason_of(data: bytes, **options) -> str:
    with pytest.raises(Rejected) as caught:
        decode(data, **options)
    assert caught.value.reason in set(Reason)
    return caught.value.reason


def over(colour: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    weight = alpha[..., None] / 255
    return np.rint(colour * weight + np.array(background) * (1 - weight))


FILES = {
    "png": saved(PICTURE, "PNG"),
    "jpeg": saved(PICTURE, "JPEG"),
    "progressive": saved(PICTURE, "JPEG", progressive=True),
    "webp": saved(PICTURE, "WEBP"),
    "webp lossless": saved(PICTURE, "WEBP", lossless=True),
    "gif": saved(Image.fromarray(PICTURE).quantize(64), "GIF"),
    "bmp": saved(PICTURE, "BMP"),
    "tiff": saved(PICTURE, "TIFF"),
    "tiff lzw": saved(PICTURE, "TIFF", compression="tiff_lzw"),
}
