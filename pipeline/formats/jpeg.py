"""JPEG files: whether all of the picture is there, and whether the frame is of a kind that is read.

Pillow fills what is missing with grey and says nothing. This module must not know other formats or decode pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import simplejpeg

_END = b"\xff\xd9"
_SCAN = 0xDA
# Sequential, extended and progressive frames; Huffman or arithmetic coding.
_USUAL_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def ends_early(data: bytes) -> bool:
    """Whether the end marker is missing. Segments are skipped: a thumbnail in a segment has its own end marker."""
    for marker, position in _segments(data):
        if marker == _SCAN:  # the compressed data cannot contain the end marker
            return data.find(_END, position) < 0
    return True


def lacks_data(data: bytes) -> bool:
    """Whether a scan has less data than its pixels need, although an end marker follows.

    Decodes all coefficients, at an eighth of the size, because only a decoder can know where a scan ought to end.
    """
    try:
        stored = simplejpeg.decode_jpeg_header(data)[2]
        wanted = "CMYK" if stored in ("CMYK", "YCCK") else "GRAY"
        simplejpeg.decode_jpeg(data, colorspace=wanted, min_height=1, min_width=1, min_factor=8)
    except ValueError as warning:  # libjpeg's first warning; others are of harmless bytes between segments
        return "premature end" in str(warning).lower()
    return False


def unusual_frame(data: bytes) -> str | None:
    """What is unusual about the frame, so that decoders refuse it, such as 12 bits a sample; None for usual frames."""
    for marker, position in _segments(data):
        if marker in _FRAMES:
            precision, components = data[position + 4 : position + 5], data[position + 9 : position + 10]
            height = data[position + 5 : position + 7]
            if marker not in _USUAL_FRAMES:
                return f"a frame of type {marker - 0xC0}"
            if precision != b"\x08":
                return f"{precision[0] if precision else 0} bits a sample"
            if components not in (b"\1", b"\3", b"\4"):
                return f"{components[0] if components else 0} components"
            return "its height behind the pixels" if height == b"\0\0" else None
        if marker == _SCAN:
            return None
    return None


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(marker, position of its 0xFF) of every segment, up to the first scan."""
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            position += 1
            continue
        marker = data[position + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:
            position += 1 if marker == 0xFF else 2
            continue
        yield marker, position
        if marker == _SCAN:
            return
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
