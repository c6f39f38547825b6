"""The frame of .air files: header, sections with checksums, and the limits that keep a damaged file harmless.

    header     magic, version, size of the image, patch grid, quantiser, number of stages; checksum
    section    for every stage: number of Gaussians, length, entropy-coded payload; checksum

A file is read front to back, and a prefix that ends with a section is a coarser image. Checksums are chained: each
starts from the one before, so that sections cannot change places. Nothing is allocated on the word of a file alone: a
payload must have a byte for every 64 Gaussians of its section, and the first one for every 256 patches; writers put
zeros into its middle. docs/format.md is the specification.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from air.codec.sensitivity import SensitivityQuantizer
from air.codec.uniform import CHANNELS, UniformQuantizer
from air.errors import CodecError
from air.gaussians import grid_shape

MAGIC = b"\x89AIR"
VERSION = 1

MAX_STAGES = 255
MAX_SIDE = 1 << 24
MAX_PIXELS = 1 << 28
"""Pixels of the largest image that is decoded unless the caller allows more."""

GAUSSIANS_PER_BYTE = 64
PATCHES_PER_BYTE = 256
_MAX_REACH = 1 << 22

_START = struct.Struct("<4sBBBBIIHiI")
_SENSITIVITY = struct.Struct("<IHHH")
_UNIFORM = struct.Struct("<BiI")
_CHECKSUM = struct.Struct("<I")
_UNIFORM_KIND, _SENSITIVITY_KIND = 0, 1


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        height, width: Size of the image in pixels.
        patch_size: Pixels between anchors.
        num_stages: Sections that follow.
        quantizer: Gives symbols their values.
        reach_low: With a `SensitivityQuantizer`, the least position along each axis, counted from the upper left corner
            of the patch, in 64ths of a pixel; usually 0 or negative.
        reach_span: The range of positions from there, in 64ths of a pixel.
    """

    height: int
    width: int
    patch_size: int
    num_stages: int
    quantizer: UniformQuantizer | SensitivityQuantizer
    reach_low: int = 0
    reach_span: int = 1

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return grid_shape(self.height, self.width, self.patch_size)


@dataclass(frozen=True)
class Section:
    """One stage as it is stored: its number of Gaussians, its payload, and where it ends in the file."""

    num_gaussians: int
    payload: bytes
    end: int


