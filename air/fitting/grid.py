"""A start without a network: one round Gaussian per patch, with least-squares colours in closed form.

It is the baseline for predictions and optimised fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from air.gaussians import COLOUR, MIN_RAW_SCALE, RAW_CHANNELS, SCALE, SUPPORT_CUTOFF, anchors, grid_shape

RAW_SCALE = -0.5
"""Raw number of both scales; docs/optimizer.md compares others."""

LARGEST = 0.99
"""The largest absolute colour and offset (in patches). There, tanh is still steep enough for the optimiser."""

_RIDGE = 1e-3
"""Times the largest diagonal element, this is added to the diagonal of the normal equations. They stay solvable when
Gaussians nearly coincide."""

_BLOCK, _MARGIN = 192, 32
"""Patches along an axis that are solved for together, and patches on either side that take part in the system."""


def axis_solvers(size: int, patch_size: int, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Slices of pixels along an axis, and for each the matrix from their values to the weights of the next patches.

    A short axis has one slice. In a long one, pixels further away than the margin change a weight by less than
    float32's rounding, so the matrices leave them out: memory does not grow with the square of the length.
    """
    patches = math.ceil(size / patch_size)
    if patches <= _BLOCK + 2 * _MARGIN:
        yield slice(0, size), _solver(size, patch_size, scale)
        return
    for first in range(0, patches, _BLOCK):
        last = min(first + _BLOCK, patches)
        begin = max(first - _MARGIN, 0)
        pixels = slice(begin * patch_size, min((last + _MARGIN) * patch_size, size))
        yield pixels, _solver(pixels.stop - pixels.start, patch_size, scale)[first - begin : last - begin]


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _solver(size: int, patch_size: int, scale: float) -> Tensor:
    """The matrix (patches, size) from values along an axis to the least-squares weights of the axis' Gaussians.

    It does not depend on pixel values, so images of one size use one solution.
    """
    centres = anchors(1, size, patch_size, torch.float64)[:, 0]
    pixels = torch.arange(size, dtype=centres.dtype)
    basis = torch.exp(-0.5 * ((pixels[:, None] - centres[None, :]) / scale).square())
    basis = torch.where(basis >= SUPPORT_CUTOFF, basis, 0)
    normal = basis.T @ basis
    normal += _RIDGE * normal.diagonal().max() * torch.eye(len(centres), dtype=centres.dtype)
    weights = torch.linalg.solve(normal, basis.T)
    # Weights decay exponentially with distance, and products with subnormal numbers take ten times as long.
    return torch.where(weights.abs() > 1e-12 * weights.abs().max(), weights, 0)


def grid_initialization(residual: Tensor, patch_size: int, *, raw_scale: float = RAW_SCALE) -> Tensor:
    """Raw Gaussians (N, 8), row-major over patches, whose sum approximates an image or a signed residual.

    Each Gaussian is round and centred on its anchor (method.md section 2). On a grid, round Gaussians of one size are
    products of a function of x and a function of y. The least-squares colours therefore come from two small linear
    systems, one per axis: C = S_y · residual · S_xᵀ.

    Args:
        residual: The image or residual to approximate, shape (3, height, width), any sign.
        patch_size: Pixels between anchors, at least 1.
        raw_scale: The raw number of both scales.

    Raises:
        ValueError: The residual is not of shape (3, height, width), or the patch size is below 1.
    """
    check_residual(residual, patch_size)
    _, height, width = residual.shape
    rows, columns = grid_shape(height, width, patch_size)
    scale = patch_size * torch.tensor(raw_scale, dtype=torch.float64).sigmoid().item() + MIN_RAW_SCALE
    colour = torch.cat(
        [solve_y.to(residual) @ residual[:, pixels] for pixels, solve_y in axis_solvers(height, patch_size, scale)],
        dim=1,
    )
    colour = torch.cat(
        [colour[:, :, pixels] @ solve_x.to(residual).T for pixels, solve_x in axis_solvers(width, patch_size, scale)],
        dim=2,
    )
    raw = torch.zeros(rows * columns, RAW_CHANNELS, dtype=residual.dtype, device=residual.device)
    raw[:, SCALE] = raw_scale
    raw[:, COLOUR] = torch.atanh(colour.clamp(-LARGEST, LARGEST)).reshape(3, -1).T
    return raw


def check_residual(residual: Tensor, patch_size: int) -> None:
    """Raises ValueError unless the residual has shape (3, height, width) and the patch size is at least 1."""
    if residual.ndim != 3 or residual.shape[0] != 3 or 0 in residual.shape:
        raise ValueError(f"the residual must be an image of shape (3, height, width), got {tuple(residual.shape)}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
