"""A start for later Gaussians without a network: narrow ones where the residual is largest, in closed form.

A residual is fine detail around zero, which a grid of wide Gaussians cannot meet. A matched filter tells for every
pixel what a narrow one there would take away: its least-squares colour is <residual, w> / <w, w>. The stage loop, where
a patch holds one Gaussian, takes the best pixel of each patch; growth takes the best of the image. docs/optimizer.md
compares them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from air.compute.backends import has_cpu_kernels
from air.fitting.grid import LARGEST, check_residual
from air.gaussians import MIN_RAW_SCALE, RAW_CHANNELS, anchors, grid_shape

RAW_SCALE = -3.0
GAIN = 0.5
"""Share of the least-squares colour that a residual's Gaussian takes: neighbours explain some of the same pixels."""


def residual_initialization(residual: Tensor, patch_size: int) -> Tensor:
    """Raw Gaussians (N, 8), row-major over patches, for what earlier Gaussians left over: the best of each patch.

    Args:
        residual: Image minus canvas, shape (3, height, width), any sign.
        patch_size: Pixels between anchors, at least 1.

    Raises:
        ValueError: As `grid_initialization`.
    """
    colours = _least_squares_colours(residual, patch_size)
    _, height, width = residual.shape
    rows, columns = grid_shape(height, width, patch_size)
    # Pixels beyond the border hold nothing, so a patch that is cut off never chooses one.
    taken = _energy(colours)
    padded = F.pad(taken, (0, columns * patch_size - width, 0, rows * patch_size - height))
    tiles = padded.reshape(rows, patch_size, columns, patch_size).transpose(1, 2)
    chosen = tiles.reshape(rows * columns, patch_size * patch_size).argmax(dim=1)
    patch = torch.arange(rows * columns, device=residual.device)
    x = patch % columns * patch_size + chosen % patch_size
    y = patch // columns * patch_size + chosen // patch_size
    return _raw_at(x, y, colours, patch_size)[0]


def residual_peaks(residual: Tensor, patch_size: int, count: int) -> tuple[Tensor, Tensor]:
    """Up to `count` raw Gaussians (n, 8) and their patches' anchors (n, 2) for what earlier Gaussians left over.

    They sit on the largest peaks of the image, where a Gaussian takes away more than at any of the eight pixels around;
    on other pixels only when there are no more peaks, and nowhere that the residual is zero. A patch may get several.

    Args:
        residual: Image minus canvas, shape (3, height, width), any sign.
        patch_size: Pixels between anchors, at least 1.
        count: The most Gaussians, at least 0.

    Raises:
        ValueError: As `grid_initialization`.
    """
    colours = _least_squares_colours(residual, patch_size)
    width = residual.shape[2]
    taken = _energy(colours)
    is_peak = taken >= F.max_pool2d(taken[None, None], 3, stride=1, padding=1)[0, 0]
    rank = torch.where(is_peak & (taken > 0), taken + taken.max(), taken).flatten()
    chosen = rank.topk(min(count, int((taken > 0).sum()))).indices
    return _raw_at(chosen % width, chosen // width, colours, patch_size)


def _least_squares_colours(residual: Tensor, patch_size: int) -> Tensor:
    """The colour with which one narrow Gaussian at a pixel explains most of the residual, shape (3, height, width)."""
    check_residual(residual, patch_size)
    scale = patch_size * torch.tensor(RAW_SCALE).sigmoid().item() + MIN_RAW_SCALE
    radius = math.ceil(3 * scale)
    taps = [math.exp(-0.5 * (distance / scale) ** 2) for distance in range(radius + 1)]
    energy = 2 * sum(tap * tap for tap in taps) - 1
    scaled = [tap / energy for tap in taps]
    if has_cpu_kernels(residual):
        from air.fitting.filter_cpu import filter_symmetrically

        return torch.from_numpy(filter_symmetrically(residual.detach().contiguous().numpy(), scaled))
    return _symmetric_filter(_symmetric_filter(residual, scaled, 1), scaled, 2)


def _energy(colours: Tensor) -> Tensor:
    """The squared length of every pixel's colour, (height, width), plane by plane: torch's sum over them is slow."""
    red, green, blue = colours
    return torch.addcmul(torch.addcmul(red * red, green, green), blue, blue)


def _symmetric_filter(image: Tensor, taps: Sequence[float], dim: int) -> Tensor:
    """Convolution along one axis with taps[|distance|], zeros beyond the border."""
    size, radius = image.shape[dim], len(taps) - 1
    padded = F.pad(image, (radius, radius) if dim == 2 else (0, 0, radius, radius))
    filtered = taps[0] * image
    for distance in range(1, radius + 1):
        for start in (radius - distance, radius + distance):
            filtered.add_(padded.narrow(dim, start, size), alpha=taps[distance])
    return filtered


def _raw_at(x: Tensor, y: Tensor, colours: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Raw Gaussians (n, 8) at n pixels, with these pixels' colours, and the anchors (n, 2) of their patches."""
    _, height, width = colours.shape
    _, columns = grid_shape(height, width, patch_size)
    patch = y // patch_size * columns + x // patch_size
    anchor = anchors(height, width, patch_size, colours.dtype).to(colours.device)[patch]
    offset = (torch.stack([x, y], dim=1) - anchor) / patch_size
    raw = torch.zeros(len(x), RAW_CHANNELS, dtype=colours.dtype, device=colours.device)
    raw[:, 0:2] = torch.atanh(offset.clamp(-LARGEST, LARGEST))
    raw[:, 2:4] = RAW_SCALE
    raw[:, 5:8] = torch.atanh((GAIN * colours[:, y, x].T).clamp(-LARGEST, LARGEST))
    return raw, anchor
