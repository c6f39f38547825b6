import numpy as np
import pytest
import torch

from air.compute.planes import image_planes, pixels
from air.compute.threads import Workers
from air.loss.cpu import FusedLoss
from air.loss.reference import loss, ssim, window_weights
from air.metrics import HIGHEST_PSNR, psnr
from tests.support.cases import smooth_image

SIZES = [(1, 1), (1, 40), (33, 1), (5, 3), (37, 61), (64, 48), (130, 200)]


def pair(height: int, width: int):
    target = smooth_image(height, width)
    image = target + 0.2 * torch.randn(target.shape, generator=torch.Generator().manual_seed(height * 1000 + width))
    return image, target


def fused(image, target, threads: int = 1):
    _, height, width = image.shape
    planes = image_planes(height, width)
    pixels(planes, height, width)[:] = image.numpy()
    with Workers(threads) as workers:
        state = FusedLoss(target.numpy(), workers)
        values = state.evaluate(planes)
    return values, state.gradient


def test_ssim_is_the_published_formula():
    image, target = (part.double() for part in pair(20, 24))
    weights = np.outer(window_weights(), window_weights())
    padded = [np.pad(part.numpy(), ((0, 0), (5, 5), (5, 5))) for part in (image, target)]
    total = 0.0
    for channel in range(3):
        for row in range(20):
            for column in range(24):
                x, y = (part[channel, row : row + 11, column : column + 11] for part in padded)
                mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
                variance_x = (weights * x * x).sum() - mean_x**2
                variance_y = (weights * y * y).sum() - mean_y**2
                covariance = (weights * x * y).sum() - mean_x * mean_y
                luminance = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
                total += luminance * (2 * covariance + 9e-4) / (variance_x + variance_y + 9e-4)
    assert ssim(image, target).item() == pytest.approx(total / (3 * 20 * 24), rel=1e-10)


def test_identical_images_have_no_loss():
    image = smooth_image(30, 40).double()
    assert loss(image, image).item() == pytest.approx(0, abs=1e-12)
    assert psnr(image, image) == HIGHEST_PSNR


def test_psnr_clamps_the_image():
    assert psnr(torch.full((3, 4, 4), 1.5), torch.ones(3, 4, 4)) == HIGHEST_PSNR
    assert psnr(torch.full((3, 4, 4), 0.9), torch.ones(3, 4, 4)) == pytest.approx(20, abs=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_the_fused_loss_agrees_with_float64_torch(size):
    image, target = pair(*size)
    exact = image.double().requires_grad_()
    expected = loss(exact, target.double())
    expected.backward()
    values, gradient = fused(image, target)
    assert values.loss == pytest.approx(expected.item(), abs=1e-7)
    clamped = (exact.detach().clamp(0, 1) - target.double()).square().mean().item()
    assert values.squared_error == pytest.approx(clamped, rel=1e-6)
    found = torch.from_numpy(pixels(gradient, *size).copy())
    assert (found - exact.grad).abs().max() < 1e-5 * exact.grad.abs().max()
    assert np.abs(gradient).sum() == pytest.approx(found.abs().sum().item())  # nothing outside the image


def test_the_number_of_threads_changes_no_bit():
    image, target = pair(200, 90)
    values, gradient = fused(image, target)
    for threads in (2, 3):
        other_values, other_gradient = fused(image, target, threads)
        assert other_values == values
        assert np.array_equal(gradient, other_gradient)


@pytest.mark.parametrize("function", [ssim, loss, psnr])
def test_images_of_different_shapes_are_refused(function):
    with pytest.raises(ValueError, match="shape"):
        function(torch.zeros(3, 4, 5), torch.zeros(3, 4, 6))
