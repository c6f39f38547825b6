"""Decodes the bytes of an image file to RGB pixels, or refuses them with a reason.

    rgb = decode(data)              # H x W x 3 uint8 in sRGB, upright; raises Rejected

A corpus holds every kind of file, and some files are broken. Each kind of fault has a `Reason`, so that a job can count
it, put the file in quarantine and go on. Files that most readers show with wrong pixels and no error (a JPEG padded
with grey, a PNG with a bad checksum) are refused too: a target made from them would teach wrong pixels.

This module must not know where the bytes come from, nor what the pixels are for. It holds no state and leaves
Pillow's global settings alone, so threads may share it.
"""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.errors import DamagedDataError, Reason, Rejected

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
"""File name endings, in lower case, of images in a folder that is scanned. Decoding looks at the content alone."""

MAX_PIXELS = 2**27
"""The largest image that is decoded by default: 134 million pixels, 0.4 GB as RGB."""

WHITE = (255, 255, 255)


class ImageInfo(NamedTuple):
    """The header's content. Width and height are in pixels, of the upright image; mode is Pillow's; frames >= 1."""

    format: str
    mode: str
    width: int
    height: int
    frames: int

    @property
    def extension(self) -> str:
        """The format's usual file ending, without a dot."""
        return {"JPEG": "jpg", "TIFF": "tif"}.get(self.format, self.format.lower())


# Reader classes instead of Image.open(), which hides the cause of a failure and takes its pixel limit from a global.
_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
}

# (format, where its signature starts, the signature)
_SIGNATURES = (
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("PNG", 0, b"\x89PNG\r\n\x1a\n"),
    ("WEBP", 8, b"WEBP"),
    ("GIF", 0, b"GIF87a"),
    ("GIF", 0, b"GIF89a"),
    ("BMP", 0, b"BM"),
    ("TIFF", 0, b"II*\0"),
    ("TIFF", 0, b"MM\0*"),
    ("TIFF", 0, b"II+\0"),
    ("TIFF", 0, b"MM\0+"),
    # Formats that are not read, so that the message names them.
    ("AVIF", 4, b"ftypavi"),
    ("HEIF", 4, b"ftyphei"),
    ("HEIF", 4, b"ftypmif1"),
    ("MP4", 4, b"ftyp"),
    ("JPEG XL", 0, b"\xff\x0a"),
    ("JPEG XL", 4, b"JXL \r\n\x87\n"),
    ("JPEG 2000", 0, b"\xff\x4f\xff\x51"),
    ("JPEG 2000", 4, b"jP  \r\n\x87\n"),
    ("Photoshop", 0, b"8BPS"),
    ("PDF", 0, b"%PDF"),
    ("SVG", 0, b"<svg"),
    ("icon", 0, b"\0\0\1\0"),
    ("OpenEXR", 0, b"\x76\x2f\x31\x01"),
    ("DDS", 0, b"DDS "),
    ("Netpbm", 0, b"P5\n"),
    ("Netpbm", 0, b"P6\n"),
)

_GRAY_MODES = ("1", "L", "LA", "La")
_READABLE_MODES = (*_GRAY_MODES, "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")

# The nearest 8-bit sample of each 16-bit sample: 65535 gives 255, and the error is at most half a level.
_EIGHT_BITS = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)

