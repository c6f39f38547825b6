"""The emulation of the authors' rasteriser, which docs/method.md quotes: ours but for what it leaves out."""

import math
from types import ModuleType

import pytest
import torch

from air.gaussians import Gaussians
from air.rendering.reference import render_reference
from tests.support.cases import random_gaussians
from tests.support.paths import ROOT

HEIGHT, WIDTH = 50, 71


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import authors_parity  # pyright: ignore[reportMissingImports] - a script

    return authors_parity


@pytest.fixture
def gaussians() -> Gaussians:
    return random_gaussians(120, HEIGHT, WIDTH, 3, median=3.0, outside=9.0).to(torch.float64)


def test_without_box_and_limit_it_is_the_definition(parity: ModuleType, gaussians: Gaussians) -> None:
    drawn = parity.draw(gaussians, HEIGHT, WIDTH, box=False, most=None)
    torch.testing.assert_close(drawn, render_reference(gaussians, HEIGHT, WIDTH), atol=1e-12, rtol=0)


def test_the_box_leaves_out_weights_below_that_of_three_sigma(parity: ModuleType, gaussians: Gaussians) -> None:
    largest = 0.0
    for one in range(len(gaussians)):
        alone = gaussians[one : one + 1]
        difference = parity.draw(alone, HEIGHT, WIDTH) - render_reference(alone, HEIGHT, WIDTH)
        missing = difference.abs().amax() / alone.colour.abs().amax()
        assert missing <= math.exp(-4.5)
        largest = max(largest, float(missing))
    assert largest > 1 / 255


def test_only_the_first_of_a_tile_are_drawn(parity: ModuleType) -> None:
    many = 300
    same = Gaussians(
        torch.full((many, 2), 8.0), torch.ones(many, 2), torch.zeros(many), torch.full((many, 3), 0.01)
    ).to(torch.float64)
    assert parity.draw(same, 16, 16)[0, 8, 8].item() == pytest.approx(2.56)
    assert parity.draw(same, 16, 16, most=None)[0, 8, 8].item() == pytest.approx(3.0)


def test_values_are_rounded_to_the_mantissa(parity: ModuleType) -> None:
    values = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-10, -1 - 2**-9.5, 0.0])
    torch.testing.assert_close(parity.rounded(values, 7), values.bfloat16().float(), rtol=2**-8, atol=0)
    assert parity.rounded(values, 10)[2].item() == 1 + 2**-10
    assert (parity.rounded(values, 10) * 2**10 % 1 == 0).all()
