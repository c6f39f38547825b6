"""TIFF files: which layouts of samples are read, and their pixels.

TIFF allows thousands of combinations of bits, sample formats, planes, colours and compressions, and Pillow reads some
of them with wrong pixels and no error. So this module reads the layouts of its tables and refuses all others. A test
holds every layout of the tables against tifffile.

This module must not know other formats, colour profiles, or what the pixels are for.
"""

from __future__ import annotations

import io
import struct
import sys
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from pipeline.errors import Reason, Rejected
from pipeline.formats.samples import Pixels, gray_or_rgb, to_eight_bits

# Numbers of tags.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _ORIENTATION = 256, 257, 258, 259, 262, 266, 274
_SAMPLES, _ROWS_PER_STRIP, _PLANAR, _PREDICTOR, _COLOUR_MAP, _INK_SET = 277, 278, 284, 317, 320, 332
_TILE_WIDTH, _TILE_HEIGHT, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _ICC_PROFILE = 322, 323, 338, 339, 34675
_STRIPS, _TILES = (273, 279), (324, 325)  # tags of the offsets and the lengths

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_COLOURS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}
_PHOTOMETRIC_NAMES = {
    _WHITE_IS_ZERO: "white is zero",
    _BLACK_IS_ZERO: "black is zero",
    _RGB: "RGB",
    _PALETTE: "palette",
    4: "mask",
    _CMYK: "CMYK",
    _YCBCR: "YCbCr",
    8: "CIELAB",
    32803: "camera raw",
    34892: "linear raw",
}

# What a sample beyond the colours is.
_UNKNOWN, _PREMULTIPLIED, _ALPHA, _COREL_ALPHA = 0, 1, 2, 999

_RAW, _JPEG = 1, 7
_FAX = frozenset({2, 3, 4})
_PREDICTABLE = frozenset({5, 8, 32946, 34925, 50000})  # LZW, deflate by two numbers, LZMA, Zstandard
_LOSSLESS = _PREDICTABLE | {_RAW, 32773}  # PackBits

_RGB_EXTRAS = {
    first + rest for first, rest in product(((_UNKNOWN,), (_PREMULTIPLIED,), (_ALPHA,)), ((), (0,), (0, 0)))
} | {(), (_COREL_ALPHA,)}

# (photometric, bits per sample): the extra samples that may follow, where all samples of a pixel lie together.
_TOGETHER: dict[tuple[int, int], set[tuple[int, ...]]] = {
    **{(photometric, bits): {()} for photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO) for bits in (1, 2, 4, 8, 16)},
    (_BLACK_IS_ZERO, 8): {(), (_UNKNOWN,), (_PREMULTIPLIED,), (_ALPHA,)},
    (_BLACK_IS_ZERO, 12): {()},
    (_RGB, 8): _RGB_EXTRAS,
    (_RGB, 16): {(), (_UNKNOWN,), (_PREMULTIPLIED,), (_ALPHA,)},
    **{(_PALETTE, bits): {()} for bits in (1, 2, 4)},
    (_PALETTE, 8): {(), (_UNKNOWN,), (_ALPHA,)},
    (_CMYK, 8): {(), (_UNKNOWN,), (_UNKNOWN, _UNKNOWN)},
    (_CMYK, 16): {()},
    (_YCBCR, 8): {()},
}

# The same where each sample has a plane of its own. Planes are read one by one, so any samples may follow.
_IN_PLANES = frozenset(product((_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _CMYK), (8, 16)))


# Where each byte may have its lowest bit first.
_REVERSIBLE = frozenset(product((_WHITE_IS_ZERO, _BLACK_IS_ZERO), (1, 2, 4))) | {(_BLACK_IS_ZERO, 8), (_PALETTE, 8)}


