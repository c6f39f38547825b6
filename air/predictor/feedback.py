"""What drawing a proposal says about it: the residual it leaves, and where each raw number should go.

A network that sees its start drawn need not learn to render. For squared error, the gradient g of a raw number over
its own Gauss-Newton curvature h is the step that would be best if nothing else moved (neighbours do: that is left to
the network). For a Gaussian with scales s1, s2 and colour c, drawn alone on an infinite plane, the sums over pixels
behind h are integrals in closed form:

    colour: pi s1 s2      centre: pi s1 s2 |c|² / (2 s²)      scale: 3/4 pi s1 s2 |c|² / s²
    angle:  pi s1 s2 |c|² / 4 · ((s1² - s2²) / (s1 s2))²

each times the squared slope of the activation (method.md section 2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from air.batch import render_batch
from air.gaussians import MIN_RAW_SCALE, activate, anchors
from air.render.threads import Workers

_RIDGE = 0.02
"""Curvature of a grey of this squared size, added so that faint Gaussians, which may move anywhere, do not."""

_GAIN = 3.0
"""Steps are passed through asinh, which keeps large ones apart without letting them rule; this sets where it bends."""


def feedback(raw: Tensor, image: Tensor, canvas: Tensor, active: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """The residual of a proposal, and its normalised steps.

    Args:
        raw: Raw Gaussians of every patch, shape (B, N, 8).
        image: Shape (B, 3, H, W).
        canvas: What is drawn already, shape (B, 3, H, W).
        active: Which of the Gaussians are drawn, boolean, shape (B, N).
        patch_size: Pixels.

    Returns:
        Image minus canvas minus proposal, shape (B, 3, H, W); and asinh(3 g / h), shape (B, N, 8), zero where a
        Gaussian is not drawn. Neither carries a gradient.
    """
    _, _, height, width = image.shape
    index, patch = active.nonzero(as_tuple=True)
    anchor = anchors(height, width, patch_size).to(raw.device)[patch]
    drawn = raw.detach()[index, patch].float().requires_grad_()
    with torch.enable_grad(), Workers(torch.get_num_threads()) as workers:
        gaussians = activate(drawn, anchor, patch_size)
        render = render_batch(gaussians, active.sum(dim=1).tolist(), height, width, workers)
        residual = image - canvas - render.detach()
        if len(drawn):
            render.backward(-residual)
    steps = torch.zeros_like(raw, dtype=torch.float32)
    if drawn.grad is not None:
        with torch.no_grad():
            area, bend = curvature(drawn, patch_size)
            steps[index, patch] = torch.asinh(_GAIN * -drawn.grad / (bend + _RIDGE * area))
    return residual, steps


def curvature(raw: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """The area pi s1 s2 of each Gaussian, shape (N, 1), and the curvatures h, shape (N, 8)."""
    offset, share, turn, colour = (
        torch.tanh(raw[:, 0:2]),
        torch.sigmoid(raw[:, 2:4]),
        torch.sigmoid(raw[:, 4:5]),
        torch.tanh(raw[:, 5:8]),
    )
    scale = patch_size * share + MIN_RAW_SCALE
    area = math.pi * scale.prod(dim=1, keepdim=True)
    energy = area * colour.square().sum(dim=1, keepdim=True)
    stretch = (scale[:, 0:1].square() - scale[:, 1:2].square()) / scale.prod(dim=1, keepdim=True)
    parts = [
        energy / (2 * scale.square()) * (patch_size * (1 - offset.square())).square(),
        0.75 * energy / scale.square() * (patch_size * share * (1 - share)).square(),
        energy / 4 * stretch.square() * (2 * math.pi * turn * (1 - turn)).square(),
        area * (1 - colour.square()).square(),
    ]
    return area, torch.cat(parts, dim=1)
