"""The errors of an image's patches in a compiled kernel.

Patches beyond the border are filled by replicating it. Images are float32 arrays (3, height, width).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from air.compute.compile import KernelSet, kernel
from air.compute.planes import FloatArray
from air.loss.reference import SSIM_C1, SSIM_C2


@kernel
def measure_patches(drawn, image, patch_size, c1, c2, mse, dssim):
    """Mean squared error and 1 - SSIM (method.md section 3) of all patches, row-major, into two float64 arrays.

    Sums are float64, since a variance is a difference of large numbers.
    """
    channels, height, width = image.shape
    rows = -(-height // patch_size)
    columns = -(-width // patch_size)
    weight = 1.0 / (patch_size * patch_size)
    for row in range(rows):
        for column in range(columns):
            squared = 0.0
            similar = 0.0
            for channel in range(channels):
                sum_x = 0.0
                sum_y = 0.0
                sum_xx = 0.0
                sum_yy = 0.0
                sum_xy = 0.0
                for i in range(row * patch_size, (row + 1) * patch_size):
                    inside = min(i, height - 1)
                    for j in range(column * patch_size, (column + 1) * patch_size):
                        x = np.float64(drawn[channel, inside, min(j, width - 1)])
                        y = np.float64(image[channel, inside, min(j, width - 1)])
                        sum_x += x
                        sum_y += y
                        sum_xx += x * x
                        sum_yy += y * y
                        sum_xy += x * y
                        squared += (x - y) * (x - y)
                mean_x = sum_x * weight
                mean_y = sum_y * weight
                spread = (sum_xx + sum_yy) * weight - mean_x * mean_x - mean_y * mean_y
                covariance = sum_xy * weight - mean_x * mean_y
                similar += ((2.0 * mean_x * mean_y + c1) * (2.0 * covariance + c2)) / (
                    (mean_x * mean_x + mean_y * mean_y + c1) * (spread + c2)
                )
            patch = row * columns + column
            mse[patch] = squared * weight / channels
            dssim[patch] = 1.0 - similar / channels


def patch_errors(drawn: FloatArray, image: FloatArray, patch_size: int) -> tuple[NDArray[np.float64], ...]:
    """Mean squared error and 1 - SSIM of every patch of two images of shape (3, height, width), row-major.

    Raises:
        ValueError: The images are not of one size.
    """
    if drawn.shape != image.shape:
        raise ValueError(f"images {drawn.shape} and {image.shape} are not of one size")
    _, height, width = image.shape
    mse = np.empty(-(-height // patch_size) * -(-width // patch_size))
    dssim = np.empty_like(mse)
    measure_patches(drawn, image, patch_size, SSIM_C1, SSIM_C2, mse, dssim)
    return mse, dssim


def _use_each() -> None:
    image = np.zeros((3, 1, 1), np.float32)
    patch_errors(image, image, 1)


KERNELS = KernelSet((measure_patches,), _use_each, seconds=1)
"""The kernel of stage control."""
