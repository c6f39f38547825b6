"""Least-squares colours for given shapes by conjugate gradients: the render is linear in the colours.

    raw = solve_colours(raw, anchor, image, patch_size, iterations=2)

A is the linear map from the colours of all Gaussians to the image; the objective is |A c - (image - canvas)|². An
iteration draws once and gathers once, without the training loss. The preconditioner is the diagonal of AᵀA, which for a
single Gaussian is the integral of its squared weights, pi s1 s2. A few iterations are enough, since each Gaussian
overlaps only those of a patch or two around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from air.compute.backends import has_cpu_kernels
from air.compute.threads import Workers
from air.fitting.grid import LARGEST
from air.gaussians import COLOUR, Gaussians, activate
from air.rendering.render import render


def solve_colours(
    raw: Tensor,
    anchor: Tensor,
    target: Tensor,
    patch_size: int,
    iterations: int,
    *,
    canvas: Tensor | None = None,
    backend: str = "auto",
    threads: int = 1,
) -> Tensor:
    """The raw Gaussians, shape (N, 8), with colours that fit the target better; all other columns as given.

    The squared error of the unclamped image falls with every iteration. The result's colours are then clamped to
    ±0.99, so that raw numbers can hold them.

    Args:
        raw: Shape (N, 8); not changed. The iteration starts from its colours.
        anchor: Shape (N, 2), pixels.
        target: Shape (3, H, W).
        patch_size: Patch size of the raw form, pixels.
        iterations: Iterations of conjugate gradients; 0 changes nothing.
        canvas: The fixed part of the picture, shape (3, H, W); black if not given.
        backend: As for `air.rendering.render.render`.
        threads: As for `air.rendering.render.render`.

    Raises:
        InvalidGaussiansError: `raw` and `anchor` do not fit each other or are not finite.
        ValueError: The number of iterations is negative.
    """
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")
    shapes = activate(raw.detach(), anchor, patch_size)
    if not iterations or not len(shapes):
        return raw.detach().clone()
    wanted = target if canvas is None else target - canvas
    with torch.no_grad(), _linear_map(shapes, wanted, backend, threads) as (miss, draw, gather):
        diagonal = math.pi * shapes.scale.prod(dim=1, keepdim=True)
        colour = shapes.colour.clone()
        missing = miss(colour)
        step = torch.zeros_like(colour)
        before = torch.ones(())
        for _ in range(iterations):
            residual = gather(missing)
            towards = residual / diagonal
            length = (residual * towards).sum()
            if not length > 0:
                break
            step = towards + length / before * step
            change = draw(step)
            rate = length / torch.linalg.vector_norm(change).square()
            colour += rate * step
            missing.addcmul_(change, -rate)
            before = length
        solved = raw.detach().clone()
        solved[:, COLOUR] = torch.atanh(colour.clamp(-LARGEST, LARGEST))
    return solved


_Map = Callable[[Tensor], Tensor]


@contextmanager
def _linear_map(shapes: Gaussians, image: Tensor, backend: str, threads: int) -> Iterator[tuple[_Map, _Map, _Map]]:
    """Three functions: image - A c for colours c (N, 3); A c; and Aᵀ of a picture, (N, 3).

    A picture of A c is valid until the next one is drawn. Pictures are padded planes with zero margins where the
    compiled kernels run, else plain images.
    """
    _, height, width = image.shape
    if backend in ("auto", "cpu") and has_cpu_kernels(image):
        from air.predictor.compact.colours_cpu import ColourMap

        shapes.validate()
        with Workers(threads) as workers:
            compiled = ColourMap(shapes, image, workers)
            yield compiled.miss, compiled.draw, compiled.gather
        return

    def draw(colour: Tensor) -> Tensor:
        table = Gaussians(shapes.xy, shapes.scale, shapes.angle, colour)
        return render(table, height, width, backend=backend, threads=threads)

    def gather(picture: Tensor) -> Tensor:
        """Aᵀ of a picture: the gradient of <A c, picture> at any c, since A is linear."""
        colour = torch.zeros_like(shapes.colour, requires_grad=True)
        with torch.enable_grad():
            drawn = draw(colour)
        drawn.backward(picture)
        assert colour.grad is not None
        return colour.grad

    yield lambda colour: image - draw(colour), draw, gather
