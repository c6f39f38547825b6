"""A start without a network: one round Gaussian per patch, coloured from the image in closed form.

Everything else (a predictor's output, an optimised fit) is judged by what it adds to this start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from air.gaussians import MIN_RAW_SCALE, RAW_CHANNELS, SUPPORT_CUTOFF, anchors, grid_shape

RAW_SCALE = -0.5
"""Raw scale of the start; docs/optimizer.md compares others."""

LARGEST = 0.99
"""Colours and offsets are kept inside tanh's range by this much: its slope there still lets an optimiser move them."""

_RIDGE = 1e-3
"""Share of the largest diagonal added to the normal equations: they stay solvable when Gaussians nearly coincide."""

_BLOCK, _MARGIN = 192, 32
"""Patches along an axis that are solved for together, and those beside them that are taken into account."""


def _solvers(size: int, patch_size: int, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Pixels along an axis and the matrix that turns values there into the weights of the next patches, in order.

    One for the whole axis if it is short. What a weight owes to pixels further away than the margin is below float32's
    rounding, so the memory for a long axis need not grow with the square of its length.
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
    """The matrix (patches, size) that turns values along an axis into the least-squares weights of its Gaussians.

    It depends on no pixel, so the next image of the same size need not solve again.
    """
    centres = anchors(1, size, patch_size, torch.float64)[:, 0]
    pixels = torch.arange(size, dtype=centres.dtype)
    basis = torch.exp(-0.5 * ((pixels[:, None] - centres[None, :]) / scale).square())
    basis = torch.where(basis >= SUPPORT_CUTOFF, basis, 0)
    normal = basis.T @ basis
    normal += _RIDGE * normal.diagonal().max() * torch.eye(len(centres), dtype=centres.dtype)
    weights = torch.linalg.solve(normal, basis.T)
    # They die away exponentially, and products with subnormal numbers take ten times as long.
    return torch.where(weights.abs() > 1e-12 * weights.abs().max(), weights, 0)


def grid_initialization(residual: Tensor, patch_size: int, *, raw_scale: float = RAW_SCALE) -> Tensor:
    """Raw Gaussians (N, 8), row-major over patches, whose sum approximates an image or a signed residual.

    Each is round and sits on its anchor (method.md section 2). On a grid, round Gaussians of one size are products of
    a function of x and one of y, so the colours that fit the residual best in the least-squares sense come from two
    small linear systems, one per axis: C = S_y · residual · S_xᵀ.

    Args:
        residual: What to approximate, shape (3, height, width), any sign.
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
        [solve_y.to(residual) @ residual[:, pixels] for pixels, solve_y in _solvers(height, patch_size, scale)], dim=1
    )
    colour = torch.cat(
        [colour[:, :, pixels] @ solve_x.to(residual).T for pixels, solve_x in _solvers(width, patch_size, scale)], dim=2
    )
    raw = torch.zeros(rows * columns, RAW_CHANNELS, dtype=residual.dtype, device=residual.device)
    raw[:, 2:4] = raw_scale
    raw[:, 5:8] = torch.atanh(colour.clamp(-LARGEST, LARGEST)).reshape(3, -1).T
    return raw


def check_residual(residual: Tensor, patch_size: int) -> None:
    """Raises ValueError for what is no image of shape (3, height, width), or no patch size."""
    if residual.ndim != 3 or residual.shape[0] != 3 or 0 in residual.shape:
        raise ValueError(f"the residual must be an image of shape (3, height, width), got {tuple(residual.shape)}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