class Layout(NamedTuple):
    """How the first image of a file stores its samples. Numbers are those of the TIFF specification."""

    photometric: int
    bits: tuple[int, ...]
    formats: tuple[int, ...]
    extras: tuple[int, ...]
    planar: bool
    compression: int
    predictor: int
    fill_order: int

    def __str__(self) -> str:
        kinds = {1: "unsigned", 2: "signed", 3: "float", 4: "undefined", 5: "complex integer", 6: "complex"}
        bits = "+".join(map(str, self.bits)) if len(set(self.bits)) > 1 else f"{len(self.bits)} x {self.bits[0]}"
        kind = "/".join(kinds.get(number, f"format {number}") for number in sorted(set(self.formats)))
        colours = _PHOTOMETRIC_NAMES.get(self.photometric, f"photometric {self.photometric}")
        odd = [
            f"extra samples {self.extras}" if self.extras else "",
            "in planes" if self.planar else "",
            f"predictor {self.predictor}" if self.predictor != 1 else "",
            "bits reversed" if self.fill_order != 1 else "",
        ]
        return ", ".join([f"{bits} bits {kind}", colours, f"compression {self.compression}", *filter(None, odd)])

    @property
    def is_read(self) -> bool:
        """Whether the tables have this layout."""
        if len(set(self.bits)) != 1 or set(self.formats) != {1}:
            return False
        kind = (self.photometric, self.bits[0])
        if len(self.bits) != _COLOURS.get(self.photometric, 0) + len(self.extras):
            return False
        if self.extras[:1] == (_PREMULTIPLIED,) and self.photometric not in (_BLACK_IS_ZERO, _RGB):
            return False  # the specification does not say what is multiplied
        if not (kind in _IN_PLANES if self.planar else self.extras in _TOGETHER.get(kind, ())):
            return False
        if self.predictor != 1 and not (
            self.predictor == 2 and self.compression in _PREDICTABLE and self.bits[0] in (8, 16)
        ):
            return False
        if self.fill_order != 1 and not (kind in _REVERSIBLE and self.compression in _FAX | {_RAW}):
            return False
        return self._compression_is_read(kind)

    def _compression_is_read(self, kind: tuple[int, int]) -> bool:
        if self.compression == _JPEG:
            return not self.planar and not self.extras and kind in ((_BLACK_IS_ZERO, 8), (_RGB, 8), (_YCBCR, 8))
        if self.photometric == _YCBCR:
            return False  # Pillow passes over subsampling, coefficients and reference values
        if self.compression in _FAX:
            return kind[1] == 1
        if kind[1] == 12:
            return self.compression == _RAW
        return self.compression in _LOSSLESS


def check_layout(data: bytes) -> None:
    """Refuses a file whose layout of samples is not read.

    Raises:
        Rejected: `unsupported`, and the message has the layout.
        Exception: Whatever Pillow raises for damaged tags.
    """
    if data[:4] == b"MM\0+":
        raise Rejected(Reason.UNSUPPORTED, "BigTIFF with the high byte first; write it with the low byte first")
    tags = _tags(data)
    layout = _layout(tags)
    if not layout.is_read:
        raise Rejected(Reason.UNSUPPORTED, f"TIFF with samples of {layout}; convert to 8-bit RGB")
    if _numbers(tags, _INK_SET, 1)[0] != 1:
        raise Rejected(Reason.UNSUPPORTED, "TIFF with inks other than cyan, magenta, yellow and black; convert to RGB")
    offsets, lengths = _parts(tags)
    if 0 in offsets or 0 in lengths:
        raise Rejected(Reason.UNSUPPORTED, "TIFF with strips or tiles that are left out; write it without sparse tiles")
    expected = _expected_parts(tags) * (len(layout.bits) if layout.planar else 1)
    if len(offsets) < expected:
        raise Rejected(Reason.CORRUPT, f"TIFF: {len(offsets)} of {expected} strips or tiles")


def for_pillow(data: bytes) -> bytes:
    """The file as Pillow can read it: where samples have planes of their own, it gets the first plane as a gray image.

    Raises:
        Exception: Whatever Pillow raises for damaged tags.
    """
    tags = _tags(data)
    layout = _layout(tags)
    # Pillow takes the planes of an image with one sample wrongly, too, and does not invert 16 bits.
    if _numbers(tags, _PLANAR, 1)[0] == 2 or (layout.photometric, layout.bits) == (_WHITE_IS_ZERO, (16,)):
        return _one_plane(data, tags, 0)
    return data


