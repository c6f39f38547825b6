"""Evaluation: what a predictor makes of pictures, by itself and after steps of refinement, beside plain grids.

Every refinement starts from the prediction and moves the Gaussians of all stages together. Baselines, in the same run:

- `grid`: the closed form with the same patch size, stages and budget as the network.
- `plain grid`: one stage of it, with the patch size that comes nearest to as many Gaussians as were predicted.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from air.arguments import image_tensor
from air.defaults import GRID
from air.errors import InvalidGaussiansError, NonFiniteLossError
from air.gaussians import RAW_CHANNELS, activate, grid_shape
from air.metrics import ms_ssim, psnr
from air.optimization.optimize import OptimizeConfig, optimize
from air.predictor.base import GridPredictor, Predictor
from air.rendering.render import render
from air.stages.control import StageControl
from air.stages.loop import run_stages
from air.warmup import warm_up
from pipeline.errors import Rejected
from pipeline.evaluation.config import EvaluateConfig
from pipeline.inputs.pictures import Picture
from pipeline.predictors import PredictorReference, load

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]

PLAIN_GRID = "plain grid"
"""What tables call one stage of the grid with as many Gaussians as were predicted."""

_EVERYWHERE = StageControl(max_mse=-1.0, max_dssim=-1.0)
"""Every patch counts as bad: a plain grid has a Gaussian in each, whatever the picture."""

_WARM_UP_SIDE = 64


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        rows: Of one of the tables for evaluations in `pipeline.formats.tables`, in order of images.
        rejected: How many images could not be used, by reason.
    """

    rows: Rows = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Contestant:
    """A predictor as it takes part. `rates` are the optimiser's, for a number of steps: a grid is far from its goal."""

    name: str
    predictor: Predictor
    stages: int
    budget: int | None
    control: StageControl
    rates: Callable[[int], OptimizeConfig]


def evaluate(
    pictures: Sequence[Picture],
    reference: PredictorReference,
    config: EvaluateConfig,
    report: Callable[[int, Rows], None] = lambda number, rows: None,
) -> Evaluation:
    """Measures a predictor, and the baselines, on pictures.

    Args:
        pictures: On which; one that cannot be used is logged with its reason and counted.
        reference: The predictor.
        config: What is measured.
        report: Called after every picture with the number of pictures done and its rows.

    Raises:
        CheckpointError: The predictor cannot be loaded.
        ConfigError: It has fewer stages than are asked for.
    """
    torch.set_num_threads(config.threads)
    warm_up("predict")
    control = StageControl(config.max_patch_mse, config.max_patch_dssim)
    same = (reference.stages(config.stages), config.gaussians, control)
    rates = OptimizeConfig if reference.name == GRID else OptimizeConfig.refinement
    contestants = [_Contestant(reference.model, load(reference, torch.device("cpu")), *same, rates)]
    if config.baseline and reference.name != GRID:
        grid = GridPredictor(reference.patch_size)
        contestants.append(_Contestant(GRID, grid, *same, OptimizeConfig))
    warm = False

    def measure(key: str, rgb: np.ndarray) -> Rows:
        nonlocal warm
        image = image_tensor(rgb)
        if not warm:  # what the first call costs, such as loading kernels, is no picture's time
            _measure_all("", image[:, :_WARM_UP_SIDE, :_WARM_UP_SIDE], contestants, config)
            warm = True
        return _measure_all(key, image, contestants, config)

    return measure_pictures(pictures[: config.limit], measure, report)


def measure_pictures(
    pictures: Sequence[Picture],
    measure: Callable[[str, np.ndarray], Rows],
    report: Callable[[int, Rows], None],
) -> Evaluation:
    """Measures picture after picture; one that cannot be used is logged with its reason and counted.

    Args:
        pictures: On which.
        measure: The rows of a picture, from its key and its pixels, shape (H, W, 3), uint8.
        report: Called after every picture with the number of pictures done and its rows.
    """
    evaluation = Evaluation()
    for number, picture in enumerate(pictures):
        try:
            rows = measure(*picture.read())
        except Rejected as rejection:
            rows = _reject(evaluation, picture, rejection)
        except (InvalidGaussiansError, NonFiniteLossError) as error:
            rows = _reject(evaluation, picture, Rejected("non_finite", str(error)))
        evaluation.rows += rows
        logger.info("%d of %d pictures done: %s", number + 1, len(pictures), picture.source)
        report(number + 1, rows)
    return evaluation


def _reject(evaluation: Evaluation, picture: Picture, rejection: Rejected) -> Rows:
    evaluation.rejected[rejection.reason] += 1
    logger.warning("skipped: %s: %s", picture.source, rejection)
    return []


def _measure_all(key: str, image: Tensor, contestants: Sequence[_Contestant], config: EvaluateConfig) -> Rows:
    """The rows of one image: of every contestant, and of the plain grid."""
    rows = [row for contestant in contestants for row in _measure(key, image, contestant, config)]
    if config.baseline:
        _, height, width = image.shape
        patch_size = nearest_patch_size(height, width, rows[0]["num_gaussians"])
        grid = GridPredictor(patch_size)
        plain = _Contestant(PLAIN_GRID, grid, 1, None, _EVERYWHERE, OptimizeConfig)
        rows += _measure(key, image, plain, config)
    return rows


def nearest_patch_size(height: int, width: int, num_gaussians: int) -> int:
    """The patch size of a plain grid whose number of Gaussians has the ratio nearest to 1 with that wanted."""

    def distance(patch_size: int) -> float:
        rows, columns = grid_shape(height, width, patch_size)
        return abs(math.log(rows * columns / max(1, num_gaussians)))

    return min(range(1, max(height, width) + 1), key=distance)


def _measure(key: str, image: Tensor, contestant: _Contestant, config: EvaluateConfig) -> Iterator[dict[str, Any]]:
    """A row for every number of refinement steps."""
    _, height, width = image.shape
    predictor = contestant.predictor
    begin = time.perf_counter()
    stages = list(
        run_stages(
            image,
            predictor,
            [OptimizeConfig(steps=0)] * contestant.stages,
            control=contestant.control,
            canvas="predicted",
            budget=contestant.budget,
            judge=False,
            threads=config.threads,
        )
    )
    predict_seconds = time.perf_counter() - begin
    predicted = torch.cat([stage.predicted for stage in stages] or [torch.empty(0, RAW_CHANNELS)])
    anchor = torch.cat([stage.anchor for stage in stages] or [torch.empty(0, 2)])
    for steps in config.refine:
        raw, refine_seconds = predicted, 0.0
        if steps and len(raw):
            optimization = contestant.rates(steps).scaled(config.rate)
            begin = time.perf_counter()
            raw = optimize(raw, anchor, image, predictor.patch_size, optimization, threads=config.threads).raw
            refine_seconds = time.perf_counter() - begin
        gaussians = activate(raw, anchor, predictor.patch_size)
        drawn = render(gaussians, height, width, threads=config.threads)
        yield {
            "key": key,
            "predictor": contestant.name,
            "patch_size": predictor.patch_size,
            "refine_steps": steps,
            "height": height,
            "width": width,
            "psnr": psnr(drawn, image),
            "ms_ssim": ms_ssim(drawn, image),
            "num_gaussians": len(raw),
            "gaussians": [len(stage) for stage in stages],
            "predict_seconds": predict_seconds,
            "refine_seconds": refine_seconds,
        }
