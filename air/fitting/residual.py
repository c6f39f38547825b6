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
from air.gaussians import ANGLE, COLOUR, MIN_RAW_SCALE, OFFSET, RAW_CHANNELS, SCALE, anchor_coordinates, grid_shape

RAW_SCALE = -3.0
"""Raw number of both scales of a Gaussian that is round."""

GAIN = 0.5
"""A new Gaussian gets this fraction of its least-squares colour, since neighbours explain some of the same pixels."""


STRETCH = 1.8
"""Where the residual is an edge, this is added to the raw scale along it and taken from the raw scale across it."""

_WINDOW_REACH = 3  # pixels
_NO_EDGE = 1e-4  # Added to the squared slope of the residual: an edge must stand out from this.


def residual_initialization(residual: Tensor, patch_size: int) -> Tensor:
    """Raw Gaussians (N, 8) for a residual: in each patch, row-major, the narrow one that removes most of it.

    Args:
        residual: Image minus canvas, shape (3, height, width), any sign.
        patch_size: Pixels between anchors, at least 1.

    Raises:
        ValueError: As `grid_initialization`.
    """
    check_residual(residual, patch_size)
    colours = _filtered(residual, _matched_filter(patch_size))
    _, height, width = residual.shape
    rows, columns = grid_shape(height, width, patch_size)
    # Pixels beyond the border have energy 0, so a patch that the border cuts off never chooses one.
    padded = F.pad(_energy(colours), (0, columns * patch_size - width, 0, rows * patch_size - height))
    tiles = padded.reshape(rows, patch_size, columns, patch_size).transpose(1, 2)
    chosen = tiles.reshape(rows * columns, patch_size * patch_size).argmax(dim=1)
    patch = torch.arange(rows * columns, device=residual.device)
    x = patch % columns * patch_size + chosen % patch_size
    y = patch // columns * patch_size + chosen // patch_size
    return _raw_at(x, y, colours[:, y, x].T, height, width, patch_size)[0]


