import importlib
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import air
from air.errors import InvalidGaussiansError
from air.fitting.fit import fit
from air.gaussians import SUPPORT_CUTOFF, Gaussians
from air.metrics import psnr
from air.rendering.cpu import draw_levels
from air.rendering.render import render
from tests.support.cases import needles, random_gaussians, smooth_image
from tests.support.paths import ROOT

CASES = {
    "usual": (lambda: random_gaussians(200, 96, 112, 1), 96, 112),
    "small and large": (lambda: random_gaussians(150, 80, 96, 2, median=1.0, spread=1.3), 80, 96),
    "odd size": (lambda: random_gaussians(40, 70, 61, 3, median=6.0, spread=1.0), 70, 61),
    "taller than a band": (lambda: random_gaussians(60, 200, 33, 4, median=8.0, spread=0.8), 200, 33),
    "over the borders": (lambda: random_gaussians(150, 40, 50, 5, median=4.0, outside=15.0), 40, 50),
    "off the image": (lambda: random_gaussians(30, 20, 30, 6, outside=500.0), 20, 30),
    "needles": (lambda: needles(90, 90), 90, 90),
    "one pixel": (lambda: random_gaussians(20, 1, 1, 7, outside=2.0), 1, 1),
    "one row": (lambda: random_gaussians(40, 1, 57, 8), 1, 57),
    "one column": (lambda: random_gaussians(40, 75, 1, 9), 75, 1),
    "huge": (lambda: random_gaussians(5, 150, 100, 10, median=1e4, spread=0.3), 150, 100),
    "thin": (lambda: random_gaussians(60, 40, 40, 11, median=0.1, spread=0.3), 40, 40),
    "none": (lambda: Gaussians.empty(), 12, 13),
}


def leaves(gaussians: Gaussians, dtype: torch.dtype) -> Gaussians:
    parts = (gaussians.xy, gaussians.scale, gaussians.angle, gaussians.colour)
    return Gaussians(*(part.detach().to(dtype).requires_grad_() for part in parts))


def image_and_gradients(gaussians: Gaussians, weight: Tensor, backend: str, dtype: torch.dtype, threads: int = 1):
    inputs = leaves(gaussians, dtype)
    image = render(inputs, *weight.shape[1:], backend=backend, threads=threads)
    (image * weight.to(dtype)).sum().backward()
    gradients = [part.grad for part in (inputs.xy, inputs.scale, inputs.angle, inputs.colour)]
    return image.detach(), gradients


def random_weight(height: int, width: int) -> Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", CASES)
def test_levels_are_the_image_rounded(name: str):
    gaussians, height, width = CASES[name][0](), *CASES[name][1:]
    image = render(gaussians, height, width, backend="cpu")
    expected = torch.floor(image.clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(1, 2, 0)
    for threads in (1, 3):
        assert torch.equal(torch.from_numpy(draw_levels(gaussians, height, width, threads)), expected)


@pytest.mark.parametrize("name", CASES)
def test_cpu_agrees_with_the_float64_reference(name):
    make, height, width = CASES[name]
    gaussians, weight = make(), random_weight(height, width)
    exact_image, exact = image_and_gradients(gaussians, weight, "reference", torch.float64)
    image, gradients = image_and_gradients(gaussians, weight, "cpu", torch.float32)
    assert image.shape == (3, height, width)
    assert (image - exact_image).abs().max() < 1e-5
    for found, expected in zip(gradients, exact, strict=True):
        assert found.shape == expected.shape
        if expected.numel() and expected.abs().max() > 0:
            assert (found - expected).norm() < 1e-4 * expected.norm()
        else:
            assert not found.any()


def test_the_case_of_needles_really_has_needles_at_all_angles():
    gaussians = needles(90, 90)
    assert len(gaussians) >= 24
    assert (gaussians.scale[:, 0] / gaussians.scale[:, 1] > 14.9).all()


def test_the_reference_is_the_formula():
    one = Gaussians(
        torch.tensor([[2.0, 1.0]], dtype=torch.float64),
        torch.tensor([[2.0, 0.5]], dtype=torch.float64),
        torch.tensor([math.pi / 6], dtype=torch.float64),
        torch.tensor([[1.0, -0.5, 0.25]], dtype=torch.float64),
    )
    image = render(one, 6, 8, backend="reference")
    a, b, c = one.conic()[0].tolist()
    for row in range(6):
        for column in range(8):
            dx, dy = column - 2, row - 1
            weight = math.exp(-0.5 * (a * dx * dx + 2 * b * dx * dy + c * dy * dy))
            weight = weight if weight >= SUPPORT_CUTOFF else 0.0
            assert image[:, row, column].tolist() == pytest.approx([weight, -0.5 * weight, 0.25 * weight])


def test_the_gradients_of_the_reference_are_true():
    gaussians = leaves(random_gaussians(6, 7, 8, 3, median=2.0), torch.float64)

    def draw(*parts: Tensor) -> Tensor:
        return render(Gaussians(*parts), 7, 8, backend="reference")

    parts = (gaussians.xy, gaussians.scale, gaussians.angle, gaussians.colour)
    assert torch.autograd.gradcheck(draw, parts, eps=1e-7, atol=1e-6)


def test_the_number_of_threads_changes_no_bit():
    gaussians, weight = random_gaussians(300, 210, 130, 12, median=5.0), random_weight(210, 130)
    image, gradients = image_and_gradients(gaussians, weight, "cpu", torch.float32)
    for threads in (2, 3):
        other_image, other_gradients = image_and_gradients(gaussians, weight, "cpu", torch.float32, threads)
        assert torch.equal(image, other_image)
        assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))


