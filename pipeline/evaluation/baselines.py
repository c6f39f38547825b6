"""Baselines of the codec: the image codecs of Pillow, each at its best setting for a given number of bytes.

The options are the ones that give the best pictures for the bits (docs/codec.md), on one thread. Pictures are plain
RGB, without profiles or other data. This module knows nothing of the .air format.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image, features

from pipeline.errors import Reason, Rejected

_Options = Mapping[str, Any]


@dataclass(frozen=True)
class Baseline:
    """An image codec of Pillow.

    Attributes:
        name: The codec's usual name.
        format: Pillow's name of the format.
        feature: The feature that Pillow must be built with.
        settings: The settings to try, from the smallest files to the largest.
        variants: Pillow's options for a setting. If there are several, they decode to the same pixels, and the smallest
            file counts.
        version: The version of the library behind the codec.
    """

    name: str
    format: str
    feature: str
    settings: Sequence[float]
    variants: Callable[[float], Sequence[_Options]]
    version: Callable[[], str | None]


class BaselineFile(NamedTuple):
    """A file, its setting, and the seconds of encoding with that setting alone, without the search."""

    data: bytes
    setting: float
    seconds: float


def _jpeg(quality: float) -> list[_Options]:
    # Small files are smaller as sequential JPEG, larger files as progressive JPEG.
    common = {"quality": int(quality), "optimize": True, "subsampling": "4:2:0"}
    return [common, {**common, "progressive": True}]


def _webp(quality: float) -> list[_Options]:
    return [{"quality": int(quality), "method": 6}]


def _jpeg_2000(ratio: float) -> list[_Options]:
    # mct decorrelates the colours, which gains 3 dB; it is off by default in Pillow. no_jp2 leaves out the container.
    options = {"quality_mode": "rates", "quality_layers": [ratio], "irreversible": True, "mct": 1, "no_jp2": True}
    return [options]


def _avif(quality: float) -> list[_Options]:
    # Colours at full resolution give more PSNR and MS-SSIM for the bits than at half, the default of Pillow.
    return [{"quality": int(quality), "subsampling": "4:4:4", "max_threads": 1}]


BASELINES = (
    Baseline("JPEG", "JPEG", "jpg", range(1, 101), _jpeg, lambda: features.version_feature("libjpeg_turbo")),
    Baseline("WebP", "WEBP", "webp", range(101), _webp, lambda: features.version("webp")),
    # Compression ratios from 4096 to 1, in steps of 1.5 %.
    Baseline(
        "JPEG 2000",
        "JPEG2000",
        "jpg_2000",
        [2 ** (12 - number / 48) for number in range(12 * 48 + 1)],
        _jpeg_2000,
        lambda: features.version("jpg_2000"),
    ),
    Baseline("AVIF", "AVIF", "avif", range(101), _avif, lambda: features.version("avif")),
)
"""All baselines; `available` leaves out those that this Pillow cannot write."""


def available() -> list[Baseline]:
    """The baselines that this Pillow can write."""
    supported = features.get_supported()
    return [baseline for baseline in BASELINES if baseline.feature in supported]


def describe(baselines: Sequence[Baseline]) -> str:
    """The names and versions of Pillow and of the baselines, as one phrase."""
    named = [f"{baseline.name} {baseline.version() or ''}".strip() for baseline in baselines]
    return ", ".join([f"Pillow {PIL.__version__}", *named])


def encode_within(baseline: Baseline, rgb: np.ndarray, num_bytes: int) -> BaselineFile:
    """Encodes an image with the highest setting whose file has at most `num_bytes` bytes.

    If even the file of the lowest setting is larger, that file is returned.

    Args:
        baseline: The codec.
        rgb: The image, shape (H, W, 3), uint8.
        num_bytes: The limit on the size of the file.

    Raises:
        Rejected: `unsupported`: the codec cannot hold an image of that size.
    """
    picture = Image.fromarray(rgb)
    low, high = 0, len(baseline.settings)
    best = _encode(baseline, picture, baseline.settings[low])
    while high - low > 1 and len(best.data) <= num_bytes:
        middle = (low + high) // 2
        tried = _encode(baseline, picture, baseline.settings[middle])
        if len(tried.data) <= num_bytes:
            low, best = middle, tried
        else:
            high = middle
    return best


def decode(baseline: Baseline, data: bytes) -> np.ndarray:
    """The pixels of a baseline's file, shape (H, W, 3), uint8."""
    reader, _ = Image.OPEN[baseline.format]  # `Image.open` would guess the format and warn of large images
    with reader(io.BytesIO(data), "") as picture:
        return np.asarray(picture.convert("RGB"))


def _encode(baseline: Baseline, picture: Image.Image, setting: float) -> BaselineFile:
    files = []
    begin = time.perf_counter()
    for options in baseline.variants(setting):
        file = io.BytesIO()
        try:
            picture.save(file, baseline.format, **options)
        except (OSError, ValueError) as error:  # such as a side longer than the format allows
            raise Rejected(Reason.UNSUPPORTED, f"{baseline.name} cannot hold it: {error}") from None
        files.append(file.getvalue())
    return BaselineFile(min(files, key=len), setting, time.perf_counter() - begin)