_ORIENTATION_TAG = 0x0112
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, *, background: tuple[int, int, int] = WHITE, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The first frame of an image file, upright and in sRGB.

    EXIF orientation is applied. Pixels are converted from an embedded ICC profile to sRGB (perceptual intent); a
    profile that is broken or made for another kind of pixel is ignored, as browsers do. CMYK without a profile is
    converted by the plain formula. Transparent pixels are composited over `background` in sRGB. 16-bit gray, and 16-bit
    PNG of any kind, is rounded to the nearest of 256 levels (Pillow cuts 16-bit colour TIFF to its high byte).

    One kind of damage goes unnoticed: bytes lost or changed inside a JPEG or WebP that is otherwise whole. These
    formats have no checksums, and their decoders go on with wrong pixels.

    Args:
        data: The whole file: JPEG, PNG, WebP, GIF, BMP or TIFF. The file's name plays no part.
        background: sRGB colour behind transparent pixels, 0 to 255.
        max_pixels: Largest width x height that is decoded. The header is checked before memory is taken for pixels.

    Returns:
        uint8 array of shape (height, width, 3), contiguous and writable, in sRGB.

    Raises:
        Rejected: The file cannot be used.
    """
    image = _open(data, max_pixels)
    _check_whole(data, image)
    with _refusing(data, image.format or ""):
        colour, alpha = _load(image, data)
        rgb = _to_srgb(colour, image.info.get("icc_profile"))
        if alpha is not None:
            # Rounds exactly: (colour alpha + background (255 - alpha)) / 255.
            rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)
        upright = _TO_UPRIGHT.get(_orientation(image, data))
        return np.array(rgb if upright is None else rgb.transpose(upright))


def probe(data: bytes, *, max_pixels: int | None = None) -> ImageInfo:
    """Reads the header and decodes no pixels, so a damaged body goes unnoticed.

    Args:
        data: The whole file.
        max_pixels: Largest width x height that is accepted; None accepts any.

    Raises:
        Rejected: The header cannot be read or is refused.
    """
    image = _open(data, max_pixels)
    with _refusing(data, image.format or ""):
        width, height = image.size
        if _orientation(image, data) >= 5:
            width, height = height, width
        return ImageInfo(image.format or "", image.mode, width, height, getattr(image, "n_frames", 1))


def encode_png(rgb: np.ndarray) -> bytes:
    """A PNG file of `rgb`, shape (height, width, 3), uint8: lossless, compressed fast rather than small."""
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or 0 in rgb.shape:
        raise ValueError(f"encode_png takes (height, width, 3) uint8, not {rgb.shape} {rgb.dtype}")
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG", compress_level=1)
    return file.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """The pixels that `encode_png` was given: shape (height, width, 3), uint8, contiguous and writable.

    Raises:
        DamagedDataError: `data` is not a sound PNG of 8-bit RGB.
    """
    try:
        image = _open(data, max_pixels=None)
        _check_whole(data, image)
        with _refusing(data, image.format or ""):
            image.load()
    except Rejected as error:
        raise DamagedDataError(f"a stored view cannot be read ({error}); make its file again") from error
    if (image.format, image.mode) != ("PNG", "RGB"):
        raise DamagedDataError(f"a stored view is {image.format} {image.mode}, expected PNG RGB; make its file again")
    return np.array(image)


@contextmanager
def _refusing(data: bytes, format_name: str) -> Iterator[None]:
    """Turns any exception of Pillow into `Rejected`, `truncated` or `corrupt`."""
    try:
        yield
    except (Rejected, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise Rejected(Reason.TOO_MANY_PIXELS, str(error)) from error
    # Pillow documents no set of exceptions: depending on the bytes, its readers raise SyntaxError, struct.error,
    # zlib.error, KeyError, OSError, AssertionError and more, and one odd file must not stop a job.
    except Exception as error:
        reason = Reason.TRUNCATED if _ends_early(data, format_name) else Reason.CORRUPT
        raise Rejected(reason, f"{format_name}: {type(error).__name__}: {error}") from error


def _open(data: bytes, max_pixels: int | None) -> ImageFile.ImageFile:
    """Reads the header with the reader of the format that the first bytes name, and checks the size in the header."""
    if not data:
        raise Rejected(Reason.EMPTY, "the file has 0 bytes")
    format_name = next((name for name, at, mark in _SIGNATURES if data[at : at + len(mark)] == mark), None)
    if format_name is None:
        raise Rejected(Reason.NOT_AN_IMAGE, f"no image signature; the file starts with {data[:12]!r}")
    reader = _READERS.get(format_name)
    if reader is None:
        raise Rejected(Reason.UNSUPPORTED, f"{format_name} files are not read; convert to one of {', '.join(_READERS)}")
    with _refusing(data, format_name):
        image = reader(io.BytesIO(data))
    width, height = image.size
    if width < 1 or height < 1:
        raise Rejected(Reason.CORRUPT, f"{format_name}: the header says {width} x {height} pixels")
    if max_pixels is not None and width * height > max_pixels:
        raise Rejected(Reason.TOO_MANY_PIXELS, f"{width} x {height} pixels; at most {max_pixels} are allowed")
    return image


def _load(image: ImageFile.ImageFile, data: bytes) -> tuple[Image.Image, Image.Image | None]:
    """Decodes to colour (mode L, RGB or CMYK, 8 bits) and alpha (mode L; None if nothing is transparent)."""
    raw_mode = str(image.tile[0].args) if image.format == "PNG" and image.tile else ""
    if raw_mode.endswith(";16B") or image.mode.startswith("I;16"):
        return _from_deep(_load_deep(image, data, raw_mode), image.info.get("transparency"))
    if image.mode not in _READABLE_MODES:
        raise Rejected(Reason.UNSUPPORTED, f"{image.format} with pixels of mode {image.mode}; convert to 8-bit RGB")
    image.load()
    _check_rows_present(image, data)
    alpha = None
    colour: Image.Image = image
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        alpha = colour.getchannel("A")
    if image.mode in _GRAY_MODES:
        return colour.getchannel("R") if alpha else colour.convert("L"), alpha
    return colour if colour.mode in ("RGB", "CMYK") else colour.convert("RGB"), alpha


def _load_deep(image: ImageFile.ImageFile, data: bytes, raw_mode: str) -> np.ndarray:
    """16-bit samples, shape (height, width, channels), uint16, channels in the file's order."""
    if raw_mode == "LA;16B":
        # Pillow would keep the high bytes only. RGBA also has four bytes per pixel, and reading as RGBA keeps them all.
        image.tile = [tile._replace(args="RGBA") for tile in image.tile]
        image.load()
        raw = np.asarray(image).astype(np.uint16)
        return raw[..., 0::2] << 8 | raw[..., 1::2]
    if raw_mode in ("RGB;16B", "RGBA;16B"):
        # Pillow keeps one byte per sample: the high one in the file's byte order, the low one in the opposite order.
        low = PngImageFile(io.BytesIO(data))
        low.tile = [tile._replace(args=raw_mode.replace("16B", "16L")) for tile in low.tile]
        low.load()
        image.load()
        return np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
    image.load()
    return np.asarray(image).astype(np.uint16)[..., None]


