"""The renderer's definition: dense torch, any dtype and device (method.md section 1). Slow, and meant to be read.

Every Gaussian is evaluated at every pixel, a chunk of Gaussians at a time. The backward pass evaluates each chunk
again instead of keeping it, so memory is bounded in both directions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from air.gaussians import SUPPORT_CUTOFF, Gaussians

_CHUNK_ELEMENTS = 1 << 21
"""Weights (Gaussians times pixels) that exist at a time."""


def _render_chunk(xy: Tensor, scale: Tensor, angle: Tensor, colour: Tensor, height: int, width: int) -> Tensor:
    rows = torch.arange(height, dtype=xy.dtype, device=xy.device)[None, :, None]
    columns = torch.arange(width, dtype=xy.dtype, device=xy.device)[None, None, :]
    dx = columns - xy[:, 0, None, None]
    dy = rows - xy[:, 1, None, None]
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    # dᵀ Σ⁻¹ d in the Gaussian's own axes, Rᵀ d: a sum of squares keeps its precision for thin Gaussians.
    along = (cos * dx + sin * dy) / scale[:, 0, None, None]
    across = (cos * dy - sin * dx) / scale[:, 1, None, None]
    weight = torch.exp(-0.5 * (along.square() + across.square()))
    weight = torch.where(weight >= SUPPORT_CUTOFF, weight, 0)
    return torch.einsum("nhw,nc->chw", weight, colour)


def render_reference(gaussians: Gaussians, height: int, width: int) -> Tensor:
    """The image of shape (3, height, width); see `air.rendering.render.render`, which checks the arguments."""
    parts = (gaussians.xy, gaussians.scale, gaussians.angle, gaussians.colour)
    image = torch.zeros(3, height, width, dtype=gaussians.xy.dtype, device=gaussians.xy.device)
    size = max(1, _CHUNK_ELEMENTS // (height * width))
    # No Gaussians are one empty chunk, so that the zeros still belong to the graph.
    for first in range(0, max(len(gaussians), 1), size):
        chunk = [part[first : first + size] for part in parts]
        image = image + checkpoint(_render_chunk, *chunk, height, width, use_reentrant=False)
    return image
