import math

import pytest
import torch

from air.errors import InvalidGaussiansError
from air.gaussians import Gaussians, activate, anchors, deactivate, grid_shape


def some(count: int = 5, seed: int = 0) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)
    return Gaussians(
        torch.rand(count, 2, generator=generator) * 10,
        torch.rand(count, 2, generator=generator) + 0.5,
        torch.rand(count, generator=generator),
        torch.rand(count, 3, generator=generator),
    )


def test_shapes_that_do_not_fit_name_the_field():
    with pytest.raises(InvalidGaussiansError, match=r"Gaussians\.scale has shape \(4, 2\)"):
        Gaussians(torch.zeros(5, 2), torch.ones(4, 2), torch.zeros(5), torch.zeros(5, 3))


@pytest.mark.parametrize("name", ["xy", "scale", "angle", "colour"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_validate_names_the_first_bad_gaussian(name, value):
    gaussians = some()
    getattr(gaussians, name)[3] = value
    with pytest.raises(InvalidGaussiansError, match=f"Gaussian 3 has a non-finite {name}"):
        gaussians.validate()


def test_a_scale_of_zero_is_refused():
    gaussians = some()
    gaussians.scale[2, 1] = 0
    with pytest.raises(InvalidGaussiansError, match="Gaussian 2 has a scale that is not positive"):
        gaussians.validate()


def test_the_conic_is_the_inverse_covariance():
    gaussians = some().to(torch.float64)
    cos, sin = torch.cos(gaussians.angle), torch.sin(gaussians.angle)
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    covariance = rotation @ torch.diag_embed(gaussians.scale.square()) @ rotation.mT
    a, b, c = gaussians.conic().unbind(1)
    conic = torch.stack([torch.stack([a, b], 1), torch.stack([b, c], 1)], 1)
    torch.testing.assert_close(conic @ covariance, torch.eye(2, dtype=torch.float64).expand(5, 2, 2))


def test_concatenation_and_selection_are_inverse():
    first, second = some(3, 1), some(2, 2)
    both = Gaussians.concatenate([first, second])
    assert len(both) == 5
    torch.testing.assert_close(both[torch.tensor([False] * 3 + [True] * 2)].colour, second.colour)
    assert len(Gaussians.concatenate([])) == 0


def test_patches_cover_the_image_and_anchors_stay_inside():
    assert grid_shape(9, 10, 4) == (3, 3)
    places = anchors(9, 10, 4)
    assert places.shape == (9, 2)
    assert places[0].tolist() == [1.5, 1.5]
    assert places[-1].tolist() == [9.0, 8.0]


def test_activation_follows_section_2():
    raw = torch.zeros(1, 8, dtype=torch.float64)
    gaussians = activate(raw, torch.tensor([[3.0, 4.0]], dtype=torch.float64), 6)
    assert gaussians.xy.tolist() == [[3.0, 4.0]]
    assert gaussians.scale.tolist() == [[3.5, 3.5]]
    assert gaussians.angle.item() == pytest.approx(math.pi)
    assert gaussians.colour.tolist() == [[0.0, 0.0, 0.0]]


def test_deactivate_is_the_inverse_of_activate():
    raw = torch.randn(50, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    anchor = torch.rand(50, 2, dtype=torch.float64) * 20
    torch.testing.assert_close(deactivate(activate(raw, anchor, 7), anchor, 7), raw)


def test_raw_rows_of_the_wrong_width_are_refused():
    with pytest.raises(InvalidGaussiansError, match=r"raw Gaussians must be \(N, 8\)"):
        activate(torch.zeros(4, 7), torch.zeros(4, 2), 5)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan])
def test_a_factor_that_is_not_positive_is_refused(factor):
    with pytest.raises(ValueError, match="positive"):
        some().rescaled(factor)
