"""The training loss as plain, differentiable torch: the definition that fused kernels are held against.

    loss = 0.7 · L1 + 0.3 · (1 - SSIM)                                       (method.md section 5)

SSIM is that of Wang et al. 2004 with an 11 × 11 Gaussian window (σ 1.5), zero padding, per channel, biased moments,
and the mean over all pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

L1_WEIGHT = 0.7
SSIM_WEIGHT = 0.3
SSIM_C1 = 0.01**2
SSIM_C2 = 0.03**2
MIN_MEAN_ERROR = 1e-6
"""Mean differences from the target below this one count as it, where the squared error's gradient is scaled."""

WINDOW_SIZE = 11
WINDOW_SIGMA = 1.5


def window_weights() -> NDArray[np.float64]:
    """The SSIM window along one axis, shape (11,), sum 1."""
    distance = np.arange(WINDOW_SIZE) - WINDOW_SIZE // 2
    weights = np.exp(-(distance**2) / (2 * WINDOW_SIGMA**2))
    return weights / weights.sum()


def _blur(images: Tensor) -> Tensor:
    """Convolution of (B, C, H, W) with the window, zero-padded."""
    channels = images.shape[1]
    window = torch.as_tensor(window_weights(), dtype=images.dtype, device=images.device)
    reach = WINDOW_SIZE // 2
    columns = window.reshape(1, 1, -1, 1).expand(channels, 1, -1, 1)
    rows = window.reshape(1, 1, 1, -1).expand(channels, 1, 1, -1)
    blurred = functional.conv2d(images, columns, padding=(reach, 0), groups=channels)
    return functional.conv2d(blurred, rows, padding=(0, reach), groups=channels)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Mean structural similarity of two images of shape (3, H, W) or (B, 3, H, W), values about [0, 1]; a scalar.

    Raises:
        ValueError: The shapes differ, or are not those of images.
    """
    _check_images(x, y)
    if x.ndim == 3:
        x, y = x[None], y[None]
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x * mean_x
    variance_y = _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x * mean_x + mean_y * mean_y + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (variance_x + variance_y + SSIM_C2)
    return (luminance * structure).mean()


def loss(image: Tensor, target: Tensor) -> Tensor:
    """0.7 · mean |image - target| + 0.3 · (1 - SSIM), a scalar; shapes and errors as `ssim`."""
    _check_images(image, target)
    return L1_WEIGHT * (image - target).abs().mean() + SSIM_WEIGHT * (1 - ssim(image, target))


def _check_images(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.ndim not in (3, 4):
        raise ValueError(
            f"images must have one shape, (3, H, W) or (B, 3, H, W), got {tuple(x.shape)}, {tuple(y.shape)}"
        )
