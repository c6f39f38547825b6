"""Baselines of a predictor: the plain grid that has about as many Gaussians."""

import pytest

from pipeline.evaluation.predictor import nearest_patch_size


@pytest.mark.parametrize(("wanted", "expected"), [(1, 96), (256, 6), (9216, 1), (2304, 2), (1 << 40, 1)])
def test_the_nearest_grid_has_about_as_many_gaussians(wanted: int, expected: int) -> None:
    assert nearest_patch_size(96, 96, wanted) == expected
