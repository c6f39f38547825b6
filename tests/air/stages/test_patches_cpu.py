"""The compiled kernels around patches, held against torch in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from air.compute.planes import image_planes, pixels
from air.fitting.filter_cpu import filter_symmetrically
from air.fitting.residual import symmetric_filter
from air.predictor.compact.network import split_patches
from air.predictor.compact.patches_cpu import patch_pixels
from air.predictor.network import build
from air.stages import control, patches_cpu

SIZES = [(1, 1), (5, 40), (23, 37), (64, 48)]


def images(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(height * width)
    return torch.rand(3, height, width, generator=generator), torch.rand(3, height, width, generator=generator)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch_size", [1, 5, 7, 16, 33])
def test_errors_are_the_definitions(size, patch_size) -> None:
    drawn, image = images(*size)
    found = patches_cpu.patch_errors(drawn.numpy(), image.numpy(), patch_size)
    for kernel, definition in zip(found, control.patch_errors(drawn.double(), image.double(), patch_size), strict=True):
        np.testing.assert_allclose(kernel, definition.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", [0, 1, 3, 35, 255])
def test_a_flat_patch_drawn_exactly_has_no_error_however_dark(level: int) -> None:
    """The authors' term of 1e-8 (method.md, 9.8) would make black patches bad that are drawn exactly."""
    flat = torch.full((3, 14, 14), level / 255)
    definition = control.patch_errors(flat.double(), flat.double(), 7)
    kernel = patches_cpu.patch_errors(flat.numpy(), flat.numpy(), 7)
    for errors in (*definition, *kernel):
        np.testing.assert_allclose(np.asarray(errors), 0, atol=1e-9)
    assert not control.active_patches(flat, flat, 7, control.StageControl()).any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch_size", [1, 5, 7, 16, 33])
def test_pixels_are_those_of_the_patches_also_of_a_view(size, patch_size) -> None:
    image, _ = images(*size)
    expected = split_patches(image[None].double(), patch_size)[0].float().numpy()
    np.testing.assert_array_equal(patch_pixels(image.numpy(), patch_size), expected)
    planes = image_planes(*size)
    pixels(planes, *size)[:] = image.numpy()
    np.testing.assert_array_equal(patch_pixels(pixels(planes, *size), patch_size), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("radius", [0, 3, 20])
def test_the_filter_is_the_convolution(size, radius) -> None:
    image, _ = images(*size)
    taps = [1 / (1 + distance) for distance in range(radius + 1)]
    both = torch.tensor(taps[:0:-1] + taps, dtype=torch.float64)
    window = (both[:, None] * both[None, :])[None, None].expand(3, 1, -1, -1)
    expected = F.conv2d(image[None].double(), window, padding=radius, groups=3)[0]
    np.testing.assert_allclose(filter_symmetrically(image.numpy(), taps), expected.numpy(), rtol=1e-5)
    plain = symmetric_filter(symmetric_filter(image.double(), taps, 1), taps, 2)
    torch.testing.assert_close(plain, expected)


def test_an_image_whose_channels_lie_together_is_seen_as_it_is() -> None:
    image, _ = images(23, 37)
    interleaved = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    np.testing.assert_array_equal(patch_pixels(interleaved.numpy(), 7), patch_pixels(image.numpy(), 7))
    network = build("compact", {"patch_size": 7, "num_stages": 1, "channels": 16, "depth": 1}).eval()
    torch.nn.init.normal_(network.heads[0].weight)
    active = torch.ones(4 * 6, dtype=torch.bool)
    canvas = torch.zeros_like(image)
    found = network.predict(interleaved, canvas, active, 0).raw
    torch.testing.assert_close(found, network.predict(image, canvas, active, 0).raw)


def test_images_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="not of one size"):
        patches_cpu.patch_errors(np.zeros((3, 14, 14), np.float32), np.zeros((3, 70, 70), np.float32), 7)
