"""What drawing a proposal says about it: what it draws too much or too little, and where each raw number should go.

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
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from air.compute.backends import has_cpu_kernels
from air.compute.threads import Workers
from air.gaussians import MIN_RAW_SCALE, activate, anchors
from air.rendering.batch import render_batch

if TYPE_CHECKING:
    from air.predictor.compact.feedback_cpu import CompiledFeedback

_RIDGE = 0.02
"""Curvature of a grey of this squared size, added so that faint Gaussians, which may move anywhere, do not."""

_GAIN = 3.0
"""Steps are passed through asinh, which keeps large ones apart without letting them rule; this sets where it bends."""


class Feedback:
    """Looks at proposals for a batch of images, one after another.

    On the CPU in float32 drawing and steps run in the compiled kernels; elsewhere in torch, which is their definition.

    Args:
        image: Shape (B, 3, H, W).
        canvas: What is drawn already, shape (B, 3, H, W).
        active: Which of the Gaussians are drawn, boolean, shape (B, N).
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
        """What a proposal draws too much, and its normalised steps.

        Args:
            raw: Raw Gaussians of every patch, shape (B, N, 8).

        Returns:
            Canvas plus proposal minus image, shape (B, 3, H, W), valid until the next call; and asinh(3 g / h), shape
            (B, N, 8), zero where a Gaussian is not drawn. Neither carries a gradient.
        """
        raw = raw.detach().float()
        if self._compiled is None:
            excess, steps = self._reference(raw)
        else:
            excess, steps = self._run_compiled(self._compiled, raw)
        return excess, torch.asinh(_GAIN * steps)

    def _run_compiled(self, images: Sequence[CompiledFeedback], raw: Tensor) -> tuple[Tensor, Tensor]:
        """As `_reference`."""
        steps = torch.zeros_like(raw)

        def look(index: int) -> None:
            images[index].look(raw[index].numpy(), _RIDGE, steps[index].numpy())

        self._workers.run(look, [(index,) for index in range(len(images))])
        excess = [torch.from_numpy(image.excess) for image in images]
        return excess[0][None] if len(excess) == 1 else torch.stack(excess), steps

    def _reference(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Canvas plus proposal minus image, and -g / (h + ridge · area)."""
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
