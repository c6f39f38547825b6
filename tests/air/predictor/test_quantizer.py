"""Quantisers: nearest levels, ranges that follow the patch size, angles around the circle, straight-through slopes."""

import math

import numpy as np
import pytest
import torch

from air.codec.uniform import (
    ANGLE,
    DEFAULT_BITS,
    UniformQuantizer,
    channel_values,
    fit_uniform_quantizer,
    gaussians_from_channels,
)
from air.gaussians import Gaussians, activate, anchors
from air.predictor.quantizer import ImageAdaptiveQuantizer


def raw_gaussians(patch_size: int, seed: int = 0) -> tuple[Gaussians, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    anchor = anchors(9 * patch_size, 11 * patch_size, patch_size)
    return activate(torch.randn(len(anchor), 8, generator=generator), anchor, patch_size), anchor


def circular(difference: torch.Tensor) -> torch.Tensor:
    return torch.remainder(difference + math.pi / 2, math.pi) - math.pi / 2


def test_channels_and_back_are_the_same_gaussians():
    gaussians, anchor = raw_gaussians(7)
    back = gaussians_from_channels(channel_values(gaussians, anchor), anchor)
    for name in ("xy", "scale", "angle", "colour"):
        torch.testing.assert_close(getattr(back, name), getattr(gaussians, name), rtol=0, atol=1e-5)


def test_luma_and_colour_differences_are_those_of_bt601():
    white_and_red = Gaussians(
        torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2), torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    )
    colour = channel_values(white_and_red, torch.zeros(2, 2))[:, 5:8]
    expected = torch.tensor([[1, 0, 0], [0.299, 0.5, -0.168736]])  # ITU-R BT.601
    torch.testing.assert_close(colour, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [DEFAULT_BITS, (3, 4, 5, 6, 2, 1, 9, 12)])
def test_a_fitted_quantiser_errs_by_half_a_step_at_most(bits: tuple[int, ...]):
    gaussians, anchor = raw_gaussians(5)
    values = channel_values(gaussians, anchor).double()
    quantizer = fit_uniform_quantizer(values, bits)
    symbols = quantizer.symbols(values)
    assert symbols.min() >= 0
    assert (symbols < 2 ** np.array(bits)).all()
    error = quantizer.values(symbols).double() - values
    error[:, ANGLE] = circular(error[:, ANGLE])
    # Lows and steps are rounded to 2^-20 in the file, so the last level may be 2^bits of that away from the end.
    allowed = torch.tensor(quantizer.step) / 2**20 / 2 + torch.tensor([2.0**b for b in bits]) / 2**20 + 1e-6
    assert bool((error.abs() <= allowed).all())


def test_quantising_twice_changes_nothing():
    gaussians, anchor = raw_gaussians(6)
    values = channel_values(gaussians, anchor)
    quantizer = fit_uniform_quantizer(values)
    symbols = quantizer.symbols(values)
    assert np.array_equal(quantizer.symbols(quantizer.values(symbols)), symbols)


@pytest.mark.parametrize("count", [0, 1])
def test_none_one_and_constant_values_have_quantisers(count: int):
    values = torch.full((count, 8), 0.25)
    quantizer = fit_uniform_quantizer(values)
    restored = quantizer.values(quantizer.symbols(values))
    assert restored.shape == (count, 8)
    torch.testing.assert_close(circular(restored - values), torch.zeros(count, 8), rtol=0, atol=math.pi / 256 + 1e-6)


def test_values_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="finite"):
        fit_uniform_quantizer(torch.full((2, 8), math.nan))
    with pytest.raises(ValueError, match="bits"):
        fit_uniform_quantizer(torch.zeros(2, 8), (8, 8, 7, 7, 7, 8, 4, 17))


@pytest.mark.parametrize("turns", [-2, -1, 1, 5])
def test_an_angle_half_a_turn_on_has_the_same_symbol(turns: int):
    values = torch.zeros(500, 8, dtype=torch.float64)
    values[:, ANGLE] = torch.linspace(0.001, math.pi, 500, dtype=torch.float64)
    turned = values.clone()
    turned[:, ANGLE] += turns * math.pi
    for quantizer in (fit_uniform_quantizer(values), ImageAdaptiveQuantizer(0, 7).table()):
        symbols = quantizer.symbols(values)
        assert np.array_equal(quantizer.symbols(turned), symbols)
        error = circular(quantizer.values(symbols)[:, ANGLE].double() - values[:, ANGLE])
        assert float(error.abs().max()) <= quantizer.step[ANGLE] / 2**20 / 2 + 1e-6


def test_the_learned_quantiser_starts_at_the_published_constants():
    step, low = ImageAdaptiveQuantizer(0, 7).steps_and_lows()
    published_steps = [-3.0427, -3.0022, -2.9553, -3.2385, -3.3192, -5.3675, -4.0653, -4.4090]
    published_lows = [-6.7962, -6.0476, 0.4933, 0.5032, 1.0155, -0.2550, -0.0688, -0.1273]
    torch.testing.assert_close(step, torch.tensor([math.log1p(math.exp(v)) for v in published_steps]))
    torch.testing.assert_close(low, torch.tensor(published_lows))


