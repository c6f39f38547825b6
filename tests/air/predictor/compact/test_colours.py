"""Colours by conjugate gradients: they end at the least-squares solution, and every iteration helps."""

from itertools import pairwise

import pytest
import torch

from air.gaussians import activate, anchors
from air.predictor.compact.colours import solve_colours
from air.rendering.render import render


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Raw Gaussians, anchors and a target of 20 x 25 pixels in patches of 5."""
    generator = torch.Generator().manual_seed(5)
    raw = 0.5 * torch.randn(20, 8, generator=generator, dtype=torch.float64)
    target = torch.rand(3, 20, 25, generator=generator, dtype=torch.float64)
    return raw.to(dtype), anchors(20, 25, 5, dtype), target.to(dtype)


def squared_error(raw: torch.Tensor, anchor: torch.Tensor, target: torch.Tensor) -> float:
    drawn = render(activate(raw, anchor, 5), 20, 25, backend="reference")
    return float((drawn - target).square().sum())


def test_it_ends_at_the_least_squares_solution():
    raw, anchor, target = problem()
    target = 0.3 * target
    weights = []
    for index in range(len(raw)):
        white = activate(raw[index : index + 1], anchor[index : index + 1], 5)
        white.colour.fill_(1)
        weights.append(render(white, 20, 25, backend="reference")[0].flatten())
    best = torch.linalg.lstsq(torch.stack(weights, dim=1), target.flatten(1).T).solution
    assert best.abs().max() < 0.99, "the definition must be within what raw numbers can hold"
    solved = solve_colours(raw, anchor, target, 5, 60)
    torch.testing.assert_close(torch.tanh(solved[:, 5:8]), best, atol=1e-6, rtol=0)
    assert torch.equal(solved[:, :5], raw[:, :5])


def test_every_iteration_lowers_the_error():
    raw, anchor, target = problem()
    target = 0.3 * target
    errors = [squared_error(solve_colours(raw, anchor, target, 5, count), anchor, target) for count in range(8)]
    assert errors[0] == squared_error(raw, anchor, target)
    assert all(after < before for before, after in pairwise(errors))


def test_a_canvas_counts_and_the_compiled_path_agrees():
    raw, anchor, target = problem()
    canvas = torch.full_like(target, 0.2)
    expected = solve_colours(raw, anchor, 0.3 * target - canvas, 5, 3)
    torch.testing.assert_close(solve_colours(raw, anchor, 0.3 * target, 5, 3, canvas=canvas), expected)
    single = [each.float() for each in (raw, anchor, 0.3 * target)]
    fast = solve_colours(*single, 5, 3, canvas=canvas.float())
    torch.testing.assert_close(fast, expected.float(), atol=2e-4, rtol=1e-3)


def test_nothing_to_solve():
    raw, anchor, target = problem()
    assert solve_colours(raw[:0], anchor[:0], target, 5, 3).shape == (0, 8)
    assert torch.equal(solve_colours(raw, anchor, target, 5, 0), raw)
    with pytest.raises(ValueError, match="iterations must be at least 0"):
        solve_colours(raw, anchor, target, 5, -1)
