"""What a rule is rolled out on: which shards, images and crops, how many Gaussians and updates, all drawn by seeds."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from air.defaults import ADAM
from pipeline.bulk.views import check_holds_patch
from pipeline.errors import Reason, Rejected
from pipeline.identity import seed_of
from pipeline.rules.config import RollOutConfig, StoreConfig
from pipeline.work.plan import Unit
from pipeline.work.process import Sample

if TYPE_CHECKING:
    from air.fitting.grow import GrowthConfig
    from air.fitting.rollout import RollOut
    from air.optimization.rule import LearnedRule

MIN_SIDE = 8
"""Images with fewer pixels in height or width are refused."""


def draw_shards(shards: Sequence[Unit], config: StoreConfig) -> list[Unit]:
    """The shards to roll out on, each with the number of images that `draw_images` takes of it.

    Whether a shard is drawn depends on the seed and on the names of the shards alone.
    """
    ranked = sorted(shards, key=lambda shard: (seed_of(config.seed, "shard", shard.name), shard.name))
    drawn = ranked[: config.shards]
    if config.images is None:
        return drawn
    most = config.images
    return [
        shard.model_copy(update={"samples": None if shard.samples is None else min(most, shard.samples)})
        for shard in drawn
    ]


def draw_images(samples: Iterable[Sample], config: StoreConfig) -> Iterator[Sample]:
    """The images of a shard to roll out on, in the shard's order. The drawn ones alone are in memory.

    Whether an image is drawn depends on the seed and on the keys in the shard alone.
    """
    if config.images is None:
        yield from samples
        return
    drawn = heapq.nsmallest(
        config.images, enumerate(samples), key=lambda item: (seed_of(config.seed, "image", item[1].key), item[0])
    )
    for _, sample in sorted(drawn, key=lambda item: item[0]):
        yield sample


@dataclass(frozen=True)
class FitDraw:
    """A fit that was drawn.

    Attributes:
        seed: 64 bits; they determine the rest, and the samples.
        top, left, height, width: The crop, in pixels of the image.
        turn: Sum of 1: left and right are swapped, 2: top and bottom are swapped, 4: the result is transposed.
        num_gaussians: Most Gaussians.
        steps: Number of updates.
    """

    seed: int
    top: int
    left: int
    height: int
    width: int
    turn: int
    num_gaussians: int
    steps: int


def draw_fit(height: int, width: int, config: RollOutConfig, seed: int) -> FitDraw:
    """Draws a fit of an image of `height` x `width` pixels; equal seeds give equal fits.

    Raises:
        Rejected: `too_small`: the image is lower or narrower than `MIN_SIDE` pixels.
    """
    check_holds_patch(height, width, MIN_SIDE)
    random = np.random.Generator(np.random.PCG64(seed))
    crop_height, crop_width = min(height, config.crop), min(width, config.crop)
    top = int(random.integers(height - crop_height + 1))
    left = int(random.integers(width - crop_width + 1))
    turn = int(random.integers(8))
    steps = round(_log_uniform(random, config.min_steps, config.max_steps))
    pixels = _log_uniform(random, config.min_pixels_per_gaussian, config.max_pixels_per_gaussian)
    return FitDraw(
        seed=seed,
        top=top,
        left=left,
        height=crop_height,
        width=crop_width,
        turn=turn if config.turn else 0,
        num_gaussians=max(1, round(crop_height * crop_width / pixels)),
        steps=steps,
    )


def _log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    return math.exp(random.uniform(math.log(low), math.log(high)))


def cut(rgb: np.ndarray, draw: FitDraw) -> np.ndarray:
    """The crop, turned: shape (height, width, 3), or (width, height, 3) if it is transposed."""
    crop = rgb[draw.top : draw.top + draw.height, draw.left : draw.left + draw.width]
    crop = crop[:, ::-1] if draw.turn & 1 else crop
    crop = crop[::-1] if draw.turn & 2 else crop
    return np.ascontiguousarray(crop.transpose(1, 0, 2) if draw.turn & 4 else crop)


def fraction_for(samples: int, draw: FitDraw, growth: GrowthConfig) -> float:
    """The fraction of the Gaussians at every update that makes about that many samples of a fit, at most 1."""
    phases = growth.phases(draw.steps)
    start = growth.start_fraction if growth.growths else 1.0
    parts = [start + (1 - start) * number / max(1, growth.growths) for number in range(len(phases))]
    return min(1.0, samples / (draw.num_gaussians * sum(p * n for p, n in zip(parts, phases, strict=True))))


def run_fit(rgb: np.ndarray, draw: FitDraw, rule: LearnedRule, config: RollOutConfig, fraction: float) -> RollOut:
    """Rolls a rule out in a fit, on the CPU.

    Args:
        rgb: The image, shape (H, W, 3), uint8.
        draw: The fit.
        rule: Makes the moves.
        config: How the fit grows, and how later losses count.
        fraction: Fraction of the Gaussians that each update draws as samples.

    Raises:
        Rejected: `non_finite`: the fit gave numbers that are not finite, or a loss of 0, whose logarithm is not.
    """
    from air.arguments import image_tensor
    from air.compute.threads import limit_torch
    from air.errors import InvalidGaussiansError, NonFiniteLossError
    from air.fitting.rollout import roll_out
    from air.optimization.settings import fit_optimization

    with limit_torch(1):  # sums of another order would make other values on another machine
        try:
            result = roll_out(
                image_tensor(cut(rgb, draw)),
                rule,
                draw.num_gaussians,
                fit_optimization(draw.steps, ADAM),
                growth=config.growth(),
                credit=config.credit(),
                fraction=fraction,
                seed=draw.seed,
            )
        except (InvalidGaussiansError, NonFiniteLossError) as error:
            raise Rejected(Reason.NON_FINITE, str(error)) from None
    positive = bool((np.isfinite(result.loss) & (result.loss > 0)).all())  # the objective is a sum of their logarithms
    sound = positive and all(
        bool(values.isfinite().all()) for values in (result.features, result.move, result.credit, result.curvature)
    )
    if not sound:
        raise Rejected(
            Reason.NON_FINITE,
            f"a roll-out of {draw.steps} updates gave losses whose logarithm is not finite, as a black crop does "
            f"({draw.width} x {draw.height} pixels at {draw.left}, {draw.top})",
        )
    return result