def load(image: TiffImageFile, data: bytes) -> Pixels:
    """The pixels of a file that `check_layout` accepts; `image` reads `for_pillow(data)`. Applies the orientation tag.

    Raises:
        Exception: Whatever Pillow raises for damaged data.
    """
    tags = _tags(data)
    layout = _layout(tags)
    count = len(layout.bits)
    if layout.planar:
        others = (TiffImageFile(io.BytesIO(_one_plane(data, tags, index))) for index in range(1, count))
        return _interpret(np.stack([_stored(plane) for plane in (image, *others)], axis=2), layout)
    if layout.bits[0] == 16:
        return _interpret(_stored(image)[..., None] if count == 1 else _two_bytes(image, data), layout)
    image.load()
    if layout.bits[0] == 12:
        twelve = np.asarray(image).astype(np.uint32)
        return Pixels(((twelve * 255 + 2047) // 4095).astype(np.uint8), None)
    if image.mode in ("P", "PA"):
        return _from_palette(image, _numbers(tags, _COLOUR_MAP))
    return gray_or_rgb(image)


def profile_of(data: bytes) -> bytes | None:
    """The ICC profile; None if there is none.

    It is that of the file: `for_pillow` may have given Pillow a directory without it.
    """
    profile: Any = _tags(data).get(_ICC_PROFILE)
    return profile if isinstance(profile, bytes) else None


def ends_early(data: bytes) -> bool:
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
            if tag in (*_STRIPS, *_TILES) and kind in sizes:
                layout = f"{order}{min(values, len(data))}{sizes[kind]}"
                inline = struct.calcsize(layout) <= 4
                at = entry + 8 if inline else struct.unpack_from(order + "I", data, entry + 8)[0]
                tags[tag] = struct.unpack_from(layout, data, at)
    except struct.error:  # an offset beyond the end of the file
        return True
    parts = [
        part
        for offsets, lengths in (_STRIPS, _TILES)
        for part in zip(tags.get(offsets, ()), tags.get(lengths, ()), strict=False)
    ]
    return any(offset + length > len(data) for offset, length in parts)


def _tags(data: bytes) -> ImageFileDirectory_v2:
    """The tags of the first image."""
    file = io.BytesIO(data)
    tags = ImageFileDirectory_v2(file.read(16 if data[2:4] == b"+\0" else 8))
    file.seek(tags.next)
    tags.load(file)
    return tags


def _numbers(tags: ImageFileDirectory_v2, tag: int, *default: int) -> tuple[int, ...]:
    """The value of a tag, one number or more; `default` if it is absent."""
    value: Any = tags.get(tag, default)
    return tuple(int(number) for number in (value if isinstance(value, tuple) else (value,)))


def _layout(tags: ImageFileDirectory_v2) -> Layout:
    """The layout, with the defaults of the specification for tags that are absent, and Pillow's for those that lie."""
    photometric = _numbers(tags, _PHOTOMETRIC, _WHITE_IS_ZERO)[0]
    samples = _numbers(tags, _SAMPLES, 1)[0]
    bits = _numbers(tags, _BITS, 1)
    bits = bits * min(samples, 8) if len(bits) == 1 else bits[:samples]
    extras = _numbers(tags, _EXTRA_SAMPLES)
    if photometric == _RGB and samples == 4 and not extras:
        extras = (_ALPHA,)  # the writer left the tag out
    return Layout(
        photometric=photometric,
        bits=bits,
        formats=_numbers(tags, _SAMPLE_FORMAT, 1),
        extras=extras,
        planar=_numbers(tags, _PLANAR, 1)[0] == 2 and samples > 1,
        compression=_numbers(tags, _COMPRESSION, _RAW)[0],
        predictor=_numbers(tags, _PREDICTOR, 1)[0],
        fill_order=_numbers(tags, _FILL_ORDER, 1)[0],
    )


def _parts(tags: ImageFileDirectory_v2) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and lengths of the strips or tiles."""
    offsets, lengths = _TILES if _TILES[0] in tags else _STRIPS
    return _numbers(tags, offsets), _numbers(tags, lengths)


def _expected_parts(tags: ImageFileDirectory_v2) -> int:
    """The number of strips or tiles that cover the image, or a plane of it."""
    width, height = _numbers(tags, _WIDTH)[0], _numbers(tags, _HEIGHT)[0]
    if _TILES[0] in tags:
        across, down = _numbers(tags, _TILE_WIDTH)[0], _numbers(tags, _TILE_HEIGHT)[0]
        return -(width // -max(across, 1)) * -(height // -max(down, 1))
    return -(height // -max(_numbers(tags, _ROWS_PER_STRIP, height)[0], 1))


def _one_plane(data: bytes, tags: ImageFileDirectory_v2, index: int) -> bytes:
    """The file with a directory that has one plane alone: gray, or the palette's indices."""
    kept = (_WIDTH, _HEIGHT, _COMPRESSION, _FILL_ORDER, _ORIENTATION, _ROWS_PER_STRIP, _PREDICTOR, _COLOUR_MAP)
    plane = {tag: _numbers(tags, tag) for tag in (*kept, _TILE_WIDTH, _TILE_HEIGHT) if tag in tags}
    bits = _numbers(tags, _BITS, 1)[0]
    single = _numbers(tags, _SAMPLES, 1)[0] == 1 and bits != 16
    photometric = _numbers(tags, _PHOTOMETRIC, _WHITE_IS_ZERO) if single else (_BLACK_IS_ZERO,)
    plane |= {_BITS: (bits,), _PHOTOMETRIC: photometric, _SAMPLES: (1,)}
    count = _expected_parts(tags)
    for tag, values in zip(_TILES if _TILES[0] in tags else _STRIPS, _parts(tags), strict=True):
        if values:
            plane[tag] = values[index * count : (index + 1) * count]
    return _with_directory(data, plane, tags.next)


def _stored(image: TiffImageFile) -> np.ndarray:
    """The stored samples of a gray image, shape (H, W), uint8 or uint16."""
    image.load()
    return np.asarray(image).astype(np.uint16 if image.mode.startswith("I;16") else np.uint8)


def _with_directory(data: bytes, tags: dict[int, tuple[int, ...]], following: int) -> bytes:
    """The file with another first directory, which lies at its end; `following` is where the second one lies."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] == b"+\0"
    # BigTIFF has 64-bit numbers where TIFF has 32-bit ones. (number of the type, its letter and size, entries' count)
    kind, letter, size, count = (16, "Q", 8, "Q") if big else (4, "I", 4, "H")
    start = len(data) + -len(data) % 8
    entries = struct.pack(order + count, len(tags))
    values_at = start + struct.calcsize(order + count) + len(tags) * (4 + 2 * size) + size
    values = b""
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        if len(numbers) > 1:
            values, packed = values + packed, struct.pack(order + letter, values_at + len(values))
        entries += struct.pack(order + "HH" + letter, tag, kind, len(numbers)) + packed
    header = data[:size] + struct.pack(order + letter, start)
    return b"".join(
        [
            header,
            data[len(header) :],
            b"\0" * (start - len(data)),
            entries,
            struct.pack(order + letter, following),
            values,
        ]
    )


def _two_bytes(image: TiffImageFile, data: bytes) -> np.ndarray:
    """16-bit samples that lie together, shape (H, W, C), uint16. Pillow keeps one byte of each, so it reads twice."""
    halves = []
    for part, reader in (("high", image), ("low", TiffImageFile(io.BytesIO(data)))):
        tiles = []
        for tile in reader.tile:
            raw_mode, *rest = tile.args  # type: ignore[misc]
            # Pillow would divide by alpha in 8 bits, so it is told that the alpha is plain.
            name, _, order = raw_mode.replace("RGBa", "RGBA").partition(";16")
            if order == "N":
                order = "L" if sys.byteorder == "little" else "B"
            if part == "low":
                order = "B" if order == "L" else "L"  # in the other order, the high byte is the low one
            tiles.append(tile._replace(args=(f"{name};16{order}", *rest)))
        reader.tile = tiles
        reader.load()
        halves.append(np.asarray(reader))
    return halves[0].astype(np.uint16) << 8 | halves[1]


def _interpret(samples: np.ndarray, layout: Layout) -> Pixels:
    """Colours and alpha from stored samples, shape (H, W, C), uint8 or uint16, C as in the file or without extras."""
    largest = int(np.iinfo(samples.dtype).max)
    count = _COLOURS[layout.photometric]
    colour = samples[..., :count]
    if layout.photometric == _WHITE_IS_ZERO:
        colour = largest - colour
    alpha = None
    if layout.extras[:1] in ((_PREMULTIPLIED,), (_ALPHA,), (_COREL_ALPHA,)):
        alpha = samples[..., count]
        if layout.extras[0] == _PREMULTIPLIED:
            whole = np.maximum(alpha, 1)[..., None].astype(np.uint64)
            quotient = (colour.astype(np.uint64) * largest + whole // 2) // whole
            colour = np.minimum(quotient, largest).astype(samples.dtype)
    alpha = None if alpha is None else Image.fromarray(np.ascontiguousarray(to_eight_bits(alpha)))
    if count == 1:
        colour = colour[..., 0]
    if count == 4:
        return Pixels(Image.fromarray(np.ascontiguousarray(to_eight_bits(colour)), "CMYK"), alpha)
    return Pixels(np.ascontiguousarray(colour), alpha)


def _from_palette(image: Image.Image, colour_map: tuple[int, ...]) -> Pixels:
    """Colours of a loaded image of mode P or PA. Some programs write 8-bit numbers into the map, which has 16 bits."""
    table = np.array(colour_map, dtype=np.uint16).reshape(3, -1).T
    table = table.astype(np.uint8) if table.max(initial=0) < 256 else to_eight_bits(table)
    full = np.zeros((256, 3), np.uint8)
    full[: len(table)] = table
    indices = np.asarray(image)
    if image.mode == "P":
        return Pixels(Image.fromarray(full[indices]), None)
    return Pixels(Image.fromarray(full[indices[..., 0]]), Image.fromarray(np.ascontiguousarray(indices[..., 1])))
