"""PSNR and MS-SSIM of an image against its original, as papers report them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from air.loss.reference import SSIM_C1, SSIM_C2, WINDOW_SIGMA, WINDOW_SIZE

HIGHEST_PSNR = 100.0
"""Decibels. An image without any error gets this value, so that means over images stay finite."""

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the scales, finest first (Wang, Simoncelli and Bovik 2003)."""


def psnr_of(squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB for a mean squared error of values in [0, 1], at most `HIGHEST_PSNR`."""
    return min(HIGHEST_PSNR, -10 * math.log10(squared_error)) if squared_error > 0 else HIGHEST_PSNR


def psnr(image: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of an image, clamped to [0, 1], against its target of the same shape.

    Raises:
        ValueError: The shapes differ.
    """
    _check_shapes(image, target)
    difference = image.detach().clamp(0, 1).to(torch.float64) - target.to(torch.float64)
    return psnr_of(float(difference.square().mean()))


def ms_ssim(image: Tensor, target: Tensor) -> float:
    """Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003) of an image, clamped to [0, 1]; 1 if equal.

        product over scales of contrast-structure^weight, and luminance^weight of the coarsest

    - Window: 11 x 11 Gaussian, sigma 1.5, at all positions where it lies within the image; biased moments.
    - The next scale is the mean of 2 x 2 pixels; at an odd border, the mean of the pixels that exist.
    - Each channel is measured by itself, then averaged; a negative contrast-structure counts as 0.
    - There are five scales if the short side is above 160 pixels, else as many as hold the window, with weights divided
      by their sum. An image smaller than the window has one scale, and the window is cropped to it.

    Args:
        image: Shape (3, H, W).
        target: The original, same shape, values in [0, 1].

    Raises:
        ValueError: The shapes differ.
    """
    _check_shapes(image, target)
    x = image.detach().clamp(0, 1).to(torch.float32)
    y = target.to(torch.float32)
    weights = MS_SSIM_WEIGHTS[: _scales(*image.shape[-2:])]
    total = sum(weights)
    product = torch.ones(len(x), dtype=torch.float64, device=x.device)
    for scale, weight in enumerate(weights):
        if scale:
            x, y = (functional.avg_pool2d(each, 2, ceil_mode=True) for each in (x, y))
        similarity, contrast = _similarities(x, y)
        term = similarity if scale == len(weights) - 1 else contrast
        product *= term.clamp(min=0) ** (weight / total)
    return float(product.mean())


def _scales(height: int, width: int) -> int:
    """The number of scales, at most five, whose short side holds the window."""
    side = min(height, width)
    count = 1
    while count < len(MS_SSIM_WEIGHTS) and (side := (side + 1) // 2) >= WINDOW_SIZE:
        count += 1
    return count


def _similarities(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean SSIM and mean contrast-structure of each channel, both of shape (C,), float64; x and y are (C, H, W)."""
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    variance_x = _window_mean(x * x) - mean_x * mean_x
    variance_y = _window_mean(y * y) - mean_y * mean_y
    covariance = _window_mean(x * y) - mean_x * mean_y
    contrast = (2 * covariance + SSIM_C2) / (variance_x + variance_y + SSIM_C2)
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x * mean_x + mean_y * mean_y + SSIM_C1)
    similarity, contrast = (each.double().mean(dim=(1, 2)) for each in (luminance * contrast, contrast))
    return similarity, contrast


def _window_mean(images: Tensor) -> Tensor:
    """Window means of (C, H, W) wherever the window fits. Adding shifted images is faster than a convolution."""
    for axis in (1, 2):
        weights = _window(images.shape[axis])
        places = images.shape[axis] - len(weights) + 1
        total = torch.zeros_like(images.narrow(axis, 0, places))
        for offset, weight in enumerate(weights):
            total.add_(images.narrow(axis, offset, places), alpha=weight)
        images = total
    return images


def _window(size: int) -> list[float]:
    """The window's weights along an axis of `size` pixels, cropped to the axis; sum 1."""
    length = min(WINDOW_SIZE, size)
    weights = [math.exp(-((index - (length - 1) / 2) ** 2) / (2 * WINDOW_SIGMA**2)) for index in range(length)]
    return [weight / sum(weights) for weight in weights]


def _check_shapes(image: Tensor, target: Tensor) -> None:
    if image.shape != target.shape:
        raise ValueError(f"image and target differ in shape: {tuple(image.shape)} and {tuple(target.shape)}")
