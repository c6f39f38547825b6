"""Colours to sRGB, from ICC profiles, and from the curve and primaries that a file states.

This module must not know any format. docs/tables.md says which tag of which format leads here.

The curves are those of ITU-T H.273, table 3, the primaries those of its table 2.
"""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms

from pipeline.errors import Reason, Rejected
from pipeline.formats.samples import to_eight_bits

logger = logging.getLogger(__name__)

Curve = Callable[[np.ndarray], np.ndarray]
"""From stored values to light, both from 0 to 1."""

Primaries = tuple[float, ...]
"""x and y of white, red, green and blue, the order of PNG's cHRM."""

_D65 = (0.3127, 0.3290)
_SRGB: Primaries = (*_D65, 0.640, 0.330, 0.300, 0.600, 0.150, 0.060)
_PRIMARIES: dict[int, Primaries] = {
    1: _SRGB,
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*_D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*_D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    22: (*_D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}
_HDR = {16: "PQ", 18: "HLG"}

_SRGB_GAMMA = 1 / 2.2
# libpng's threshold: an exponent this near to sRGB's means sRGB.
_GAMMA_TOLERANCE = 0.05
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_ROWS = 256  # converted at a time, so that floating point numbers of a large picture need little memory


class Encoding(NamedTuple):
    """How stored values mean colours.

    Attributes:
        to_light: The curve.
        primaries: The primaries; None for sRGB's.
    """

    to_light: Curve
    primaries: Primaries | None


def encoding_of_code_points(primaries: int, transfer: int, matrix: int, full_range: int) -> Encoding | None:
    """The encoding that four code points of ITU-T H.273 name; None for sRGB.

    Raises:
        Rejected: `unsupported`: HDR (PQ and HLG), values that are no full-range RGB, or unknown code points.
    """
    if transfer in _HDR:
        raise Rejected(Reason.UNSUPPORTED, f"HDR: {_HDR[transfer]} (cICP transfer {transfer}); convert it to sRGB")
    if matrix != 0 or full_range != 1:
        raise Rejected(Reason.UNSUPPORTED, f"cICP matrix {matrix}, range {full_range}; only full-range RGB is read")
    if primaries not in _PRIMARIES or transfer not in _CURVES:
        raise Rejected(Reason.UNSUPPORTED, f"cICP primaries {primaries}, transfer {transfer} are not known; use sRGB")
    chosen = None if primaries == 1 else _PRIMARIES[primaries]
    return None if chosen is None and transfer == 13 else Encoding(_CURVES[transfer], chosen)


def encoding_of_chunks(gamma: tuple[float, ...] | None, chromaticities: tuple[float, ...] | None) -> Encoding | None:
    """The encoding that the chunks gAMA and cHRM of a PNG name; None for sRGB.

    Args:
        gamma: The exponent from light to stored values, as in gAMA; None if absent.
        chromaticities: As in cHRM: x and y of white, red, green and blue; None if absent.
    """
    curve = _srgb_to_light
    if gamma is not None and gamma[0] > 0 and abs(gamma[0] / _SRGB_GAMMA - 1) > _GAMMA_TOLERANCE:
        curve = _power(1 / gamma[0])
    primaries = chromaticities
    # Writers round sRGB's numbers, libpng allows 0.01. Primaries without area are nonsense.
    if primaries is not None and (np.allclose(primaries, _SRGB, atol=0.01) or not _is_sound(primaries)):
        primaries = None
    return None if curve is _srgb_to_light and primaries is None else Encoding(curve, primaries)


def to_srgb(colour: Image.Image | np.ndarray, space: bytes | Encoding | None) -> Image.Image:
    """Converts colours to RGB in sRGB.

    Args:
        colour: As in `Pixels`.
        space: An ICC profile, an encoding, or None for sRGB. A broken profile, or one for other pixels, is ignored.

    Raises:
        Rejected: `unsupported`: the profile says that the colours are HDR.
    """
    if isinstance(space, Encoding):
        return Image.fromarray(_convert(colour if isinstance(colour, np.ndarray) else np.asarray(colour), space))
    if isinstance(colour, np.ndarray):
        colour = Image.fromarray(to_eight_bits(colour))
    return _from_profile(colour, space) if space else colour.convert("RGB")


def _from_profile(colour: Image.Image, profile_bytes: bytes) -> Image.Image:
    transfer = _transfer_of_profile(profile_bytes)
    if transfer in _HDR:
        raise Rejected(Reason.UNSUPPORTED, f"HDR: an ICC profile with the {_HDR[transfer]} curve; convert it to sRGB")
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


def _transfer_of_profile(profile: bytes) -> int | None:
    """The code point of the curve in a profile's tag cicp (ICC.1:2022, 9.2.17); None without that tag."""
    try:
        (count,) = struct.unpack_from(">I", profile, 128)
        for entry in range(min(count, 100)):
            name, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * entry)
            if name == b"cicp":
                return profile[offset + 9]
    except (struct.error, IndexError):
        pass  # a broken profile; it is ignored later
    return None


