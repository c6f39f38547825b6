"""How close an image is to its original, in the units that papers report."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HIGHEST_PSNR = 100.0
"""Decibels; no error at all counts as this, so that means over images stay numbers."""


def psnr_of(squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB for a mean squared error of values in [0, 1], at most `HIGHEST_PSNR`."""
    return min(HIGHEST_PSNR, -10 * math.log10(squared_error)) if squared_error > 0 else HIGHEST_PSNR


def psnr(image: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of an image, clamped to [0, 1], against its target; shapes alike.

    Raises:
        ValueError: The shapes differ.
    """
    if image.shape != target.shape:
        raise ValueError(f"image and target differ in shape: {tuple(image.shape)} and {tuple(target.shape)}")
    difference = image.detach().clamp(0, 1).to(torch.float64) - target.to(torch.float64)
    return psnr_of(float(difference.square().mean()))
