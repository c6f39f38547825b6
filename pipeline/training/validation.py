"""Validation of a predictor on a fixed set of images: the PSNR of its predictions without any optimisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from air.arguments import image_tensor
from air.codec.symbols import Stage, gaussians_of, quantize_stages
from air.gaussians import Gaussians
from air.metrics import psnr
from air.predictor.network import PredictorNetwork
from air.predictor.quantized import learned_table
from air.rendering.render import render
from air.stages.control import StageControl
from air.stages.loop import StageResult, all_gaussians
from air.stages.predict import predict
from pipeline.errors import Rejected, TrainingError
from pipeline.inputs.pictures import find_pictures

_GRID_SIDE = 256
"""Pixels of a side of a picture in the picture grid, at most."""


@dataclass
class Score:
    """Sums over validated images.

    Attributes:
        images: Number of images.
        psnr: Sum of their PSNR in dB.
        gaussians: Sum of the numbers of Gaussians of each stage.
        pictures: The first few originals, each beside its prediction, shape (3, H, 2 W).
    """

    images: int
    psnr: float
    gaussians: list[float]
    pictures: list[np.ndarray] = field(default_factory=list)


def load_images(uri: str, count: int, max_side: int, rank: int, size: int) -> list[Tensor]:
    """This rank's part of the first `count` images of a folder or of shards; large images are cropped to their middle.

    Args:
        uri: Images, tars or Parquet as `air shard` takes them, or the output of `air shard` or `air distill`.
        count: Number of images of all ranks together.
        max_side: Images are cropped to this many pixels a side.
        rank: Number of this worker, from 0.
        size: Number of workers.

    Returns:
        Images of shape (3, H, W), float32 in [0, 1].

    Raises:
        TrainingError: There is no image, or one of them cannot be used.
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
    """Decodes the images that all ranks would load together, and raises what `load_images` raises."""
    if not sum(1 for _ in _decode(uri, range(count))):
        raise TrainingError(f"{uri} holds no image to validate on")


def _decode(uri: str, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """The images at these positions of a fixed order; positions beyond the last image are left out."""
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
    """The PSNR of the network's predictions, without optimisation.

    Args:
        network: The network that is validated.
        pictures: Images of shape (3, H, W).
        stages: Number of stages that take part.
        control: Which patches get a Gaussian.
        threads: CPU threads.
        shown: Number of pictures in the score.
        quantised: Validate the Gaussians as a file stores them, quantised with the network's quantiser.
    """
    score = Score(len(pictures), 0.0, [0.0] * stages)
    for number, image in enumerate(pictures):
        results = predict(image, network, stages, control=control, threads=threads)
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
    """The Gaussians as a file stores them that is written with the network's quantiser, on the CPU."""
    _, height, width = image.shape
    stages = [
        Stage(result.patch.cpu().numpy(), result.gaussians("predicted", network.patch_size)) for result in results
    ]
    table = learned_table(network, image, stages, threads=threads)
    header, quantized = quantize_stages(stages, height, width, network.patch_size, table)
    return Gaussians.concatenate([gaussians_of(stage, header) for stage in quantized])


def picture_grid(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures (3, H, W), one below the other; the space beside narrower pictures is black."""
    width = max(picture.shape[2] for picture in pictures)
    padded = [np.pad(picture, ((0, 0), (0, 0), (0, width - picture.shape[2]))) for picture in pictures]
    return np.concatenate(padded, axis=1)
