"""Feedback from drawing a proposal: its residual, and the step that each raw number should take.

A network that is shown its proposal drawn does not have to learn to render. For squared error, the gradient g of a raw
number divided by its Gauss-Newton curvature h is the best step if nothing else moves. Neighbours do move; the network
learns to account for them. For a Gaussian with scales s1, s2 and colour c, drawn alone on an infinite plane, the sums
over pixels in h are integrals in closed form:

    colour: pi s1 s2      centre: pi s1 s2 |c|² / (2 s²)      scale: 3/4 pi s1 s2 |c|² / s²
    angle:  pi s1 s2 |c|² / 4 · ((s1² - s2²) / (s1 s2))²

each times the squared slope of the activation (method.md section 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from air.compute.backends import has_cpu_kernels
from air.compute.threads import Workers
from air.gaussians import ANGLE, COLOUR, MIN_RAW_SCALE, OFFSET, SCALE, activate, anchors
from air.rendering.batch import render_batch

if TYPE_CHECKING:
    from air.predictor.compact.feedback_cpu import CompiledFeedback

_RIDGE = 0.02
"""Times the area, this is added to every curvature. Without it, faint Gaussians, whose curvature is near zero, would
take long steps."""

_GAIN = 3.0
"""The network gets asinh(3 · step), which limits large steps but keeps them distinct. The 3 sets where it bends."""


class Feedback:
    """Draws proposals for a batch of images, one proposal after another, and computes their steps.

    On the CPU in float32 this runs in compiled kernels, elsewhere in torch, which is their definition.

    Args:
        image: Shape (B, 3, H, W).
        canvas: Render of the earlier stages, shape (B, 3, H, W).
        active: Gaussians that are drawn, boolean, shape (B, N).
        patch_size: Pixels.
        workers: CPU threads.
    """

    def __init__(self, image: Tensor, canvas: Tensor, active: Tensor, patch_size: int, workers: Workers) -> None:
        self._missing = (image - canvas).detach()
        self._active = active
        self._patch_size = patch_size
        self._workers = workers
        _, _, height, width = image.shape
        self._anchor = anchors(height, width, patch_size).to(image.device)
        self._compiled: list[CompiledFeedback] | None = None
        if has_cpu_kernels(image):
            from air.predictor.compact.feedback_cpu import CompiledFeedback

            inner = workers if len(image) == 1 else Workers(1)
            self._compiled = [
                CompiledFeedback(missing.numpy(), chosen.numpy(), self._anchor.numpy(), patch_size, inner)
                for missing, chosen in zip(self._missing, active, strict=True)
            ]

    @torch.no_grad()
    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """The negated residual of a proposal, and its normalised steps.

        Args:
            raw: Raw Gaussians of every patch, shape (B, N, 8).

        Returns:
            Canvas plus proposal minus image, shape (B, 3, H, W), valid until the next call; and asinh of 3 times the
            step of each raw number, shape (B, N, 8), zero where a Gaussian is not drawn. Neither carries a gradient.
        """
        raw = raw.detach().float()
        if self._compiled is None:
            excess, steps = self.reference(raw)
        else:
            excess, steps = self._run_compiled(self._compiled, raw)
        return excess, torch.asinh(_GAIN * steps)

    def _run_compiled(self, images: Sequence[CompiledFeedback], raw: Tensor) -> tuple[Tensor, Tensor]:
        """As `reference`, in the compiled kernels."""
        steps = torch.zeros_like(raw)

        def look(index: int) -> None:
            images[index].look(raw[index].numpy(), _RIDGE, steps[index].numpy())

        self._workers.run(look, [(index,) for index in range(len(images))])
        excess = [torch.from_numpy(image.excess) for image in images]
        return excess[0][None] if len(excess) == 1 else torch.stack(excess), steps

    def reference(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Canvas plus proposal minus image, and -g / (h + ridge · area), in torch: the definition of the kernels."""
        _, _, height, width = self._missing.shape
        index, patch = self._active.nonzero(as_tuple=True)
        drawn = raw[index, patch].requires_grad_()
        with torch.enable_grad():
            gaussians = activate(drawn, self._anchor[patch], self._patch_size)
            counts = self._active.sum(dim=1).tolist()
            render = render_batch(gaussians, counts, height, width, self._workers)
            excess = render.detach() - self._missing
            if len(drawn):
                render.backward(excess)
        steps = torch.zeros_like(raw)
        if drawn.grad is not None:
            area, bend = curvature(drawn, self._patch_size)
            steps[index, patch] = -drawn.grad / (bend + _RIDGE * area)
        return excess, steps


def curvature(raw: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """The area pi s1 s2 of each Gaussian, shape (N, 1), and the curvatures h, shape (N, 8)."""
    offset, width, turn, colour = (
        torch.tanh(raw[:, OFFSET]),
        torch.sigmoid(raw[:, SCALE]),
        torch.sigmoid(raw[:, ANGLE, None]),
        torch.tanh(raw[:, COLOUR]),
    )
    scale = patch_size * width + MIN_RAW_SCALE
    area = math.pi * scale.prod(dim=1, keepdim=True)
    energy = area * colour.square().sum(dim=1, keepdim=True)
    stretch = (scale[:, 0:1].square() - scale[:, 1:2].square()) / scale.prod(dim=1, keepdim=True)
    parts = [
        energy / (2 * scale.square()) * (patch_size * (1 - offset.square())).square(),
        0.75 * energy / scale.square() * (patch_size * width * (1 - width)).square(),
        energy / 4 * stretch.square() * (2 * math.pi * turn * (1 - turn)).square(),
        area * (1 - colour.square()).square(),
    ]
    return area, torch.cat(parts, dim=1)
