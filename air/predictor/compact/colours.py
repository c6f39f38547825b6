"""The best colours for given shapes: least squares by conjugate gradients, since the render is linear in the colours.

    raw = solve_colours(raw, anchor, image, patch_size, iterations=2)

With A the linear map from the colours of all Gaussians to the image, it minimises |A c - (image - canvas)|². An
iteration draws once and gathers once, without the loss, and is preconditioned by the diagonal of AᵀA, which for a
Gaussian alone is its integral of w², pi s1 s2. A few iterations are enough: neighbours are coupled over a patch or two.
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
from air.gaussians import Gaussians, activate
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
    """The raw Gaussians with colours that fit the target better, shape (N, 8); everything else as it was.

    The squared error of the unclamped image falls with every iteration, but for colours beyond what raw numbers can
    hold (0.99), which are cut.

    Args:
        raw: Shape (N, 8); not changed. Its colours are where the iteration starts.
        anchor: Shape (N, 2), pixels.
        target: Shape (3, H, W).
        patch_size: Of the raw form, pixels.
        iterations: Of conjugate gradients; 0 changes nothing.
        canvas: What is drawn already and stays, shape (3, H, W).
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
        solved[:, 5:8] = torch.atanh(colour.clamp(-LARGEST, LARGEST))
    return solved


_Map = Callable[[Tensor], Tensor]


@contextmanager
def _linear_map(shapes: Gaussians, image: Tensor, backend: str, threads: int) -> Iterator[tuple[_Map, _Map, _Map]]:
    """Three functions: what colours (N, 3) leave of the image, colours drawn, and Aᵀ of a picture.

    What is drawn is valid until the next is. Pictures are the compiled kernels' padded planes where they run, whose
    margins stay zero; else plain images.
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
        """As A is linear, the gradient of <A c, picture> at any c."""
        colour = torch.zeros_like(shapes.colour, requires_grad=True)
        with torch.enable_grad():
            drawn = draw(colour)
        drawn.backward(picture)
        assert colour.grad is not None
        return colour.grad

    yield lambda colour: image - draw(colour), draw, gather