def _convert(samples: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Shape (H, W) gray or (H, W, 3) RGB, uint8 or uint16, in `encoding`, to (H, W, 3) uint8 in sRGB."""
    levels = int(np.iinfo(samples.dtype).max) + 1
    light = np.clip(encoding.to_light(np.arange(levels) / (levels - 1)), 0, 1)
    gray = samples.ndim == 2
    if gray or encoding.primaries is None:
        # Gray has the colour of white, and white stays white.
        converted = np.rint(255 * _light_to_srgb(light)).astype(np.uint8)[samples]
        return np.repeat(converted[..., None], 3, axis=2) if gray else converted
    steps = 2**16 - 1  # finer than sRGB's finest level by a factor of 20
    to_level = np.rint(255 * _light_to_srgb(np.arange(steps + 1) / steps)).astype(np.uint8)
    matrix = (_to_srgb_matrix(encoding.primaries).T * steps).astype(np.float32)
    light = light.astype(np.float32)
    converted = np.empty(samples.shape, np.uint8)
    for row in range(0, len(samples), _ROWS):
        mixed = light[samples[row : row + _ROWS]] @ matrix
        converted[row : row + _ROWS] = to_level[np.clip(np.rint(mixed), 0, steps).astype(np.uint16)]
    return converted


def _to_srgb_matrix(primaries: Primaries) -> np.ndarray:
    """From light in these primaries to light in sRGB's; a white other than D65 is adapted by Bradford's matrix."""
    source, target = _white(primaries), _white(_SRGB)
    adaptation = np.linalg.inv(_BRADFORD) @ np.diag((_BRADFORD @ target) / (_BRADFORD @ source)) @ _BRADFORD
    return np.linalg.inv(_to_xyz(_SRGB)) @ adaptation @ _to_xyz(primaries)


def _white(primaries: Primaries) -> np.ndarray:
    x, y = primaries[:2]
    return np.array([x / y, 1, (1 - x - y) / y])


def _to_xyz(primaries: Primaries) -> np.ndarray:
    """The matrix from RGB to CIE XYZ: columns are the primaries, scaled so that their sum is white."""
    columns = np.array([(x, y, 1 - x - y) for x, y in zip(primaries[2::2], primaries[3::2], strict=True)]).T
    return columns * np.linalg.solve(columns, _white(primaries))


def _is_sound(primaries: Primaries) -> bool:
    """Whether the primaries span an area and white lies inside of it."""
    if primaries[1] <= 0:
        return False
    columns = np.array([(x, y, 1 - x - y) for x, y in zip(primaries[2::2], primaries[3::2], strict=True)]).T
    return abs(np.linalg.det(columns)) > 1e-4 and bool((np.linalg.solve(columns, _white(primaries)) > 0).all())


def _light_to_srgb(light: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.power(light, 1 / 2.4) - 0.055)


def _srgb_to_light(stored: np.ndarray) -> np.ndarray:
    return np.where(stored <= 0.04045, stored / 12.92, ((stored + 0.055) / 1.055) ** 2.4)


def _bt709_to_light(stored: np.ndarray) -> np.ndarray:
    """The inverse of the camera's curve, as colour management takes it."""
    return np.where(stored < 0.0812428583, stored / 4.5, ((stored + 0.0992968268) / 1.0992968268) ** (1 / 0.45))


def _smpte240_to_light(stored: np.ndarray) -> np.ndarray:
    return np.where(stored < 0.0912, stored / 4, ((stored + 0.1115) / 1.1115) ** (1 / 0.45))


def _power(exponent: float) -> Curve:
    return lambda stored: stored**exponent


_CURVES: dict[int, Curve] = {
    1: _bt709_to_light,
    4: _power(2.2),
    5: _power(2.8),
    6: _bt709_to_light,
    7: _smpte240_to_light,
    8: _power(1.0),
    13: _srgb_to_light,
    14: _bt709_to_light,
    15: _bt709_to_light,
}
