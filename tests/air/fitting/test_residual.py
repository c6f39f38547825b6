"""Gaussians for a residual: the compiled search is that in plain torch, and new Gaussians lie along edges."""

import math

import pytest
import torch

from air.fitting.residual import RAW_SCALE, STRETCH, residual_peaks
from air.gaussians import activate

PATCH = 8


def noise(height: int, width: int) -> torch.Tensor:
    return 0.1 * torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (5, 5), (9, 16), (40, 64), (33, 77)])
@pytest.mark.parametrize("patch_size", [1, 8, 40])
@pytest.mark.parametrize("raw_scale", [-3.5, -2.0])
def test_compiled_peaks_are_those_of_torch_in_float64(
    shape: tuple[int, int], patch_size: int, raw_scale: float
) -> None:
    residual = noise(*shape)
    for count in (3, shape[0] * shape[1] // 20):
        raw, anchor = residual_peaks(residual, patch_size, count, raw_scale=raw_scale)
        expected_raw, expected_anchor = residual_peaks(residual.double(), patch_size, count, raw_scale=raw_scale)
        assert raw.shape == expected_raw.shape
        torch.testing.assert_close(anchor.double(), expected_anchor)
        torch.testing.assert_close(raw.double(), expected_raw, rtol=1e-4, atol=1e-4)


def test_where_peaks_run_out_other_pixels_follow_largest_first() -> None:
    residual = torch.zeros(3, 21, 30)
    residual[:, 10, 12] = 0.5
    raw, anchor = residual_peaks(residual, PATCH, 1000)
    xy = activate(raw, anchor, PATCH).xy.round().long()
    distance = (xy - torch.tensor([12, 10])).double().norm(dim=1)
    assert distance[0] == 0
    assert 9 < len(raw) < 1000  # the pixels within the matched filter's reach
    assert len(set(map(tuple, xy.tolist()))) == len(raw)
    assert (distance.diff() > -1e-6).all()


def test_of_equal_peaks_the_first_in_the_image_come_first() -> None:
    residual = torch.zeros(3, 40, 50)
    places = [(4, 5), (4, 30), (20, 8), (30, 44)]
    for row, column in places:
        residual[:, row, column] = 0.25
    for precision in (torch.float32, torch.float64):
        raw, anchor = residual_peaks(residual.to(precision), PATCH, 3)
        xy = activate(raw, anchor, PATCH).xy.round().long()
        assert xy.tolist() == [[column, row] for row, column in places[:3]]


@pytest.mark.parametrize("degrees", [0, 30, 45, 90, 120, 170])
def test_new_gaussians_are_stretched_along_a_line(degrees: int) -> None:
    angle = math.radians(degrees)
    y, x = torch.meshgrid(torch.arange(48.0) - 24, torch.arange(64.0) - 32, indexing="ij")
    from_line = y * math.cos(angle) - x * math.sin(angle)
    residual = (0.4 * torch.exp(-0.5 * (from_line / 2).square())).expand(3, -1, -1).contiguous()
    raw, anchor = residual_peaks(residual, PATCH, 20)
    found = activate(raw, anchor, PATCH)
    inner = ((found.xy - torch.tensor([32.0, 24.0])).abs() < torch.tensor([20.0, 14.0])).all(dim=1)
    assert inner.any()
    along = found.angle[inner] + math.pi / 2  # the second axis
    assert (torch.sin(along - angle).abs() < 0.05).all()
    torch.testing.assert_close(raw[inner, 2], torch.full_like(raw[inner, 2], RAW_SCALE - STRETCH), rtol=0, atol=0.05)
    torch.testing.assert_close(raw[inner, 3], torch.full_like(raw[inner, 3], RAW_SCALE + STRETCH), rtol=0, atol=0.05)


def test_a_stretched_gaussian_has_the_integral_of_a_round_one() -> None:
    flat = torch.zeros(3, 30, 30)
    flat[:, 15, 15] = 0.3
    line = torch.zeros(3, 30, 30)
    line[:, :, 15] = 0.1
    raw, anchor = residual_peaks(line, PATCH, 1)
    stretched = activate(raw, anchor, PATCH)
    round_raw, round_anchor = residual_peaks(flat, PATCH, 1)
    round_one = activate(round_raw, round_anchor, PATCH)
    torch.testing.assert_close(round_one.scale[0, 0], round_one.scale[0, 1], rtol=1e-3, atol=0)
    assert stretched.scale[0, 1] > 2 * stretched.scale[0, 0]
    area = float(round_one.scale.prod())
    # A line of height 0.1 gives the round filter a value that is larger by the sum of its taps along the line.
    scale = float(round_one.scale[0, 0])
    taps = [
        math.exp(-0.5 * (distance / scale) ** 2) for distance in range(-math.ceil(3 * scale), math.ceil(3 * scale) + 1)
    ]
    expected = float(round_one.colour[0, 0]) / 3 * sum(taps) * area / float(stretched.scale.prod())
    assert float(stretched.colour[0, 0]) == pytest.approx(expected, rel=1e-2)
