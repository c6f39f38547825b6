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
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.errors import DamagedDataError, Reason, Rejected
from pipeline.formats import jpeg, png, tiff
from pipeline.formats.colour import Encoding, to_srgb
from pipeline.formats.samples import Pixels, gray_or_rgb

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
"""File name endings, in lower case, of images in a folder that is scanned. Decoding looks at the content alone."""

MAX_PIXELS = 2**27
"""The largest image that is decoded by default: 134 million pixels, 0.4 GB as RGB."""

MAX_SIDES = {"WEBP": 16383, "JPEG": 65500}
"""The largest height and width, in pixels, that a format's files can have; libjpeg stops a little below 65,535."""

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

_READABLE_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")

# How Pillow says that it does not read a kind of file, in whatever exception.
_UNSUPPORTED = re.compile(
    r"cannot handle|unsupported|not supported|not yet supported|unknown pixel mode|unknown data organization|"
    r"unrecognized image mode|decoder \S+ not available|unknown raw mode|bad image mode|conversion from .* not",
    re.IGNORECASE,
)

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

    EXIF orientation is applied. Pixels are converted from an embedded ICC profile to sRGB (perceptual intent), and PNG
    from the curve and primaries that its chunks state; docs/tables.md has a table of all tags of colour. A profile that
    is broken or made for another kind of pixel is ignored, as browsers do. CMYK without a profile is converted by the
    plain formula. Transparent pixels are composited over `background` in sRGB. 16-bit samples are rounded to the
    nearest of 256 levels. Texts and other metadata of any size are passed over.

    One kind of damage goes unnoticed: bytes lost or changed inside a JPEG or WebP whose data has the right length.
    These formats have no checksums, and their decoders go on with wrong pixels.

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
        space = _colour_space(image, data)
        colour, alpha = _load(image, data)
        rgb = to_srgb(colour, space)
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


def check_sides(format_name: str, height: int, width: int) -> None:
    """Checks that a format can hold a picture of this size, in pixels.

    Raises:
        Rejected: `unsupported`: the picture is too wide or too high for the format.
    """
    limit = MAX_SIDES.get(format_name.upper())
    if limit is not None and max(height, width) > limit:
        raise Rejected(
            Reason.UNSUPPORTED,
            f"the picture would have {width} x {height} pixels, and {format_name.upper()} holds at most {limit} "
            "a side; choose PNG or a smaller scale",
        )


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
    """Turns any exception of Pillow into `Rejected`: `truncated`, `unsupported` or `corrupt`."""
    try:
        yield
    except (Rejected, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise Rejected(Reason.TOO_MANY_PIXELS, str(error)) from error
    # Pillow documents no set of exceptions: depending on the bytes, its readers raise SyntaxError, struct.error,
    # zlib.error, KeyError, OSError, AssertionError and more, and one odd file must not stop a job.
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        if _ENDS_EARLY[format_name](data):
            raise Rejected(Reason.TRUNCATED, f"{format_name}: {what}") from error
        if format_name == "JPEG" and (frame := jpeg.unusual_frame(data)):
            raise Rejected(Reason.UNSUPPORTED, f"JPEG with {frame}; convert to 8-bit RGB") from error
        reason = Reason.UNSUPPORTED if _UNSUPPORTED.search(str(error)) else Reason.CORRUPT
        raise Rejected(reason, f"{format_name}: {what}") from error


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
        content = data
        if format_name == "PNG":
            png.refuse_foreign(data)
            content = png.without_texts(data)
        elif format_name == "TIFF":
            tiff.check_layout(data)
            content = tiff.for_pillow(data)
        image = reader(io.BytesIO(content))
    width, height = image.size
    if format_name == "JPEG" and height < 1 and not jpeg.ends_early(data) and (frame := jpeg.unusual_frame(data)):
        raise Rejected(Reason.UNSUPPORTED, f"JPEG with {frame}; convert to 8-bit RGB")
    if width < 1 or height < 1:
        raise Rejected(Reason.CORRUPT, f"{format_name}: the header says {width} x {height} pixels")
    if max_pixels is not None and width * height > max_pixels:
        raise Rejected(Reason.TOO_MANY_PIXELS, f"{width} x {height} pixels; at most {max_pixels} are allowed")
    return image


def _load(image: ImageFile.ImageFile, data: bytes) -> Pixels:
    """Decodes the pixels, in the file's colour space."""
    if isinstance(image, PngImageFile):
        return png.load(image, data)
    if isinstance(image, TiffImageFile):
        return tiff.load(image, data)
    if image.mode not in _READABLE_MODES:
        raise Rejected(Reason.UNSUPPORTED, f"{image.format} with pixels of mode {image.mode}; convert to 8-bit RGB")
    image.load()
    return gray_or_rgb(image)


def _colour_space(image: ImageFile.ImageFile, data: bytes) -> bytes | Encoding | None:
    """The ICC profile or the encoding of the colours; None for sRGB."""
    if image.format == "PNG":
        return png.colour_space_of(data)
    if image.format == "TIFF":
        return tiff.profile_of(data)
    return image.info.get("icc_profile")


def _orientation(image: ImageFile.ImageFile, data: bytes) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) if the EXIF block is absent or broken."""
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF images itself
    # EXIF blocks are broken in many ways: see `_refusing`. The pixels are good without the block.
    with suppress(
        *(SyntaxError, ValueError, struct.error, LookupError, TypeError, OSError, EOFError, AttributeError, Rejected)
    ):
        if image.format == "PNG":
            # The block may follow the pixels, and Pillow would decode them to reach it.
            block = png.exif_of(data)
            exif = Image.Exif()
            if block is not None:
                exif.load(b"Exif\0\0" + block)
            return _as_orientation(exif)
        return _as_orientation(Image.Image.getexif(image))
    return 1


def _as_orientation(exif: Image.Exif) -> int:
    value = exif.get(_ORIENTATION_TAG, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_whole(data: bytes, image: ImageFile.ImageFile) -> None:
    """Refuses damage that Pillow passes over: a file that ends early, or a PNG with a wrong checksum."""
    if image.format == "PNG":
        png.check_whole(data)
    elif image.format in ("JPEG", "WEBP") and _ENDS_EARLY[image.format](data):
        raise Rejected(Reason.TRUNCATED, f"{image.format}: the file ends before the picture does")
    elif image.format == "JPEG" and jpeg.lacks_data(data):
        raise Rejected(Reason.TRUNCATED, "JPEG: the data ends before the picture does, although an end marker follows")


# Whether more bytes should follow according to the file's own structure.
_ENDS_EARLY: dict[str, Callable[[bytes], bool]] = {
    "JPEG": jpeg.ends_early,
    "PNG": png.ends_early,
    "WEBP": lambda data: int.from_bytes(data[4:8], "little") + 8 > len(data),
    "GIF": lambda data: not data.rstrip(b"\0").endswith(b";"),
    "BMP": lambda data: int.from_bytes(data[2:6], "little") > len(data),
    "TIFF": tiff.ends_early,
}
