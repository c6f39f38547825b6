"""Steps on quantised Gaussians: what they gain is in the file, and they never make a picture worse."""

import math

import pytest
import torch

import air
from air.codec.file import decode
from air.codec.symbols import lay_out, patch_size_for
from air.compute.threads import Workers
from air.encoding import refine
from air.encoding.encode import encode
from air.encoding.search import Fit
from air.errors import TargetMissedError
from air.fitting.fit import fit
from air.metrics import psnr
from air.rendering.render import render
from tests.support.cases import smooth_image

HEIGHT, WIDTH, COUNT = 96, 128, 400


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return (smooth_image(HEIGHT, WIDTH) + 0.05 * torch.randn(3, HEIGHT, WIDTH, generator=generator)).clamp(0, 1)


@pytest.fixture
def made(picture: torch.Tensor) -> Fit:
    result = fit(picture, 60, num_gaussians=COUNT, backend="cpu", device="cpu")
    patch_size = patch_size_for(COUNT, HEIGHT, WIDTH)
    stages = lay_out(result.gaussians, HEIGHT, WIDTH, patch_size)
    return Fit(stages, patch_size, float(result.trajectory.psnr[-1]), picture.numpy(), 40, Workers(1))


def decibels(blob: bytes, picture: torch.Tensor) -> float:
    return psnr(render(decode(blob), HEIGHT, WIDTH), picture)


def test_refined_gaussians_are_those_of_the_file(made: Fit, picture: torch.Tensor) -> None:
    plain = made.squared_error(made.step)
    made.refine(made.step)
    refined = made.squared_error(made.step)
    assert refined < 0.97 * plain
    assert decibels(made.file(made.step), picture) == pytest.approx(-10 * math.log10(refined), abs=1e-3)


def test_another_step_stores_the_gaussians_as_they_were_fitted(made: Fit) -> None:
    other = round(1.01 * made.step)
    before = made.file(other), made.squared_error(other)
    made.refine(made.step)
    assert (made.file(other), made.squared_error(other)) == before


def test_a_refinement_that_ends_worse_is_refused(made: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    before = made.file(made.step)
    monkeypatch.setattr(refine, "LEARNING_RATE", 50.0)
    made.refine(made.step)
    assert made.file(made.step) == before


@pytest.mark.parametrize("bpp", [0.5, 1.5])
def test_a_target_of_bits_keeps_what_refining_gained(picture: torch.Tensor, bpp: float) -> None:
    sizes, reached = [], []
    for stored_steps in (0, 40):
        blob = encode(picture, bpp=bpp, steps=60, stored_steps=stored_steps)
        sizes.append(8 * len(blob) / (HEIGHT * WIDTH))
        reached.append(decibels(blob, picture))
    assert max(sizes) <= bpp
    assert reached[1] > reached[0] + 0.1


def test_a_target_of_decibels_takes_fewer_bits_with_refining(picture: torch.Tensor) -> None:
    plain, refined = (encode(picture, psnr=25.0, steps=60, stored_steps=steps) for steps in (0, 40))
    assert len(refined) < len(plain)
    for blob in (plain, refined):
        assert 25.0 - 1e-3 <= decibels(blob, picture) < 25.3


def test_targets_at_the_ends_of_the_quantisers_range_are_met_or_refused(made: Fit, picture: torch.Tensor) -> None:
    assert made.refined_for_quality(1e-9) is None
    with pytest.raises(TargetMissedError, match="too few"):
        made.refined_for_size(20)
    assert len(made.refined_for_size(10**6)) <= 10**6
    blob = made.refined_for_quality(0.5)
    assert blob is not None
    assert decibels(blob, picture) >= -10 * math.log10(0.5)


def test_no_gaussians_are_refined_to_none() -> None:
    black = air.encode(torch.zeros(3, 16, 16), bpp=4.0, steps=3, stored_steps=3)
    assert 8 * len(black) <= 4 * 256
