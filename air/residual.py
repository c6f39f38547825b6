"""A start for later stages without a network: narrow Gaussians where the residual is largest, in closed form."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from air.gaussians import MIN_RAW_SCALE, RAW_CHANNELS, anchors, grid_shape
from air.grid import LARGEST, check_residual

RAW_SCALE = -3.0
GAIN = 0.5
"""Share of the least-squares colour that a residual's Gaussian takes: neighbours explain some of the same pixels."""


def residual_initialization(residual: Tensor, patch_size: int) -> Tensor:
    """Raw Gaussians (N, 8), row-major over patches, for what earlier Gaussians left over.

    A residual is fine detail around zero, which a grid of wide Gaussians cannot meet. So each patch gets a narrow one,
    at that of its pixels where it takes away most: a matched filter gives its least-squares colour at every pixel,
    <residual, w> / <w, w>, and the largest wins. docs/optimizer.md has it beside the plain grid.

    Args:
        residual: Image minus canvas, shape (3, height, width), any sign.
        patch_size: Pixels between anchors, at least 1.

    Raises:
        ValueError: As `grid_initialization`.
    """
    check_residual(residual, patch_size)
    _, height, width = residual.shape
    rows, columns = grid_shape(height, width, patch_size)
    scale = patch_size * torch.tensor(RAW_SCALE).sigmoid().item() + MIN_RAW_SCALE
    radius = math.ceil(3 * scale)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / scale).square()).to(residual)
    filtered = F.conv2d(residual[:, None], taps[None, None, None, :], padding=(0, radius))
    filtered = F.conv2d(filtered, taps[None, None, :, None], padding=(radius, 0))[:, 0]
    best = filtered / taps.square().sum().square()

    # Pixels beyond the border hold nothing, so a patch that is cut off never chooses one.
    padded = F.pad(best, (0, columns * patch_size - width, 0, rows * patch_size - height))
    tiles = padded.reshape(3, rows, patch_size, columns, patch_size).permute(1, 3, 2, 4, 0)
    tiles = tiles.reshape(rows * columns, patch_size * patch_size, 3)
    chosen = tiles.square().sum(dim=2).argmax(dim=1)
    colour = GAIN * tiles[torch.arange(rows * columns, device=residual.device), chosen]

    patch = torch.arange(rows * columns, device=residual.device)
    x = patch % columns * patch_size + chosen % patch_size
    y = patch // columns * patch_size + chosen // patch_size
    anchor = anchors(height, width, patch_size, residual.dtype).to(residual.device)
    offset = (torch.stack([x, y], dim=1) - anchor) / patch_size
    raw = torch.zeros(rows * columns, RAW_CHANNELS, dtype=residual.dtype, device=residual.device)
    raw[:, 0:2] = torch.atanh(offset.clamp(-LARGEST, LARGEST))
    raw[:, 2:4] = RAW_SCALE
    raw[:, 5:8] = torch.atanh(colour.clamp(-LARGEST, LARGEST))
    return raw
