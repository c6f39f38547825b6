"""The image codecs that Pillow has, beside which ours is measured: files of them that are no larger than a given one.

Options are those that give the best pictures for the bits (docs/codec.md), on one thread. Pictures are plain RGB,
without profiles or other data. This module knows nothing of our own codec.
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
    """A codec of Pillow's.

    Attributes:
        name: For people.
        format: Pillow's name for it.
        feature: What Pillow must be built with.
        settings: All that are tried, from the smallest files to the largest.
        variants: Pillow's options for a setting: of several, the smaller file counts. They decode alike.
        version: Of the library behind it.
    """

    name: str
    format: str
    feature: str
    settings: Sequence[float]
    variants: Callable[[float], Sequence[_Options]]
    version: Callable[[], str | None]


class BaselineFile(NamedTuple):
    """A file, the setting that made it, and the seconds that it took: without those spent on other settings."""

    data: bytes
    setting: float
    seconds: float


def _jpeg(quality: float) -> list[_Options]:
    # Small files are smaller in one pass, larger ones in several.
    common = {"quality": int(quality), "optimize": True, "subsampling": "4:2:0"}
    return [common, {**common, "progressive": True}]


def _webp(quality: float) -> list[_Options]:
    return [{"quality": int(quality), "method": 6}]


def _jpeg_2000(ratio: float) -> list[_Options]:
    # mct decorrelates the colours, worth 3 dB; Pillow leaves it out unless asked. A bare codestream is smallest.
    options = {"quality_mode": "rates", "quality_layers": [ratio], "irreversible": True, "mct": 1, "no_jp2": True}
    return [options]


def _avif(quality: float) -> list[_Options]:
    # Colours at full resolution: more PSNR and more MS-SSIM for the bits than Pillow's default of half.
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
"""What ours is measured beside, where this Pillow has it."""


def available() -> list[Baseline]:
    """The baselines that this Pillow can write."""
    supported = features.get_supported()
    return [baseline for baseline in BASELINES if baseline.feature in supported]


def describe(baselines: Sequence[Baseline]) -> str:
    """Names and versions, in one phrase."""
    named = [f"{baseline.name} {baseline.version() or ''}".strip() for baseline in baselines]
    return ", ".join([f"Pillow {PIL.__version__}", *named])


def encode_within(baseline: Baseline, rgb: np.ndarray, num_bytes: int) -> BaselineFile:
    """The file of the highest setting that takes at most so many bytes; of the lowest, where even that takes more.

    Args:
        baseline: The codec.
        rgb: The image, shape (H, W, 3), uint8.
        num_bytes: The limit.

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
    reader, _ = Image.OPEN[baseline.format]  # itself: `Image.open` would look for the format and warn of large images
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
