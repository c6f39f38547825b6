"""Evaluation of a predictor: quality and time of its predictions, before and after refinement, beside grids.

Every refinement starts from the prediction and moves the Gaussians of all stages together. The baselines, measured in
the same run, are:

- `grid`: the closed form with the same patch size, stages and budget as the network.
- `plain grid`: one stage of the closed form, with the patch size that gives nearly as many Gaussians as were predicted.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from air.arguments import image_tensor
from air.compute.threads import limit_torch
from air.defaults import GRID
from air.errors import InvalidGaussiansError, NonFiniteLossError
from air.gaussians import activate, grid_shape
from air.metrics import ms_ssim, psnr
from air.optimization.config import OptimizeConfig
from air.optimization.optimize import optimize
from air.optimization.settings import refinement
from air.predictor.base import GridPredictor, Predictor
from air.rendering.render import render
from air.stages.control import StageControl
from air.stages.loop import StageResult, all_predicted
from air.stages.predict import predict
from air.warmup import warm_up
from pipeline.errors import Reason, Rejected
from pipeline.evaluation.config import EvaluateConfig
from pipeline.inputs.pictures import Picture
from pipeline.predictors import PredictorReference, load

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]

PLAIN_GRID = "plain grid"
"""The name in tables of one stage of the grid with about as many Gaussians as were predicted."""

_EVERYWHERE = StageControl(max_mse=-1.0, max_dssim=-1.0)
"""Every patch counts as bad, as a plain grid has a Gaussian in each."""

WARM_UP_SIDE = 64
"""Pixels along a side of the crop that is measured first, for nothing: the first call loads kernels."""


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        rows: Rows of `EVALUATION`, `CODEC_EVALUATION` or `FRONT` in `pipeline.formats.tables`, in the order of images.
        rejected: Number of images that could not be used, by reason.
        diverged: Number of images for which a predictor gave numbers that are not finite, by the predictor's name. Such
            an image has no rows, whichever predictor failed.
    """

    rows: Rows = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    diverged: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Contestant:
    """A predictor that is measured, with its stages, budget and control.

    `optimization` gives the optimiser's configuration for a number of steps. A plain grid is farther from the image
    than a prediction in stages, so its learning rates are higher.
    """

    name: str
    predictor: Predictor
    stages: int
    budget: int | None
    control: StageControl
    optimization: Callable[[int], OptimizeConfig] = refinement

    @staticmethod
    def find(
        reference: PredictorReference, stages: int | None, budget: int | None, control: StageControl
    ) -> Contestant:
        """Loads a predictor onto the CPU.

        Raises:
            CheckpointError: The predictor cannot be loaded.
            ConfigError: The predictor has fewer stages than are asked for.
        """
        predictor = load(reference, torch.device("cpu"))
        return Contestant(reference.model, predictor, reference.stages(stages), budget, control)

    def predict(self, image: Tensor, threads: int) -> list[StageResult]:
        """The predictions of all stages, for an image of shape (3, H, W)."""
        return predict(image, self.predictor, self.stages, control=self.control, budget=self.budget, threads=threads)

    def refine(self, raw: Tensor, anchor: Tensor, image: Tensor, steps: int, factor: float, threads: int) -> Tensor:
        """Moves raw Gaussians (N, 8) at anchors (N, 2) together, with learning rates multiplied by `factor`."""
        if not steps or not len(raw):
            return raw
        optimization = self.optimization(steps).scaled(factor)
        return optimize(raw, anchor, image, self.predictor.patch_size, optimization, threads=threads).raw


def evaluate(
    pictures: Sequence[Picture],
    references: Sequence[PredictorReference],
    config: EvaluateConfig,
    report: Callable[[int, Rows], None] = lambda number, rows: None,
) -> Evaluation:
    """Measures predictors and the baselines of the first one on pictures. On each picture they take turns.

    Args:
        pictures: The pictures. One that cannot be used is logged with the reason and counted.
        references: The predictors.
        config: What is measured.
        report: Called after every picture with the number of pictures done and the picture's rows.

    Raises:
        CheckpointError: A predictor cannot be loaded.
        ConfigError: A predictor has fewer stages than are asked for.
    """
    warm_up("predict")
    control = config.control()
    contestants = [Contestant.find(reference, config.stages, config.gaussians, control) for reference in references]
    first = references[0]
    if config.baseline and first.name != GRID:
        grid = GridPredictor(first.patch_size)
        contestants.append(replace(contestants[0], name=GRID, predictor=grid))
    warm = False

    def measure(key: str, rgb: np.ndarray) -> Rows:
        nonlocal warm
        image = image_tensor(rgb)
        if not warm:  # the first call has costs of its own, such as loading kernels
            _measure_all("", image[:, :WARM_UP_SIDE, :WARM_UP_SIDE], contestants, config)
            warm = True
        return _measure_all(key, image, contestants, config)

    with limit_torch(config.threads):
        return measure_pictures(pictures[: config.limit], measure, report)


