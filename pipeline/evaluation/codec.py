"""Evaluation of the codec: the quality of decoded pictures over bits per pixel, beside other codecs.

For every image and target, `air.encode` makes a file of at most the target's bits per pixel; every baseline then makes
its best file that is no larger (`pipeline.evaluation.baselines`). Bits are those of whole files. All codecs are judged
by the pixels that a viewer gets, at 8 bits per channel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from air.arguments import image_tensor
from air.codec.bitstream import MAX_SIDE, read_header
from air.codec.file import decode, read_info
from air.codec.sensitivity import SensitivityQuantizer
from air.compute.threads import limit_torch
from air.encoding.encode import encode
from air.metrics import ms_ssim, psnr
from air.rendering.cpu import draw_levels
from air.warmup import warm_up
from pipeline.bulk.encode import encoding_rejects
from pipeline.evaluation import baselines
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.predictor import Evaluation, Rows, measure_pictures
from pipeline.inputs.pictures import Picture

AIR = "AIR"
"""The name of this project's codec in tables."""

_DECODINGS = 3
_WARM_UP_SIDE = 64


def evaluate_codec(
    pictures: Sequence[Picture],
    others: Sequence[baselines.Baseline],
    config: EvaluateConfig,
    report: Callable[[int, Rows], None] = lambda number, rows: None,
) -> Evaluation:
    """Measures the codec and its baselines on pictures.

    Args:
        pictures: The pictures. One that cannot be used, or that misses a target, is logged with the reason and counted.
        others: The baselines.
        config: What is measured.
        report: Called after every picture with the number of pictures done and the picture's rows.

    Returns:
        The rows of `pipeline.formats.tables.CODEC_EVALUATION`, and the number of rejected pictures by reason.
    """
    warm_up("encode")

    def measure(key: str, rgb: np.ndarray) -> Rows:
        return [row for target in config.bpp for row in _measure(key, rgb, target, others, config)]

    with limit_torch(config.threads):
        # The first call has costs of its own, such as loading kernels, which belong to no picture.
        noise = np.random.default_rng(0).integers(0, 256, (_WARM_UP_SIDE, _WARM_UP_SIDE, 3), np.uint8)
        _draw_file(encode(noise, bpp=8.0, steps=2, stored_steps=2, threads=config.threads), config.threads)
        return measure_pictures(pictures[: config.limit], measure, report)


def _measure(
    key: str, rgb: np.ndarray, target: float, others: Sequence[baselines.Baseline], config: EvaluateConfig
) -> Iterator[dict[str, Any]]:
    """A row for every codec, this project's first."""
    height, width, _ = rgb.shape
    original = image_tensor(rgb)

    def row(
        codec: str,
        file: baselines.BaselineFile,
        decode_file: Callable[[bytes], np.ndarray],
        num_gaussians: int,
    ) -> dict[str, Any]:
        drawn, decode_seconds = _time_decoding(decode_file, file.data)
        return {
            "key": key,
            "codec": codec,
            "target_bpp": target,
            "height": height,
            "width": width,
            "setting": float(file.setting),
            "num_gaussians": num_gaussians,
            "bytes": len(file.data),
            "bpp": 8 * len(file.data) / (height * width),
            "psnr": psnr(image_tensor(drawn), original),
            "ms_ssim": ms_ssim(image_tensor(drawn), original),
            "encode_seconds": file.seconds,
            "decode_seconds": decode_seconds,
        }

    begin = time.perf_counter()
    with encoding_rejects():
        blob = encode(rgb, bpp=target, steps=config.steps, stored_steps=config.stored_steps, threads=config.threads)
    seconds = time.perf_counter() - begin
    info = read_info(blob, max_pixels=height * width)
    quantizer = info.header.quantizer
    assert isinstance(quantizer, SensitivityQuantizer)
    own = baselines.BaselineFile(blob, quantizer.step, seconds)
    yield row(AIR, own, partial(_draw_file, threads=config.threads), sum(info.num_gaussians))
    for other in others:
        yield row(other.name, baselines.encode_within(other, rgb, len(blob)), partial(baselines.decode, other), 0)


def _draw_file(blob: bytes, threads: int) -> np.ndarray:
    header = read_header(blob, max_pixels=MAX_SIDE**2)
    gaussians = decode(blob, max_pixels=MAX_SIDE**2)
    return draw_levels(gaussians, header.height, header.width, threads)


def _time_decoding(decode_file: Callable[[bytes], np.ndarray], data: bytes) -> tuple[np.ndarray, float]:
    """The pixels, and the wall seconds of the fastest of `_DECODINGS` decodings."""
    seconds = []
    for _ in range(_DECODINGS):
        begin = time.perf_counter()
        pixels = decode_file(data)
        seconds.append(time.perf_counter() - begin)
    return pixels, min(seconds)


def means(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[float, str], dict[str, float]]:
    """Means over images of every quantity, by target and codec; targets rise, codecs keep the order of the rows."""
    groups: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["target_bpp"], row["codec"]), []).append(row)
    quantities = ("bpp", "psnr", "ms_ssim", "num_gaussians", "encode_seconds", "decode_seconds")
    return {
        group: {name: sum(row[name] for row in members) / len(members) for name in quantities}
        for group, members in sorted(groups.items(), key=lambda item: item[0][0])
    }
