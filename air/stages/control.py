"""Stage control: finds the patches that are still bad (method.md section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from air.compute.backends import has_cpu_kernels
from air.gaussians import grid_shape
from air.loss.reference import SSIM_C1, SSIM_C2


@dataclass(frozen=True)
class StageControl:
    """The bounds of stage control. A patch is bad if either error is above its bound (method.md section 3).

    Attributes:
        max_mse: Bound on the mean squared error over the patch's pixels and channels; 10^-3.5 is 35 dB.
        max_dssim: Bound on 1 - SSIM, from plain means and variances over the patch's pixels, averaged over channels.
    """

    max_mse: float = 10**-3.5
    max_dssim: float = 0.05


def active_patches(canvas: Tensor, image: Tensor, patch_size: int, control: StageControl) -> Tensor:
    """Finds the patches that are still bad and get another Gaussian.

    Args:
        canvas: Unclamped render of the Gaussians so far, shape (3, H, W).
        image: The image, shape (3, H, W).
        patch_size: Pixels.
        control: Bounds on the errors.

    Returns:
        Boolean, shape (rows · columns,), row-major. Both images are continued by their border to whole patches.
    """
    return bad_patches(*patch_errors(canvas, image, patch_size), control)


def bad_patches(mse: Tensor, dssim: Tensor, control: StageControl) -> Tensor:
    """Whether each patch is bad, boolean, by its two errors."""
    return (mse > control.max_mse) | (dssim > control.max_dssim)


def largest_errors(mse: Tensor, among: Tensor, count: int) -> Tensor:
    """The `count` patches with the largest error in the mask `among`. Of two with the same error, the first wins."""
    order = torch.where(among, mse, -1.0).argsort(descending=True, stable=True)
    kept = torch.zeros_like(among)
    kept[order[:count]] = True
    return kept & among


def patch_errors(canvas: Tensor, image: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Mean squared error and 1 - SSIM of every patch (method.md section 3), both (rows · columns,), float64.

    On the CPU in float32 a compiled kernel computes them; elsewhere torch, which is the definition.
    """
    if has_cpu_kernels(image, canvas):
        from air.stages import patches_cpu

        mse, dssim = patches_cpu.patch_errors(
            canvas.detach().contiguous().numpy(), image.detach().contiguous().numpy(), patch_size
        )
        return torch.from_numpy(mse), torch.from_numpy(dssim)
    x = _patches(canvas.detach(), patch_size)
    y = _patches(image.detach(), patch_size)
    mse = (x - y).square().mean(dim=(0, 2))
    mean_x, mean_y = x.mean(dim=2), y.mean(dim=2)
    variance_x = x.square().mean(dim=2) - mean_x.square()
    variance_y = y.square().mean(dim=2) - mean_y.square()
    covariance = (x * y).mean(dim=2) - mean_x * mean_y
    ssim = ((2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)) / (
        (mean_x.square() + mean_y.square() + SSIM_C1) * (variance_x + variance_y + SSIM_C2)
    )
    return mse, 1 - ssim.mean(dim=0)


def _patches(image: Tensor, patch_size: int) -> Tensor:
    """(3, patches, pixels of a patch), in float64, since variances are differences of large numbers."""
    _, height, width = image.shape
    rows, columns = grid_shape(height, width, patch_size)
    padding = (0, columns * patch_size - width, 0, rows * patch_size - height)
    padded = F.pad(image.double()[None], padding, mode="replicate")[0]
    tiles = padded.reshape(3, rows, patch_size, columns, patch_size).permute(0, 1, 3, 2, 4)
    return tiles.reshape(3, rows * columns, patch_size * patch_size)
