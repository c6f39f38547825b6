"""Crops and augmentation: a crop depends on its seed alone, and its size on the step of its batch."""

import numpy as np
import pytest

from pipeline.errors import Rejected
from pipeline.training.augment import AugmentConfig, crop_side, make_crop


def test_a_crop_depends_on_its_seed_alone() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    config = AugmentConfig.model_validate(
        {"patch_size": 6, "colour_jitter": 1, "noise": 1, "jpeg": 1, "blur": 1, "min_zoom": 0.5}
    )
    first, again, other = (make_crop(rgb, 36, config, seed) for seed in (7, 7, 8))
    assert first.shape == (36, 36, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_without_augmentation_a_crop_is_a_part_of_the_image() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    plain = {"flip": 0, "colour_jitter": 0, "noise": 0, "jpeg": 0, "blur": 0, "min_zoom": 1, "patch_size": 5}
    crop = make_crop(rgb, 20, AugmentConfig.model_validate(plain), seed=1)
    parts = [rgb[top : top + 20, left : left + 20] for top in range(21) for left in range(31)]
    assert any(np.array_equal(crop, part) for part in parts)


def test_small_images_give_smaller_crops_in_whole_patches_or_are_refused() -> None:
    config = AugmentConfig.model_validate({"patch_size": 7})
    rgb = np.zeros((31, 200, 3), np.uint8)
    assert make_crop(rgb, 168, config, seed=1).shape == (28, 168, 3)
    with pytest.raises(Rejected, match="too_small"):
        make_crop(rgb[:6], 168, config, seed=1)


def test_the_side_of_a_batch_is_whole_patches_within_bounds() -> None:
    config = AugmentConfig.model_validate({"patch_size": 7, "min_crop": 60, "max_crop": 100})
    sides = {crop_side(config, 5, step) for step in range(200)}
    assert sides == {56, 63, 70, 77, 84, 91, 98}