def _from_deep(deep: np.ndarray, transparent: object) -> tuple[Image.Image, Image.Image | None]:
    """Colour and alpha as in `_load`, from 16-bit samples and PNG's transparent colour, also in 16 bits."""
    channels = deep.shape[2]
    eight = _EIGHT_BITS[deep]
    colour = Image.fromarray(eight[..., 0] if channels < 3 else np.ascontiguousarray(eight[..., :3]))
    if channels in (2, 4):
        return colour, Image.fromarray(np.ascontiguousarray(eight[..., -1]))
    if transparent is None:
        return colour, None
    opaque = (deep != np.atleast_1d(np.asarray(transparent, dtype=np.uint16))).any(axis=2)
    return colour, Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8))


def _to_srgb(colour: Image.Image, profile_bytes: bytes | None) -> Image.Image:
    """Converts `colour` (mode L, RGB or CMYK) to RGB in sRGB."""
    if profile_bytes:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(profile_bytes))
            core_profile: Any = profile.profile  # Pillow annotates it with the wrong type
            space = core_profile.xcolor_space.strip()
            name = ImageCms.getProfileDescription(profile).strip()
            if space == "RGB" and colour.mode == "L":  # a program that works in RGB saved a gray picture
                colour = colour.convert("RGB")
            fits = space == {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}[colour.mode]
            # Converting sRGB to sRGB costs time and changes some values by one.
            if fits and name != "sRGB" and not name.startswith("sRGB IEC61966-2"):
                converted = ImageCms.profileToProfile(colour, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
                if converted is not None:
                    return converted
            elif not fits:
                logger.debug("ignored an ICC profile for %s in an image of mode %s", space, colour.mode)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError) as error:
            logger.debug("ignored a broken ICC profile: %s", error)
    return colour.convert("RGB")


