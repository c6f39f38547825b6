"""A start without a network: one round Gaussian per patch, coloured from the image in closed form.

Everything else (a predictor's output, an optimised fit) is judged by what it adds to this start.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from air.gaussians import MIN_RAW_SCALE, RAW_CHANNELS, anchors, grid_shape

RAW_SCALE = -0.5
LARGEST_COLOUR = 0.99
"""Colours are kept inside tanh's range by this much, where its slope still lets an optimiser move them."""


def _overlap(size: int, patch_size: int, scale: float) -> Tensor:
    """Σ exp(-d²/2 scale²) over the grid's centres, at each centre along one axis of `size` pixels."""
    count = math.ceil(size / patch_size)
    middle = (patch_size - 1) / 2
    centres = (torch.arange(count, dtype=torch.float64) * patch_size + middle).clamp(max=size - 1)
    distance = centres[:, None] - centres[None, :]
    return torch.exp(-0.5 * (distance / scale).square()).sum(dim=1)


def grid_initialization(residual: Tensor, patch_size: int, *, raw_scale: float = RAW_SCALE) -> Tensor:
    """Raw Gaussians (N, 8), row-major over patches, whose sum approximates an image or a signed residual.

    Each is round, sits on its anchor, and takes the residual's colour there divided by the sum of all Gaussians'
    weights at that place, so that a constant image is reproduced (method.md sections 2 and 10).

    Args:
        residual: What to approximate, shape (3, height, width), any sign.
        patch_size: Pixels between anchors, at least 1.
        raw_scale: The raw number of both scales.

    Raises:
        ValueError: The residual is not of shape (3, height, width), or the patch size is below 1.
    """
    if residual.ndim != 3 or residual.shape[0] != 3 or 0 in residual.shape:
        raise ValueError(f"the residual must be an image of shape (3, height, width), got {tuple(residual.shape)}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    _, height, width = residual.shape
    rows, columns = grid_shape(height, width, patch_size)
    scale = patch_size * torch.tensor(raw_scale).sigmoid().item() + MIN_RAW_SCALE
    overlap = _overlap(height, patch_size, scale)[:, None] * _overlap(width, patch_size, scale)[None, :]
    # grid_sample's coordinates: -1 and 1 are the outermost pixels; an axis of one pixel has only 0.
    extent = torch.tensor([max(width - 1, 1), max(height - 1, 1)], dtype=residual.dtype)
    places = anchors(height, width, patch_size, residual.dtype).to(residual.device) / extent.to(residual.device)
    sampled = functional.grid_sample(residual[None], places[None, None] * 2 - 1, align_corners=True)[0, :, 0]
    colour = sampled.reshape(3, rows, columns) / overlap.to(residual)
    raw = torch.zeros(rows * columns, RAW_CHANNELS, dtype=residual.dtype, device=residual.device)
    raw[:, 2:4] = raw_scale
    raw[:, 5:8] = torch.atanh(colour.clamp(-LARGEST_COLOUR, LARGEST_COLOUR)).reshape(3, -1).T
    return raw