def test_scales_of_a_hundredth_of_a_pixel_are_drawn_where_they_are():
    generator = torch.Generator().manual_seed(5)
    centres = torch.rand(50, 2, generator=generator) * 18
    centres[0] = torch.tensor([7.0, 9.0])
    gaussians = Gaussians(centres, torch.full((50, 2), 0.01), torch.rand(50, generator=generator), torch.ones(50, 3))
    image = render(gaussians, 20, 20, backend="cpu")
    exact = render(gaussians.to(torch.float64), 20, 20)
    assert image[0, 9, 7] == pytest.approx(1.0)
    torch.testing.assert_close(image.double(), exact, atol=1e-4, rtol=0)


def test_a_gaussian_of_ten_thousand_pixels_covers_everything():
    one = Gaussians(torch.tensor([[300.0, -80.0]]), torch.full((1, 2), 1e4), torch.zeros(1), torch.ones(1, 3))
    image = render(one, 300, 400)
    assert image.min() > 0.998
    assert image.max() <= 1.0 + 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1e12, 1e30])
@pytest.mark.parametrize("place", [0.0, 1e9, -1e30])
def test_absurd_but_finite_numbers_neither_hang_nor_crash(scale, place):
    one = Gaussians(torch.tensor([[place, 3.0]]), torch.tensor([[scale, 1.0]]), torch.ones(1), torch.ones(1, 3))
    assert render(one, 30, 40, backend="cpu").shape == (3, 30, 40)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["xy", "scale", "angle", "colour"])
def test_non_finite_numbers_are_an_error(backend, name):
    gaussians = random_gaussians(9, 20, 20, 1)
    getattr(gaussians, name)[2] = math.nan
    with pytest.raises(InvalidGaussiansError, match=f"Gaussian 2 has a non-finite {name}"):
        render(gaussians, 20, 20, backend=backend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 0, "width": 5}, "at least one row"),
        ({"height": 5, "width": 0}, "at least one row"),
        ({"height": 5, "width": 5, "threads": 0}, "threads"),
        ({"height": 5, "width": 5, "backend": "metal"}, "unknown backend"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        render(Gaussians.empty(), **options)


def test_float64_takes_the_reference_and_the_cpu_backend_refuses_it():
    gaussians = random_gaussians(5, 9, 9, 1).to(torch.float64)
    assert render(gaussians, 9, 9).dtype == torch.float64
    with pytest.raises(ValueError, match="float32"):
        render(gaussians, 9, 9, backend="cpu")


def test_the_package_hands_on_the_function_also_after_its_room_is_imported():
    importlib.import_module("air.rendering.render")
    assert air.render is render


@pytest.fixture(scope="module")
def fitted():
    image = smooth_image(96, 128)
    return image, fit(image, steps=60, patch_size=4).gaussians


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_fitted_picture_renders_at_another_size(fitted, factor):
    image, gaussians = fitted
    height, width = round(96 * factor), round(128 * factor)
    resized = torch.nn.functional.interpolate(
        image[None], size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )[0]
    assert psnr(render(gaussians, 96, 128), image) > 34
    assert psnr(render(gaussians.rescaled(factor), height, width), resized) > 32


@pytest.mark.parametrize("factor", [0.5, 2.0, 3.0])
def test_a_constant_picture_stays_constant_at_another_size(factor):
    size = 64
    gaussians = fit(torch.full((3, size, size), 0.6), steps=30, patch_size=4).gaussians
    new = round(size * factor)
    image = render(gaussians.rescaled(factor), new, new)
    edge = math.ceil(8 * factor)
    inside = image[:, edge:-edge, edge:-edge]
    unevenness = (render(gaussians, size, size)[:, 8:-8, 8:-8] - 0.6).abs().max()
    assert inside.mean() == pytest.approx(0.6, abs=0.005)
    assert (inside - 0.6).abs().max() < 1.5 * unevenness + 0.005


@pytest.mark.slow
def test_eight_lanes_agree_too():
    """The same tests with the vectors of a CPU without AVX-512; a fresh process, since lanes are fixed at import."""
    tests = ROOT / "tests" / "air"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "agree or threads"]
    files = [
        str(tests / name) for name in ("rendering/test_render.py", "loss/test_loss.py", "optimization/test_optimize.py")
    ]
    environment = {**os.environ, "AIR_LANES": "8"}
    result = subprocess.run(
        [*command, "-m", "not slow", *files], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
