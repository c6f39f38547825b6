"""Checks and converts what callers pass, images of several kinds and counts, and images that they get back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def check_counts(**counts: tuple[int, int]) -> None:
    """Checks named pairs (count, least).

    Raises:
        ValueError: A count is not a whole number, or is below its least. The message names the first such count.
    """
    for name, (count, least) in counts.items():
        if not isinstance(count, int) or count < least:
            raise ValueError(f"{name} must be a whole number, at least {least}, got {count}")


def image_tensor(image: Any) -> Tensor:
    """An image as a tensor (3, height, width) with values in [0, 1], float32 unless it is a floating tensor already.

    Accepts a uint8 array (height, width, 3), a PIL image (converted to RGB), or such a tensor.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(image, Tensor):
        if (
            image.ndim != 3
            or image.shape[0] != 3
            or 0 in image.shape
            or image.dtype not in (torch.float32, torch.float64)
        ):
            raise ValueError(
                f"an image tensor must be float32 or float64 of shape (3, height, width), got {image.dtype} "
                f"{tuple(image.shape)}"
            )
        image = image.detach()
        low, high = image.min().item(), image.max().item()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"an image tensor's values must be in [0, 1], got {low} to {high}")
        return image.contiguous()
    if hasattr(image, "convert"):
        image = np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        described = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"an image must be uint8 (height, width, 3), a PIL image or a tensor, got {described}")
    if 0 in image.shape:
        raise ValueError(f"an image must have pixels, got shape {image.shape}")
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(torch.float32) / 255


def to_levels(image: Tensor) -> NDArray[np.uint8]:
    """An image (3, height, width) in 8 bits a channel, shape (height, width, 3): the reverse of `image_tensor`.

    Values are clamped to [0, 1] and rounded to the nearest level, as `air.rendering.cpu.draw_levels` does.
    """
    levels = (image.detach().clamp(0, 1) * 255 + 0.5).to(torch.uint8)
    return levels.permute(1, 2, 0).cpu().numpy()
