"""Predicting in stages without optimising."""

from __future__ import annotations

from torch import Tensor

from air.optimization.config import OptimizeConfig
from air.predictor.base import Predictor
from air.stages.control import StageControl
from air.stages.loop import StageResult, run_stages


def predict(
    image: Tensor,
    predictor: Predictor,
    num_stages: int,
    *,
    control: StageControl | None = None,
    budget: int | None = None,
    backend: str = "auto",
    threads: int = 1,
) -> list[StageResult]:
    """Predicts stage after stage, each on the canvas that the predictions of earlier stages draw.

    Args:
        image: Shape (3, H, W), float32 in [0, 1].
        predictor: Predicts every stage.
        num_stages: Largest number of stages; fewer if no patch is bad any more.
        control: As for `air.stages.loop.run_stages`, like all further arguments.
        budget: Largest number of Gaussians, all stages together.
        backend: Renders the canvases.
        threads: CPU threads at most.

    Returns:
        One result per stage that added Gaussians. `target` is `predicted`; loss and PSNR are NaN.

    Raises:
        InvalidGaussiansError: A predicted number is not finite.
        ValueError: The budget is below 1.

    Example:
        >>> import torch
        >>> from air.predictor.load import load_predictor
        >>> image = torch.linspace(0, 1, 28).expand(3, 14, 28)
        >>> [len(stage) for stage in predict(image, load_predictor("grid"), 2, budget=10)]
        [8, 2]
    """
    return list(
        run_stages(
            image,
            predictor,
            [OptimizeConfig(steps=0)] * num_stages,
            control=control,
            canvas="predicted",
            budget=budget,
            judge=False,
            backend=backend,
            threads=threads,
        )
    )
