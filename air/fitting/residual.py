"""A start for later Gaussians without a network: narrow ones where the residual is largest, in closed form.

A residual is fine detail around zero, which a grid of wide Gaussians cannot represent. A matched filter gives for every
pixel the least-squares colour of a narrow Gaussian there, <residual, w> / <w, w>, and with it how much of the residual
it removes. In the stage loop a patch holds one Gaussian, at its best pixel; growth takes the best pixels of the image.
docs/optimizer.md compares them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from air.compute.backends import has_cpu_kernels
from air.fitting.grid import LARGEST, check_residual
from air.gaussians import COLOUR, MIN_RAW_SCALE, OFFSET, RAW_CHANNELS, SCALE, anchors, grid_shape

RAW_SCALE = -3.0
"""Raw number of both scales."""

GAIN = 0.5
"""A new Gaussian gets this fraction of its least-squares colour, since neighbours explain some of the same pixels."""


def residual_initialization(residual: Tensor, patch_size: int) -> Tensor:
    """Raw Gaussians (N, 8) for a residual: in each patch, row-major, the narrow one that removes most of it.

    Args:
        residual: Image minus canvas, shape (3, height, width), any sign.
        patch_size: Pixels between anchors, at least 1.

    Raises:
        ValueError: As `grid_initialization`.
    """
    colours = _least_squares_colours(residual, patch_size)
    _, height, width = residual.shape
    rows, columns = grid_shape(height, width, patch_size)
    # Pixels beyond the border have energy 0, so a patch that the border cuts off never chooses one.
    padded = F.pad(_energy(colours), (0, columns * patch_size - width, 0, rows * patch_size - height))
    tiles = padded.reshape(rows, patch_size, columns, patch_size).transpose(1, 2)
    chosen = tiles.reshape(rows * columns, patch_size * patch_size).argmax(dim=1)
    patch = torch.arange(rows * columns, device=residual.device)
    x = patch % columns * patch_size + chosen % patch_size
    y = patch // columns * patch_size + chosen // patch_size
    return _raw_at(x, y, colours, patch_size)[0]


def residual_peaks(residual: Tensor, patch_size: int, count: int) -> tuple[Tensor, Tensor]:
    """Up to `count` raw Gaussians (n, 8) for a residual, and the anchors (n, 2) of their patches.

    They are centred on the image's largest peaks. A peak is a pixel where a Gaussian removes more of the residual than
    at any of the eight pixels around it. Other pixels follow when there are no more peaks; pixels where the residual is
    zero get none. A patch may get several Gaussians.

    Args:
        residual: Image minus canvas, shape (3, height, width), any sign.
        patch_size: Pixels between anchors, at least 1.
        count: Largest number of Gaussians, at least 0.

    Raises:
        ValueError: As `grid_initialization`.
    """
    colours = _least_squares_colours(residual, patch_size)
    width = residual.shape[2]
    if has_cpu_kernels(colours):
        from air.fitting.filter_cpu import largest_peaks

        chosen = torch.from_numpy(largest_peaks(colours.numpy(), count))
    else:
        chosen = _largest_peaks(colours, count)
    return _raw_at(chosen % width, chosen // width, colours, patch_size)


def _largest_peaks(colours: Tensor, count: int) -> Tensor:
    """Places among the pixels of the largest peaks of the colours' squared length, then of other pixels above zero."""
    energy = _energy(colours)
    is_peak = energy >= F.max_pool2d(energy[None, None], 3, stride=1, padding=1)[0, 0]
    rank = torch.where(is_peak & (energy > 0), energy + energy.max(), energy).flatten()
    return rank.topk(min(count, int((energy > 0).sum()))).indices


def _least_squares_colours(residual: Tensor, patch_size: int) -> Tensor:
    """For every pixel, the least-squares colour of one narrow Gaussian there, shape (3, height, width)."""
    check_residual(residual, patch_size)
    scale = patch_size * torch.tensor(RAW_SCALE).sigmoid().item() + MIN_RAW_SCALE
    radius = math.ceil(3 * scale)
    taps = [math.exp(-0.5 * (distance / scale) ** 2) for distance in range(radius + 1)]
    energy = 2 * sum(tap * tap for tap in taps) - 1
    scaled = [tap / energy for tap in taps]
    if has_cpu_kernels(residual):
        from air.fitting.filter_cpu import filter_symmetrically

        return torch.from_numpy(filter_symmetrically(residual.detach().contiguous().numpy(), scaled))
    return symmetric_filter(symmetric_filter(residual, scaled, 1), scaled, 2)


def _energy(colours: Tensor) -> Tensor:
    """The squared length of every pixel's colour, (height, width). torch's sum over the channels would be slower."""
    red, green, blue = colours
    return torch.addcmul(torch.addcmul(red * red, green, green), blue, blue)


def symmetric_filter(image: Tensor, taps: Sequence[float], dim: int) -> Tensor:
    """Convolution along one axis with taps[|distance|], zeros beyond the border."""
    size, radius = image.shape[dim], len(taps) - 1
    padded = F.pad(image, (radius, radius) if dim == 2 else (0, 0, radius, radius))
    filtered = taps[0] * image
    for distance in range(1, radius + 1):
        for start in (radius - distance, radius + distance):
            filtered.add_(padded.narrow(dim, start, size), alpha=taps[distance])
    return filtered


def _raw_at(x: Tensor, y: Tensor, colours: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Narrow raw Gaussians (n, 8) at pixels (x, y), with `GAIN` times their colours, and anchors (n, 2)."""
    _, height, width = colours.shape
    _, columns = grid_shape(height, width, patch_size)
    patch = y // patch_size * columns + x // patch_size
    anchor = anchors(height, width, patch_size, colours.dtype).to(colours.device)[patch]
    offset = (torch.stack([x, y], dim=1) - anchor) / patch_size
    raw = torch.zeros(len(x), RAW_CHANNELS, dtype=colours.dtype, device=colours.device)
    raw[:, OFFSET] = torch.atanh(offset.clamp(-LARGEST, LARGEST))
    raw[:, SCALE] = RAW_SCALE
    raw[:, COLOUR] = torch.atanh((GAIN * colours[:, y, x].T).clamp(-LARGEST, LARGEST))
    return raw, anchor