@pytest.mark.parametrize("patch_size", [1, 5, 14])
def test_the_levels_cover_the_same_share_of_every_patch_size(patch_size: int):
    step, low = ImageAdaptiveQuantizer(0, 7).steps_and_lows()
    other_step, other_low = ImageAdaptiveQuantizer(0, patch_size).steps_and_lows()
    torch.testing.assert_close(other_step[0:4] / patch_size, step[0:4] / 7)
    torch.testing.assert_close(other_low[0:2] / patch_size, low[0:2] / 7)
    # Scales start at 0.5 pixels whatever the patch size.
    torch.testing.assert_close((other_low[2:4] - 0.5) / patch_size, (low[2:4] - 0.5) / 7)
    torch.testing.assert_close(other_step[4:8], step[4:8])


def test_fewer_bits_span_the_same_range():
    step, _ = ImageAdaptiveQuantizer(0, 7).steps_and_lows()
    coarse, _ = ImageAdaptiveQuantizer(0, 7, (4,) * 8).steps_and_lows()
    torch.testing.assert_close(coarse * 15, step * torch.tensor([2.0**b - 1 for b in DEFAULT_BITS]))


def test_forward_gives_what_the_file_would_give():
    torch.manual_seed(0)
    gaussians, anchor = raw_gaussians(7)
    values = channel_values(gaussians, anchor)
    quantizer = ImageAdaptiveQuantizer(6, 7)
    assert quantizer.adapt is not None
    torch.nn.init.normal_(quantizer.adapt.weight)
    feature = torch.randn(6)
    quantised, _ = quantizer(values, feature)
    stored = quantizer.table(feature).values(quantizer.symbols(values, feature))
    difference = quantised.detach() - stored
    difference[:, ANGLE] = circular(difference[:, ANGLE])
    # Lows and steps of the file are rounded to 2^-20, times up to 255 levels; a value on a border may go either way.
    agree = (difference.abs() < 300 / 2**20).all(dim=1)
    assert float(agree.float().mean()) > 0.9


def test_features_of_several_images_act_on_their_own_gaussians():
    torch.manual_seed(1)
    gaussians, anchor = raw_gaussians(7)
    values = channel_values(gaussians, anchor)[:30]
    quantizer = ImageAdaptiveQuantizer(4, 7)
    assert quantizer.adapt is not None
    torch.nn.init.normal_(quantizer.adapt.weight)
    features = torch.randn(2, 4)
    image = torch.tensor([0] * 10 + [1] * 20)
    together, _ = quantizer(values, features, image)
    torch.testing.assert_close(together[:10], quantizer(values[:10], features[0])[0])
    torch.testing.assert_close(together[10:], quantizer(values[10:], features[1])[0])
    with pytest.raises(ValueError, match="feature"):
        quantizer(values)


def test_gradients_pass_the_rounding_and_stop_at_the_ends():
    quantizer = ImageAdaptiveQuantizer(0, 7)
    step, low = (part.detach() for part in quantizer.steps_and_lows())
    values = (low + 3.3 * step).repeat(3, 1)
    values[1] = low - 2 * step  # below the first level
    values[2] = low + step * (2 ** torch.tensor(DEFAULT_BITS) + 5)  # above the last one
    values.requires_grad_()
    quantised, _ = quantizer(values)
    quantised.sum().backward()
    assert values.grad is not None
    expected = torch.tensor([[1.0] * 8, [0.0] * 8, [0.0] * 8])
    expected[:, ANGLE] = 1  # a circle has no ends
    torch.testing.assert_close(values.grad, expected)


def test_the_step_learns_from_the_rounding_error():
    quantizer = ImageAdaptiveQuantizer(0, 7)
    step, low = (part.detach() for part in quantizer.steps_and_lows())
    quantised, _ = quantizer((low + 3.3 * step)[None])
    (slope,) = torch.autograd.grad(quantised.sum(), quantizer.step_logit)
    # d/dstep of low + step·3, less the share of the value itself, is 3 - 3.3; times softplus'.
    softplus_slope = 1 - torch.exp(-step)
    torch.testing.assert_close(slope, -0.3 * softplus_slope, rtol=1e-3, atol=1e-6)


def test_the_distortion_loss_is_a_hundredth_of_the_mean_errors_of_the_groups():
    quantizer = ImageAdaptiveQuantizer(0, 7)
    step, low = (part.detach() for part in quantizer.steps_and_lows())
    values = (low + (4 + 0.25) * step).repeat(5, 1)
    values[:, ANGLE] += math.pi
    _, loss = quantizer(values)
    groups = (step[0:2].mean(), step[2:4].mean(), step[4], step[5:8].mean())
    torch.testing.assert_close(loss.detach(), 0.01 * 0.25 * torch.stack(groups).sum(), rtol=1e-3, atol=1e-7)
    _, nothing = quantizer(torch.zeros(0, 8))
    assert float(nothing) == 0


def test_files_hold_whole_numbers():
    quantizer = UniformQuantizer.rounded((8,) * 8, [0.1] * 8, [0.01] * 8)
    symbols = np.arange(256, dtype=np.int32)[:, None].repeat(8, axis=1)
    # The definition, in whole numbers: (low + k · step) / 2^20, rounded to float32 once.
    expected = [np.float32((104858 + k * 10486) / 2**20) for k in range(256)]
    assert quantizer.values(symbols)[:, 0].tolist() == expected