def residual_peaks(
    residual: Tensor, patch_size: int, count: int, *, raw_scale: float = RAW_SCALE
) -> tuple[Tensor, Tensor]:
    """Up to `count` raw Gaussians (n, 8) for a residual, and the anchors (n, 2) of their patches.

    They are centred on the image's largest peaks. A peak is a pixel where a Gaussian removes more of the residual than
    at any of the eight pixels around it. Other pixels follow when there are no more peaks; pixels where the residual is
    zero get none. A patch may get several Gaussians.

    Each is stretched along the edge of the residual that it lies on. With the eigenvalues of the structure tensor, an
    edge's coherence is (larger - smaller) / (larger + smaller); the raw scales are `raw_scale` plus `STRETCH` times the
    coherence along the edge, and minus as much across it. The colour falls as the area grows.

    Args:
        residual: Image minus canvas, shape (3, height, width), any sign.
        patch_size: Pixels between anchors, at least 1.
        count: Largest number of Gaussians, at least 0.
        raw_scale: Raw number of both scales of a Gaussian that is round.

    Raises:
        ValueError: As `grid_initialization`.
    """
    check_residual(residual, patch_size)
    _, height, width = residual.shape
    taps = _matched_filter(patch_size, raw_scale)
    if has_cpu_kernels(residual):
        from air.fitting.filter_cpu import largest_peaks

        array = residual.detach().contiguous().numpy()
        chosen, colour, tensor = map(torch.from_numpy, largest_peaks(array, taps, edge_window(), count))
    else:
        chosen, colour = _largest_peaks(_filtered(residual, taps), count)
        tensor = _structure_tensors(residual)[:, chosen // width, chosen % width].T
    raw, anchor = _raw_at(chosen % width, chosen // width, colour, height, width, patch_size)
    return _stretched(raw, tensor, patch_size, raw_scale), anchor


def _stretched(raw: Tensor, tensor: Tensor, patch_size: int, raw_scale: float) -> Tensor:
    """Raw Gaussians (n, 8) of this scale, stretched along the edges that have these structure tensors (n, 3)."""
    xx, xy, yy = tensor.T
    coherence = ((xx - yy).square() + 4 * xy.square()).sqrt() / (xx + yy + _NO_EDGE)
    raw = raw.clone()
    # The first axis lies across the edge. Half a turn on, the raw angle is near 0, where it moves most.
    raw[:, ANGLE] = torch.logit((torch.atan2(2 * xy, xx - yy) / 2 + math.pi) / (2 * math.pi))
    raw[:, SCALE] = raw_scale + STRETCH * coherence[:, None] * torch.tensor([-1.0, 1.0]).to(raw)
    area = (patch_size * torch.sigmoid(raw[:, SCALE]) + MIN_RAW_SCALE).prod(dim=1)
    colour = torch.tanh(raw[:, COLOUR]) * (_scale(patch_size, raw_scale) ** 2 / area)[:, None]
    raw[:, COLOUR] = torch.atanh(colour.clamp(-LARGEST, LARGEST))
    return raw


def edge_window() -> list[float]:
    """Weights by distance along an axis of the window in which edges are seen; the whole window's add up to 1."""
    weights = [math.exp(-0.5 * distance**2) for distance in range(_WINDOW_REACH + 1)]
    total = 2 * sum(weights) - weights[0]
    return [weight / total for weight in weights]


def _structure_tensors(image: Tensor) -> Tensor:
    """As `air.fitting.filter_cpu.structure_tensors` for all pixels, in plain torch, shape (3, height, width)."""
    along_x, along_y = (
        F.pad((image.roll(-1, dim) - image.roll(1, dim))[:, 1:-1, 1:-1] / 2, (1, 1, 1, 1)) for dim in (2, 1)
    )
    products = torch.stack([(a * b).sum(0) for a, b in ((along_x, along_x), (along_x, along_y), (along_y, along_y))])
    window = edge_window()
    return symmetric_filter(symmetric_filter(products, window, 1), window, 2)


def _largest_peaks(colours: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `air.fitting.filter_cpu.largest_peaks`, of colours that are filtered, in plain torch."""
    energy = _energy(colours)
    is_peak = (energy >= F.max_pool2d(energy[None, None], 3, stride=1, padding=1)[0, 0]).flatten()
    energy = energy.flatten()
    peaks, others = (((is_peak == wanted) & (energy > 0)).nonzero()[:, 0] for wanted in (True, False))
    ordered = [places[energy[places].argsort(descending=True, stable=True)] for places in (peaks, others)]
    chosen = torch.cat(ordered)[:count]
    return chosen, colours.flatten(1)[:, chosen].T


def _scale(patch_size: int, raw_scale: float) -> float:
    """The scale in pixels that `air.gaussians.activate` gives."""
    return patch_size * torch.tensor(raw_scale).sigmoid().item() + MIN_RAW_SCALE


def _matched_filter(patch_size: int, raw_scale: float = RAW_SCALE) -> list[float]:
    """Taps by distance of the filter whose value is the least-squares colour of one narrow Gaussian."""
    scale = _scale(patch_size, raw_scale)
    radius = math.ceil(3 * scale)
    taps = [math.exp(-0.5 * (distance / scale) ** 2) for distance in range(radius + 1)]
    energy = 2 * sum(tap * tap for tap in taps) - 1
    return [tap / energy for tap in taps]


def _filtered(image: Tensor, taps: Sequence[float]) -> Tensor:
    """Convolution of every channel along both axes with taps[|distance|], zeros beyond the border."""
    if has_cpu_kernels(image):
        from air.fitting.filter_cpu import filter_symmetrically

        return torch.from_numpy(filter_symmetrically(image.detach().contiguous().numpy(), taps))
    return symmetric_filter(symmetric_filter(image, taps, 1), taps, 2)


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


def _raw_at(x: Tensor, y: Tensor, colour: Tensor, height: int, width: int, patch_size: int) -> tuple[Tensor, Tensor]:
    """Narrow raw Gaussians (n, 8) at pixels (x, y), with `GAIN` times colours (n, 3), and anchors (n, 2)."""
    anchor = torch.stack(
        [
            anchor_coordinates((places // patch_size).to(colour.dtype), size, patch_size)
            for places, size in ((x, width), (y, height))
        ],
        dim=1,
    )
    offset = (torch.stack([x, y], dim=1) - anchor) / patch_size
    raw = torch.zeros(len(x), RAW_CHANNELS, dtype=colour.dtype, device=colour.device)
    raw[:, OFFSET] = torch.atanh(offset.clamp(-LARGEST, LARGEST))
    raw[:, SCALE] = RAW_SCALE
    raw[:, COLOUR] = torch.atanh((GAIN * colour).clamp(-LARGEST, LARGEST))
    return raw, anchor