def write_file(header: Header, sections: list[tuple[int, bytes, bytes]]) -> bytes:
    """A file: a header and, per stage, the number of Gaussians, the first bytes of the payload and its last bytes.

    Raises:
        CodecError: A number of the header does not fit the format.
    """
    try:
        parts = [_header_bytes(header)]
    except struct.error as error:
        raise CodecError(f"this image cannot be written as .air: {error} in {header}") from error
    checksum = zlib.crc32(parts[0])
    parts.append(_CHECKSUM.pack(checksum))
    rows, columns = header.grid
    for stage, (count, start, end) in enumerate(sections):
        least = -(-count // GAUSSIANS_PER_BYTE)
        if stage == 0:
            least = max(least, -(-rows * columns // PATCHES_PER_BYTE))
        payload = start.ljust(least - len(end), b"\0") + end
        body = _varint(count) + _varint(len(payload)) + payload
        checksum = zlib.crc32(body, checksum)
        parts += [body, _CHECKSUM.pack(checksum)]
    return b"".join(parts)


def _header_bytes(header: Header) -> bytes:
    kind = _SENSITIVITY_KIND if isinstance(header.quantizer, SensitivityQuantizer) else _UNIFORM_KIND
    start = _START.pack(
        MAGIC,
        VERSION,
        kind,
        header.num_stages,
        0,
        header.height,
        header.width,
        header.patch_size,
        header.reach_low,
        header.reach_span,
    )
    if isinstance(header.quantizer, SensitivityQuantizer):
        own = header.quantizer
        return start + _SENSITIVITY.pack(own.step, own.scale_weight, own.angle_weight, own.position_weight)
    channels = zip(header.quantizer.bits, header.quantizer.low, header.quantizer.step, strict=True)
    return start + b"".join(_UNIFORM.pack(*channel) for channel in channels)


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; the highest bit of a byte says that more follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_header(blob: bytes, *, max_pixels: int = MAX_PIXELS) -> Header:
    """The header of a file, checked.

    Raises:
        CodecError: The bytes are not an .air file; or the file is of another version, cut off or damaged, or its image
            has more than `max_pixels` pixels.
        TypeError: `blob` is not bytes.
    """
    return _parse_header(blob, max_pixels)[0]


def _parse_header(blob: bytes, max_pixels: int) -> tuple[Header, int, int]:
    """(header, where the first section starts, checksum so far)."""
    if not isinstance(blob, (bytes, bytearray, memoryview)):
        raise TypeError(
            f"an .air file is decoded from its bytes, such as Path(...).read_bytes(), not {type(blob).__name__}"
        )
    if blob[:4] != MAGIC:
        raise CodecError(f"not an .air file: it starts with {bytes(blob[:4])!r} instead of {MAGIC!r}")
    if len(blob) < _START.size:
        raise CodecError(f"the header is cut off: {len(blob)} bytes of at least {_START.size}")
    _, version, kind, stages, options, height, width, patch_size, low, span = _START.unpack_from(blob)
    if version != VERSION:
        raise CodecError(f"the file has format version {version}, this reader knows version {VERSION}")
    if kind not in (_UNIFORM_KIND, _SENSITIVITY_KIND):
        raise CodecError(f"the header names an unknown quantiser, {kind}")
    size = _START.size + (_SENSITIVITY.size if kind == _SENSITIVITY_KIND else len(CHANNELS) * _UNIFORM.size)
    if len(blob) < size + _CHECKSUM.size:
        raise CodecError(f"the header is cut off: {len(blob)} bytes of {size + _CHECKSUM.size}")
    checksum = zlib.crc32(blob[:size])
    if _CHECKSUM.unpack_from(blob, size)[0] != checksum:
        raise CodecError("the header is damaged: its checksum does not fit")
    if options:
        raise CodecError(f"the file needs drawing options that this reader does not know ({options})")
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and patch_size >= 1):
        raise CodecError(f"the header has an impossible size: {height} x {width} pixels, patches of {patch_size}")
    if height * width > max_pixels:
        raise CodecError(f"the image has {height} x {width} pixels, above the limit of {max_pixels}: raise max_pixels")
    if not (abs(low) <= _MAX_REACH and 1 <= span <= _MAX_REACH):
        raise CodecError(f"the header has an impossible range of positions: {span} from {low}")
    try:
        if kind == _SENSITIVITY_KIND:
            quantizer = SensitivityQuantizer(*_SENSITIVITY.unpack_from(blob, _START.size))
        else:
            fields = _UNIFORM.iter_unpack(blob[_START.size : size])
            quantizer = UniformQuantizer(*zip(*fields, strict=True))
    except ValueError as error:
        raise CodecError(f"the header has an impossible quantiser: {error}") from error
    return Header(height, width, patch_size, stages, quantizer, low, span), size + _CHECKSUM.size, checksum


def read_sections(
    blob: bytes, stages: int | None = None, *, max_pixels: int = MAX_PIXELS
) -> tuple[Header, list[Section]]:
    """The header, and the first `stages` sections (all if not given), checked but not decoded.

    Raises:
        CodecError: As `read_header`; or a section is cut off, damaged, or claims more Gaussians than it can hold.
        ValueError: `stages` is negative or above the number of stages in the file.
    """
    header, place, checksum = _parse_header(blob, max_pixels)
    wanted = header.num_stages if stages is None else stages
    if not 0 <= wanted <= header.num_stages:
        raise ValueError(f"stages must be from 0 to {header.num_stages}, the number in the file, got {stages}")
    rows, columns = header.grid
    sections: list[Section] = []
    for stage in range(wanted):
        start = place
        count, place = _read_varint(blob, place, stage)
        length, place = _read_varint(blob, place, stage)
        if len(blob) - place < length + _CHECKSUM.size:
            raise _cut_off(stage, wanted)
        end = place + length
        checksum = zlib.crc32(blob[start:end], checksum)
        if _CHECKSUM.unpack_from(blob, end)[0] != checksum:
            raise CodecError(f"stage {stage} is damaged: its checksum does not fit (bytes {start} to {end})")
        most = min(length * GAUSSIANS_PER_BYTE, rows * columns)
        if count > most:
            raise CodecError(f"stage {stage} claims {count} Gaussians, but {length} bytes and the grid allow {most}")
        if stage == 0 and rows * columns > length * PATCHES_PER_BYTE:
            raise CodecError(f"stage 0 has {length} bytes, too few for a grid of {rows} x {columns} patches")
        sections.append(Section(count, bytes(blob[place:end]), end + _CHECKSUM.size))
        place = end + _CHECKSUM.size
    if stages is None and place != len(blob):
        raise CodecError(f"{len(blob) - place} bytes follow the last stage, which ends at byte {place}")
    return header, sections


def _read_varint(blob: bytes, place: int, stage: int) -> tuple[int, int]:
    """(number, place after it)."""
    value = 0
    for shift in range(0, 35, 7):
        if place >= len(blob):
            raise _cut_off(stage, None)
        byte = blob[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise CodecError(f"stage {stage} is damaged: a number of more than 35 bits")


def _cut_off(stage: int, wanted: int | None) -> CodecError:
    of = "" if wanted is None else f" of {wanted}"
    whole = f"for a coarser image ask for its first {stage}" if stage else "no stage of it is whole"
    return CodecError(f"the file is cut off in stage {stage}{of}: {whole}")
