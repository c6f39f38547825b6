"""Validation of a predictor on a fixed set of images: what it reaches without any optimisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from air.arguments import image_tensor
from air.codec.symbols import Stage, gaussians_of, quantize_stages
from air.gaussians import Gaussians, activate
from air.metrics import psnr
from air.optimization.optimize import OptimizeConfig
from air.predictor.network import PredictorNetwork
from air.predictor.quantized import learned_table
from air.rendering.render import render
from air.stages.control import StageControl
from air.stages.loop import StageResult, all_gaussians, run_stages
from pipeline.errors import Rejected, TrainingError
from pipeline.inputs.pictures import find_pictures

_GRID_SIDE = 256
"""Pixels of a side of a picture in the image grid, at most."""


@dataclass
class Score:
    """Sums over validated images.

    Attributes:
        images: How many.
        psnr: Sum of their PSNR in dB.
        gaussians: Sum of each stage's Gaussians.
        pictures: Original beside prediction, each (3, H, 2 W), of the first few.
    """

    images: int
    psnr: float
    gaussians: list[float]
    pictures: list[np.ndarray] = field(default_factory=list)


def load_images(uri: str, count: int, max_side: int, rank: int, size: int) -> list[Tensor]:
    """This rank's share of the first `count` images of a folder or of shards, the middle of each.

    Args:
        uri: Images, tars or Parquet as `air shard` takes them, or the output of `air shard` or `air distill`.
        count: How many images there are for all ranks.
        max_side: Larger images are cropped to this many pixels a side.
        rank: Of this worker.
        size: Number of workers.

    Raises:
        TrainingError: There is no usable image.
    """
    decoded = []
    for rgb in _decode(uri, range(rank, count, size)):
        top, left = max(0, rgb.shape[0] - max_side) // 2, max(0, rgb.shape[1] - max_side) // 2
        middle = rgb[top : top + max_side, left : left + max_side]
        decoded.append(image_tensor(middle))
    if not decoded and rank == 0:
        raise TrainingError(f"{uri} holds no image to validate on")
    return decoded


def check_images(uri: str, count: int) -> None:
    """Raises what `load_images` would raise, and keeps nothing."""
    if not sum(1 for _ in _decode(uri, range(count))):
        raise TrainingError(f"{uri} holds no image to validate on")


def _decode(uri: str, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """Images by their position in a fixed order; fewer where there are fewer."""
    pictures = find_pictures([uri])
    for picture in [pictures[index] for index in wanted if index < len(pictures)]:
        try:
            yield picture.read()[1]
        except Rejected as rejection:
            raise TrainingError(
                f"validation image {picture.source} in {uri} cannot be used: {rejection}; remove it"
            ) from None


def validate(
    network: PredictorNetwork,
    pictures: Sequence[Tensor],
    stages: int,
    control: StageControl,
    threads: int,
    shown: int,
    quantised: bool = False,
) -> Score:
    """What the network alone makes of the images.

    Args:
        network: What is judged.
        pictures: Images (3, H, W).
        stages: How many.
        control: Which patches get a Gaussian.
        threads: CPU threads.
        shown: How many pictures the score shows.
        quantised: Judge what a file would hold that is written with the network's quantiser.
    """
    score = Score(len(pictures), 0.0, [0.0] * stages)
    for number, image in enumerate(pictures):
        results = list(
            run_stages(
                image,
                network,
                [OptimizeConfig(steps=0)] * stages,
                control=control,
                canvas="predicted",
                judge=False,
                threads=threads,
            )
        )
        _, height, width = image.shape
        if quantised:
            gaussians = _as_stored(network, image, results, threads).to(image.device)
        else:
            gaussians = all_gaussians(results, network.patch_size, "predicted").to(image.device)
        drawn = render(gaussians, height, width, threads=threads)
        score.psnr += psnr(drawn, image)
        for result in results:
            score.gaussians[result.stage] += len(result)
        if number < shown:
            pair = torch.cat([image, drawn.clamp(0, 1)], dim=2).cpu()
            score.pictures.append(pair[:, :_GRID_SIDE].numpy())
    return score


def _as_stored(network: PredictorNetwork, image: Tensor, results: Sequence[StageResult], threads: int) -> Gaussians:
    """What a file holds that is written with the network's quantiser, on the CPU."""
    _, height, width = image.shape
    stages = [
        Stage(result.patch.cpu().numpy(), activate(result.predicted, result.anchor, network.patch_size))
        for result in results
    ]
    table = learned_table(network, image, stages, threads=threads)
    header, quantized = quantize_stages(stages, height, width, network.patch_size, table)
    return Gaussians.concatenate([gaussians_of(stage, header) for stage in quantized])


def picture_grid(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures (3, H, W) below each other, black beside narrower ones."""
    width = max(picture.shape[2] for picture in pictures)
    padded = [np.pad(picture, ((0, 0), (0, 0), (0, width - picture.shape[2]))) for picture in pictures]
    return np.concatenate(padded, axis=1)
