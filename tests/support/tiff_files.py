"""TIFF files of any layout of samples, written by hand and without compression, for the tests of decoding."""

import struct
from collections.abc import Sequence

import numpy as np


def packed(samples: np.ndarray, bits: int, order: str) -> bytes:
    """Samples, shape (rows, values of a row), integers below 2**bits; each row begins with a new byte."""
    if bits in (8, 16, 32):
        return samples.astype(f"{order}u{bits // 8}").tobytes()
    as_bits = (samples.astype(np.int64)[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(as_bits.reshape(len(samples), -1).astype(np.uint8), axis=1).tobytes()


def tiff(
    samples: np.ndarray,
    bits: int,
    photometric: int,
    *,
    extras: Sequence[int] = (),
    planar: bool = False,
    order: str = "<",
    sample_format: int = 1,
    rows_per_strip: int = 3,
    tile: int | None = None,
    colour_map: np.ndarray | None = None,
    fill_order: int = 1,
    more: dict[int, tuple[int, ...]] | None = None,
) -> bytes:
    """A TIFF of `samples`, shape (height, width, channels), integers below 2**bits.

    Args:
        tile: Side of tiles, a multiple of 16; None writes strips.
        colour_map: Shape (3, 2**bits), 16-bit numbers.
        more: Tags that are written too, or in place of others, as 32-bit numbers.
    """
    height, width, channels = samples.shape
    layers = [samples[..., [channel]] for channel in range(channels)] if planar else [samples]
    parts = []
    for layer in layers:
        if tile is None:
            blocks = [layer[row : row + rows_per_strip] for row in range(0, height, rows_per_strip)]
        else:
            whole = np.pad(layer, ((0, -height % tile), (0, -width % tile), (0, 0)))
            blocks = [
                whole[row : row + tile, column : column + tile]
                for row in range(0, height, tile)
                for column in range(0, width, tile)
            ]
        parts += [packed(block.reshape(len(block), -1), bits, order) for block in blocks]
    if fill_order == 2:
        parts = [
            np.packbits(np.unpackbits(np.frombuffer(part, np.uint8)), bitorder="little").tobytes() for part in parts
        ]
    offsets = np.cumsum([8, *map(len, parts)])[:-1].tolist()
    places = {273: offsets, 278: [rows_per_strip], 279: [len(part) for part in parts]}
    if tile is not None:
        places = {322: [tile], 323: [tile], 324: offsets, 325: [len(part) for part in parts]}
    tags = {
        256: [width],
        257: [height],
        258: [bits] * channels,
        259: [1],
        262: [photometric],
        277: [channels],
        **places,
    }
    tags |= {284: [2 if planar else 1], 339: [sample_format] * channels, 266: [fill_order]}
    if extras:
        tags[338] = list(extras)
    if colour_map is not None:
        tags[320] = colour_map.ravel().tolist()
    tags |= {tag: list(values) for tag, values in (more or {}).items()}
    body = b"".join(parts)
    start = 8 + len(body)
    values_at = start + 2 + 12 * len(tags) + 4
    directory, values = struct.pack(order + "H", len(tags)), b""
    for tag, numbers in sorted(tags.items()):
        letter, kind = ("H", 3) if tag in (258, 320, 338, 339) else ("I", 4)
        data = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        if len(data) > 4:
            values, data = values + data, struct.pack(order + "I", values_at + len(values))
        directory += struct.pack(order + "HHI", tag, kind, len(numbers)) + data.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "I", start) + body + directory + b"\0" * 4 + values
