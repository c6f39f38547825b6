"""PNG files: their chunks and checksums, their transparent colours, and the colour space that their chunks state.

This module must not know other formats, nor how colours are converted.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from pipeline.errors import Reason, Rejected
from pipeline.formats.colour import Encoding, encoding_of_chunks, encoding_of_code_points
from pipeline.formats.samples import Pixels, gray_or_rgb, to_eight_bits

MAX_PROFILE_BYTES = 2**24
"""Larger colour profiles are ignored. Real ones have at most a few megabytes."""

# Chunks that Pillow does not get. It unpacks texts and profiles, and fails where they are large.
_KEPT_FROM_PILLOW = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf"})
_SIGNATURE_BYTES = 8
_GRAY, _RGB, _PALETTE = 0, 2, 3


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, body) of each chunk of a PNG file up to IEND. Bytes after IEND are ignored.

    Raises:
        Rejected: `truncated` if the file ends before IEND; `corrupt` at the first wrong checksum.
    """
    position = _SIGNATURE_BYTES
    while True:
        if position + 8 > len(data):
            raise Rejected(Reason.TRUNCATED, f"PNG: the file ends at byte {len(data)}, without an IEND chunk")
        length, kind = struct.unpack_from(">I4s", data, position)
        if not kind.isalpha() or length >= 2**31:
            raise Rejected(Reason.CORRUPT, f"PNG: no valid chunk at byte {position}")
        end = position + 12 + length
        if end > len(data):
            raise Rejected(Reason.TRUNCATED, f"PNG: {len(data)} bytes, but its {kind.decode()} chunk ends at {end}")
        body = data[position + 8 : end - 4]
        if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(data[end - 4 : end], "big"):
            raise Rejected(Reason.CORRUPT, f"PNG: wrong checksum in the {kind.decode()} chunk at byte {position}")
        yield kind, body
        if kind == b"IEND":
            return
        position = end


def check_whole(data: bytes) -> None:
    """Reads all chunks.

    Raises:
        Rejected: As `chunks` does.
    """
    for _ in chunks(data):
        pass


def ends_early(data: bytes) -> bool:
    """Whether the file ends before IEND."""
    try:
        check_whole(data)
    except Rejected as error:
        return error.reason == Reason.TRUNCATED
    return False


def without_texts(data: bytes) -> bytes:
    """The file without the chunks whose size may exceed Pillow's limits. Checks nothing; damage stays in the result."""
    kept: list[bytes] = []
    start = position = _SIGNATURE_BYTES
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data) or not kind.isalpha():
            break
        if kind in _KEPT_FROM_PILLOW:
            kept.append(data[start:position])
            start = end
        position = end
    return b"".join([data[:_SIGNATURE_BYTES], *kept, data[start:]]) if kept else data


def refuse_foreign(data: bytes) -> None:
    """Raises Rejected for Apple's variant of PNG, which other programs cannot read."""
    if data[12:16] == b"CgBI":
        raise Rejected(Reason.UNSUPPORTED, "Apple's variant of PNG (CgBI); convert it with `pngcrush -revert-iphone`")


def exif_of(data: bytes) -> bytes | None:
    """The EXIF block, which may follow the pixels."""
    return next((body for kind, body in chunks(data) if kind == b"eXIf"), None)


def colour_space_of(data: bytes) -> bytes | Encoding | None:
    """An ICC profile, or an encoding that is not sRGB; None for sRGB.

    The order is that of the PNG specification: cICP before iCCP, iCCP before sRGB, and that before gAMA and cHRM.

    Raises:
        Rejected: `unsupported`: HDR, or code points that are not known here.
    """
    found: dict[bytes, bytes] = {}
    for kind, body in chunks(data):
        if kind == b"IDAT":
            break
        found.setdefault(kind, body)
    if b"cICP" in found and len(found[b"cICP"]) == 4:
        return encoding_of_code_points(*found[b"cICP"])
    profile = _unpack_profile(found[b"iCCP"]) if b"iCCP" in found else None
    if profile is not None:
        return profile
    if b"sRGB" in found:
        return None
    return encoding_of_chunks(_fixed_point(found.get(b"gAMA"), 1), _fixed_point(found.get(b"cHRM"), 8))


def load(image: PngImageFile, data: bytes) -> Pixels:
    """The pixels; `image` is the file's reader.

    Raises:
        Rejected: `corrupt`: rows are missing.
        Exception: Whatever Pillow raises for damaged data.
    """
    _, _, depth, colour_type, _, _, _ = _header(data)
    transparent = next((body for kind, body in chunks(data) if kind == b"tRNS"), None)
    if colour_type == _PALETTE:
        image.load()
        _check_rows_present(image, data)
        return gray_or_rgb(image)
    if depth == 16:
        raw_mode = str(image.tile[0].args) if image.tile else ""
        samples = _load_deep(image, data, raw_mode)
    else:
        image.load()
        _check_rows_present(image, data)
        if colour_type not in (_GRAY, _RGB):
            return gray_or_rgb(image)
        if transparent is None:
            return Pixels(image.convert("L") if colour_type == _GRAY else image.convert("RGB"), None)
        samples = np.asarray(image.convert("L") if colour_type == _GRAY else image)
        samples = samples[..., None] if colour_type == _GRAY else samples
    return _with_transparent_colour(samples, depth, colour_type, transparent)