def _orientation(image: ImageFile.ImageFile, data: bytes) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) if the EXIF block is absent or broken."""
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF images itself
    # EXIF blocks are broken in many ways: see `_refusing`. The pixels are good without the block.
    with suppress(SyntaxError, ValueError, struct.error, LookupError, TypeError, OSError, EOFError, AttributeError):
        if image.format == "PNG":
            # The block may follow the pixels, and Pillow would decode them to reach it.
            for kind, body in _png_chunks(data):
                if kind == b"eXIf":
                    exif = Image.Exif()
                    exif.load(b"Exif\0\0" + body)
                    return _as_orientation(exif)
        return _as_orientation(Image.Image.getexif(image))
    return 1


def _as_orientation(exif: Image.Exif) -> int:
    value = exif.get(_ORIENTATION_TAG, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_whole(data: bytes, image: ImageFile.ImageFile) -> None:
    """Refuses damage that Pillow passes over: a file that ends early, or a PNG with a wrong checksum."""
    if image.format == "PNG":
        for _ in _png_chunks(data):
            pass
    elif image.format in ("JPEG", "WEBP") and _ends_early(data, image.format):
        raise Rejected(Reason.TRUNCATED, f"{image.format}: the file ends before the picture does")


def _check_rows_present(image: ImageFile.ImageFile, data: bytes) -> None:
    """Refuses a PNG whose pixel stream is well formed but too short. Pillow leaves the missing rows black.

    Only the stream of a picture whose last rows are black is unpacked a second time.
    """
    if image.format != "PNG" or image.crop((0, max(0, image.height - 2), *image.size)).getbbox(alpha_only=False):
        return
    header = next(body for kind, body in _png_chunks(data) if kind == b"IHDR")
    width, height, depth, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", header[:13])
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
    for kind, body in _png_chunks(data):
        while kind == b"IDAT" and body and found < expected:
            found += len(stream.decompress(body, 2**20))  # in bounded pieces: a few bytes may unpack to gigabytes
            body = stream.unconsumed_tail
    if found + len(stream.flush()) < expected:
        raise Rejected(Reason.CORRUPT, f"PNG: the pixel stream holds {found} of {expected} bytes")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, body) of each chunk of a PNG file up to IEND. Bytes after IEND are ignored.

    Raises:
        Rejected: `truncated` if the file ends before IEND; `corrupt` at the first wrong checksum.
    """
    position = 8
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


def _ends_early(data: bytes, format_name: str) -> bool:
    """Whether more bytes should follow according to the file's own structure."""
    if format_name == "PNG":
        try:
            for _ in _png_chunks(data):
                pass
        except Rejected as error:
            return error.reason == Reason.TRUNCATED
        return False
    if format_name == "JPEG":
        return _jpeg_ends_early(data)
    if format_name == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if format_name == "GIF":
        return not data.rstrip(b"\0").endswith(b";")
    if format_name == "BMP":
        return int.from_bytes(data[2:6], "little") > len(data)
    return _tiff_ends_early(data)


def _jpeg_ends_early(data: bytes) -> bool:
    """Whether the end marker is missing. Segments are skipped: a thumbnail in a segment has its own end marker."""
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            position += 1
            continue
        marker = data[position + 1]
        if marker == 0xDA:  # start of scan: the compressed data cannot contain the end marker
            return data.find(b"\xff\xd9", position) < 0
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:
            position += 1 if marker == 0xFF else 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return True


def _tiff_ends_early(data: bytes) -> bool:
    """Whether the first directory, or a strip or tile that the directory names, reaches beyond the end of the file."""
    order = "<" if data[:2] == b"II" else ">"
    if data[2:4] not in (b"*\0", b"\0*"):
        return False  # BigTIFF is rare and needs another parser
    sizes = {1: "B", 3: "H", 4: "I"}
    tags: dict[int, tuple[int, ...]] = {}
    try:
        (start,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(order + "HHI", data, entry)
            if tag in (273, 279, 324, 325) and kind in sizes:  # offsets and lengths of strips and tiles
                layout = f"{order}{min(values, len(data))}{sizes[kind]}"
                inline = struct.calcsize(layout) <= 4
                at = entry + 8 if inline else struct.unpack_from(order + "I", data, entry + 8)[0]
                tags[tag] = struct.unpack_from(layout, data, at)
    except struct.error:  # an offset beyond the end of the file
        return True
    parts = [*zip(tags.get(273, ()), tags.get(279, ()), strict=False)]
    parts += zip(tags.get(324, ()), tags.get(325, ()), strict=False)
    return any(offset + length > len(data) for offset, length in parts)