class _Diverged(Exception):
    """A contestant gave numbers that are not finite."""

    def __init__(self, name: str, cause: Exception) -> None:
        super().__init__(f"{name}: {cause}")
        self.name = name


def measure_pictures(
    pictures: Sequence[Picture],
    measure: Callable[[str, np.ndarray], Rows],
    report: Callable[[int, Rows], None],
) -> Evaluation:
    """Measures one picture after the other. One that cannot be used is logged with the reason and counted.

    Args:
        pictures: The pictures.
        measure: Returns the rows of a picture, given its key and its pixels, shape (H, W, 3), uint8.
        report: Called after every picture with the number of pictures done and the picture's rows.
    """
    evaluation = Evaluation()
    for number, picture in enumerate(pictures):
        try:
            rows = measure(*picture.read())
        except Rejected as rejection:
            rows = _reject(evaluation, picture, rejection)
        except _Diverged as error:
            evaluation.diverged[error.name] += 1
            rows = _reject(evaluation, picture, Rejected(Reason.NON_FINITE, str(error)))
        except (InvalidGaussiansError, NonFiniteLossError) as error:
            rows = _reject(evaluation, picture, Rejected(Reason.NON_FINITE, str(error)))
        evaluation.rows += rows
        logger.info("%d of %d pictures done: %s", number + 1, len(pictures), picture.source)
        report(number + 1, rows)
    return evaluation


def _reject(evaluation: Evaluation, picture: Picture, rejection: Rejected) -> Rows:
    evaluation.rejected[rejection.reason] += 1
    logger.warning("skipped: %s: %s", picture.source, rejection)
    return []


def _measure_all(key: str, image: Tensor, contestants: Sequence[Contestant], config: EvaluateConfig) -> Rows:
    """The rows of one image, from every contestant and from the plain grid."""
    rows = []
    for contestant in contestants:
        try:
            rows += _measure(key, image, contestant, config)
        except (InvalidGaussiansError, NonFiniteLossError) as error:
            raise _Diverged(contestant.name, error) from None
    if config.baseline:
        _, height, width = image.shape
        patch_size = nearest_patch_size(height, width, rows[0]["num_gaussians"])
        grid = GridPredictor(patch_size)
        plain = Contestant(PLAIN_GRID, grid, 1, None, _EVERYWHERE, OptimizeConfig)
        rows += _measure(key, image, plain, config)
    return rows


def nearest_patch_size(height: int, width: int, num_gaussians: int) -> int:
    """The patch size of the plain grid whose number of Gaussians is nearest to `num_gaussians`, by their ratio."""

    def distance(patch_size: int) -> float:
        rows, columns = grid_shape(height, width, patch_size)
        return abs(math.log(rows * columns / max(1, num_gaussians)))

    return min(range(1, max(height, width) + 1), key=distance)


def _measure(key: str, image: Tensor, contestant: Contestant, config: EvaluateConfig) -> Iterator[dict[str, Any]]:
    """A row for every number of refinement steps."""
    _, height, width = image.shape
    patch_size = contestant.predictor.patch_size
    begin = time.perf_counter()
    stages = contestant.predict(image, config.threads)
    predict_seconds = time.perf_counter() - begin
    predicted, anchor = all_predicted(stages)
    for steps in config.refine:
        begin = time.perf_counter()
        raw = contestant.refine(predicted, anchor, image, steps, config.learning_rate_factor, config.threads)
        refine_seconds = time.perf_counter() - begin if steps else 0.0
        gaussians = activate(raw, anchor, patch_size)
        drawn = render(gaussians, height, width, threads=config.threads)
        yield {
            "key": key,
            "predictor": contestant.name,
            "patch_size": patch_size,
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
