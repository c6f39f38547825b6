"""PSNR and MS-SSIM against their formulas, written out in float64."""

import numpy as np
import pytest
import torch

from air.metrics import HIGHEST_PSNR, ms_ssim, psnr

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def naive_ms_ssim(x: np.ndarray, y: np.ndarray, scales: int) -> float:
    """The mean over channels, window by window, of (3, H, W) in float64."""
    weights = np.array(WEIGHTS[:scales]) / sum(WEIGHTS[:scales])
    return float(np.mean([naive_channel(a, b, weights) for a, b in zip(x.astype(float), y.astype(float), strict=True)]))


def naive_channel(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    result = 1.0
    for scale, weight in enumerate(weights):
        if scale:
            x, y = halve(x), halve(y)
        luminance, contrast = maps(x, y)
        last = scale == len(weights) - 1
        result *= max(0.0, (luminance * contrast if last else contrast).mean()) ** weight
    return result


def halve(x: np.ndarray) -> np.ndarray:
    rows, columns = range(0, x.shape[0], 2), range(0, x.shape[1], 2)
    return np.array([[x[row : row + 2, column : column + 2].mean() for column in columns] for row in rows])


def maps(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Luminance and contrast-structure at every place where the window fits, from central moments."""
    heights, widths = (min(11, side) for side in x.shape)
    down, across = (np.exp(-((np.arange(n) - (n - 1) / 2) ** 2) / (2 * 1.5**2)) for n in (heights, widths))
    window = np.outer(down, across) / np.outer(down, across).sum()
    x, y = (np.lib.stride_tricks.sliding_window_view(each, window.shape) for each in (x, y))
    mean_x, mean_y = ((each * window).sum(axis=(2, 3)) for each in (x, y))
    apart_x, apart_y = x - mean_x[..., None, None], y - mean_y[..., None, None]
    variance_x, variance_y = ((each**2 * window).sum(axis=(2, 3)) for each in (apart_x, apart_y))
    covariance = (apart_x * apart_y * window).sum(axis=(2, 3))
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    return luminance, (2 * covariance + 0.03**2) / (variance_x + variance_y + 0.03**2)


def picture(height: int, width: int) -> torch.Tensor:
    """Waves, an edge and a little noise: structure at all scales, values in [0, 1]."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    waves = 0.5 + 0.2 * torch.sin(rows / 9) * torch.cos(columns / 5) + 0.2 * (rows > columns)
    return (waves + 0.05 * torch.randn(3, height, width, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize(
    ("height", "width", "scales"),
    [
        (192, 177, 5),
        (161, 170, 5),
        (160, 300, 4),
        (81, 90, 4),
        (80, 81, 3),
        (21, 40, 2),
        (20, 40, 1),
        (7, 30, 1),
        (1, 1, 1),
    ],
)
def test_ms_ssim_is_that_of_the_formula(height: int, width: int, scales: int) -> None:
    target = picture(height, width)
    noise = torch.randn(3, height, width, generator=torch.Generator().manual_seed(1))
    image = (target + 0.1 * noise).clamp(0, 1)
    assert ms_ssim(image, target) == pytest.approx(naive_ms_ssim(image.numpy(), target.numpy(), scales), abs=2e-6)


def test_ms_ssim_of_the_same_image_is_one_and_falls_with_noise() -> None:
    target = picture(180, 200)
    noise = torch.randn(3, 180, 200, generator=torch.Generator().manual_seed(2))
    values = [ms_ssim(target + share * noise, target) for share in (0.0, 0.02, 0.05, 0.1, 0.2)]
    assert values[0] == pytest.approx(1, abs=1e-6)
    assert values == sorted(values, reverse=True)


def test_ms_ssim_hardly_minds_a_change_of_brightness_that_psnr_minds() -> None:
    """Luminance is judged at the coarsest scale alone: the reason to look at both figures."""
    target = picture(180, 200) * 0.8
    noise = torch.randn(3, 180, 200, generator=torch.Generator().manual_seed(3))
    brighter, noisy = target + 0.05, target + 0.05 * noise
    assert psnr(brighter, target) == pytest.approx(psnr(noisy, target), abs=0.3)
    assert ms_ssim(brighter, target) > 0.99 > ms_ssim(noisy, target) + 0.01


def test_an_opposite_image_counts_as_zero() -> None:
    target = picture(60, 60)
    assert ms_ssim(1 - target, target) == 0


def test_images_are_clamped_before_they_are_judged() -> None:
    target = picture(50, 50)
    image = target + torch.where(target > 0.5, 0.4, -0.4)
    assert ms_ssim(image, target) == ms_ssim(image.clamp(0, 1), target)
    assert psnr(image, target) == psnr(image.clamp(0, 1), target)
    assert psnr(target, target) == HIGHEST_PSNR


@pytest.mark.parametrize("metric", [psnr, ms_ssim])
def test_shapes_must_agree(metric) -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        metric(torch.zeros(3, 20, 20), torch.zeros(3, 20, 21))