def _with_transparent_colour(samples: np.ndarray, depth: int, colour_type: int, transparent: bytes | None) -> Pixels:
    """Colour and alpha from samples, shape (H, W, C), uint8 or uint16, that fill the range of their type."""
    if colour_type not in (_GRAY, _RGB):
        alpha = Image.fromarray(np.ascontiguousarray(to_eight_bits(samples[..., -1])))
        colour = samples[..., 0] if samples.shape[2] == 2 else samples[..., :3]
        return Pixels(np.ascontiguousarray(colour), alpha)
    count = 1 if colour_type == _GRAY else 3
    colour = samples[..., 0] if colour_type == _GRAY else samples
    if transparent is None or len(transparent) < 2 * count:
        return Pixels(colour, None)
    # The chunk has 16-bit numbers, of which the lowest `depth` bits count. Samples of fewer than 8 bits are stretched.
    largest = 2**depth - 1
    stored = np.array(struct.unpack_from(f">{count}H", transparent)) & largest
    wanted = (stored * (max(255, largest) // largest)).astype(samples.dtype)
    opaque = (samples != wanted).any(axis=2)
    return Pixels(colour, Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))


def _load_deep(image: PngImageFile, data: bytes, raw_mode: str) -> np.ndarray:
    """16-bit samples, shape (height, width, channels), uint16, channels in the file's order."""
    if raw_mode == "LA;16B":
        # Pillow would keep the high bytes only. RGBA also has four bytes per pixel, and reading as RGBA keeps them all.
        image.tile = [tile._replace(args="RGBA") for tile in image.tile]
        image.load()
        raw = np.asarray(image).astype(np.uint16)
        return raw[..., 0::2] << 8 | raw[..., 1::2]
    if raw_mode in ("RGB;16B", "RGBA;16B"):
        # Pillow keeps one byte per sample: the high one in the file's byte order, the low one in the opposite order.
        low = PngImageFile(io.BytesIO(without_texts(data)))
        low.tile = [tile._replace(args=raw_mode.replace("16B", "16L")) for tile in low.tile]
        low.load()
        image.load()
        return np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
    image.load()
    return np.asarray(image).astype(np.uint16)[..., None]


def _header(data: bytes) -> tuple[int, int, int, int, int, int, int]:
    """Width, height, depth, colour type, compression, filters, and whether rows are interlaced."""
    return struct.unpack(">IIBBBBB", next(body for kind, body in chunks(data) if kind == b"IHDR")[:13])


def _check_rows_present(image: PngImageFile, data: bytes) -> None:
    """Refuses a file whose pixel stream is well formed but too short. Pillow leaves the missing rows black.

    Only the stream of a picture whose last rows are black is unpacked a second time.
    """
    if image.crop((0, max(0, image.height - 2), *image.size)).getbbox(alpha_only=False):
        return
    width, height, depth, colour_type, _, _, interlaced = _header(data)
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    expected = 0
    # (first column, first row, column step, row step) of each pass; one filter byte starts each row
    adam7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    for column, row, column_step, row_step in adam7 if interlaced else ((0, 0, 1, 1),):
        columns = max(0, -((column - width) // column_step))
        rows = max(0, -((row - height) // row_step))
        expected += rows * (1 + (columns * samples * depth + 7) // 8) if columns else 0
    stream = zlib.decompressobj()
    found = 0
    for kind, body in chunks(data):
        while kind == b"IDAT" and body and found < expected:
            found += len(stream.decompress(body, 2**20))  # in bounded pieces: a few bytes may unpack to gigabytes
            body = stream.unconsumed_tail
    if found + len(stream.flush()) < expected:
        raise Rejected(Reason.CORRUPT, f"PNG: the pixel stream holds {found} of {expected} bytes")


def _unpack_profile(body: bytes) -> bytes | None:
    """The profile of an iCCP chunk; None if it is broken or larger than `MAX_PROFILE_BYTES`."""
    _, _, packed = body.partition(b"\0")
    stream = zlib.decompressobj()
    try:
        profile = stream.decompress(packed[1:], MAX_PROFILE_BYTES)
    except zlib.error:
        return None
    return profile if stream.eof else None


def _fixed_point(body: bytes | None, count: int) -> tuple[float, ...] | None:
    """The numbers of a gAMA or cHRM chunk, stored in units of 1/100000; None if the chunk is absent or short."""
    if body is None or len(body) < 4 * count:
        return None
    return tuple(number / 100000 for number in struct.unpack_from(f">{count}i", body))
