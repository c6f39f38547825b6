"""Image files of every kind, made from one small picture, for the tests of decoding."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

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


def linear_profile() -> bytes:
    """A made RGB profile: sRGB's with another tone curve, gamma 1.0, so that the right answer is known."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", profile, 128)[0]
    for entry in range(count):
        name, offset, size = struct.unpack_from(">4sII", profile, 132 + 12 * entry)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            # A parametric curve of type 0 is one number, the exponent (ICC.1 10.18).
            profile[offset : offset + size] = struct.pack(">4sIHHI", b"para", 0, 0, 0, 65536).ljust(size, b"\0")
        if name == b"desc":
            profile[offset : offset + size] = profile[offset : offset + size].replace(
                "sRGB".encode("utf-16-be"), b"\0x" * 4
            )
    return bytes(profile)


def srgb_encoded(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
