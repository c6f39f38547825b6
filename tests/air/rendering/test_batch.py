"""Batches render and are judged as their images are one by one, gradients included."""

import torch

from air.compute.threads import Workers
from air.gaussians import Gaussians
from air.loss.batch import BatchLoss
from air.loss.reference import loss
from air.rendering.batch import render_batch
from air.rendering.render import render


def random_gaussians(count: int, seed: int) -> Gaussians:
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=random)  # noqa: E731
    return Gaussians(draw(count, 2) * 30, draw(count, 2) * 3 + 0.6, draw(count) * 6, draw(count, 3) - 0.3)


def with_gradient(gaussians: Gaussians, dtype: torch.dtype) -> Gaussians:
    parts = (gaussians.xy, gaussians.scale, gaussians.angle, gaussians.colour)
    return Gaussians(*(part.to(dtype).clone().requires_grad_() for part in parts))


def test_images_losses_and_gradients_are_those_of_the_definition() -> None:
    counts = (7, 0, 12)
    table = random_gaussians(sum(counts), 1)
    targets = torch.rand(3, 3, 31, 28, generator=torch.Generator().manual_seed(2))
    weights = torch.tensor([1.0, 2.0, 3.0])

    compiled = with_gradient(table, torch.float32)
    with Workers(2) as workers:
        images = render_batch(compiled, counts, 31, 28, workers)
        losses = BatchLoss(targets, workers)(images)
        (losses * weights).sum().backward()

    exact = with_gradient(table, torch.float64)
    expected = []
    for index, (first, end) in enumerate([(0, 7), (7, 7), (7, 19)]):
        image = render(exact[first:end], 31, 28, backend="reference")
        torch.testing.assert_close(images[index].double(), image, rtol=0, atol=2e-5)
        expected.append(loss(image, targets[index].double()))
    torch.testing.assert_close(losses.double(), torch.stack(expected), rtol=1e-4, atol=1e-6)
    (torch.stack(expected) * weights.double()).sum().backward()
    for name in ("xy", "scale", "angle", "colour"):
        ours, theirs = getattr(compiled, name).grad, getattr(exact, name).grad
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=1e-5)
