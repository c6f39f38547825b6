"""Validation of a rule: the PSNR that fits by it reach on a fixed set of pictures, after several numbers of updates."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor

from air.fitting.fit import fit
from air.optimization.rule import LearnedRule
from pipeline.rules.config import RunConfig


def validate_rule(rule: LearnedRule, pictures: Sequence[Tensor], config: RunConfig) -> dict[str, float]:
    """Mean PSNR in dB of the fits of all pictures.

    Args:
        rule: The rule; it stays as it is.
        pictures: Images of shape (3, H, W).
        config: Numbers of updates, pixels for each Gaussian, and how fits grow.

    Returns:
        `valid_psnr_N` for each number N of updates, and their mean as `valid_psnr`.
    """
    frozen = copy.deepcopy(rule).eval().requires_grad_(False)
    reached = {}
    for steps in config.valid_steps:
        total = 0.0
        for picture in pictures:
            _, height, width = picture.shape
            budget = max(1, round(height * width / config.valid_pixels_per_gaussian))
            fitted = fit(picture, steps, num_gaussians=budget, growth=config.growth(), rule=frozen, device="cpu")
            total += float(fitted.trajectory.psnr[-1])
        reached[f"valid_psnr_{steps}"] = total / len(pictures)
    return {"valid_psnr": sum(reached.values()) / len(reached), **reached}
