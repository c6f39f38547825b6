"""Views: whole patches, inside the image, within the bounds of the policy, the same for the same seed."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.bulk.views import ViewConfig, check_holds_patch, draw_view, make_view
from pipeline.errors import Reason, Rejected
from pipeline.identity import seed_of

SIZES = [(7, 7), (8, 13), (7, 900), (900, 7), (100, 150), (333, 777), (1200, 1601), (3000, 50)]

POLICIES = {
    "default": ViewConfig(),
    "small": ViewConfig(min_view_pixels=2_000, max_view_pixels=9_000),
    "crops": ViewConfig(min_crop=0.1, max_crop=0.9, aspect_jitter=2.0, min_view_pixels=1, max_view_pixels=50_000),
    "slivers": ViewConfig(min_crop=1e-6, max_crop=1e-3, aspect_jitter=8.0),
    "two": ViewConfig(patch_size=2, min_crop=0.5),
    "one": ViewConfig(min_view_pixels=1, max_view_pixels=1),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_view_keeps_the_policy(policy: ViewConfig, height: int, width: int):
    patch = policy.patch_size
    for seed in range(60):
        box = draw_view(height, width, policy, seed_of(seed, "cat", 0))
        crop_height, crop_width = box.bottom - box.top, box.right - box.left
        assert box.height % patch == 0
        assert box.width % patch == 0
        assert box.height >= patch
        assert box.width >= patch
        # Inside the image, up to rounding in float64.
        assert min(box.left, box.top) >= 0
        assert box.right <= width + 1e-9
        assert box.bottom <= height + 1e-9
        assert min(crop_height, crop_width) >= patch - 1e-9
        # Never enlarged, but for the last partial patch.
        assert box.height < crop_height + patch
        assert box.width < crop_width + patch
        # Of the wanted size where the image has the pixels, but for half a patch on each side.
        grown = (box.height + patch / 2) * (box.width + patch / 2)
        assert grown >= min(policy.min_view_pixels, crop_height * crop_width) * (1 - 1e-9)
        if box.height > patch and box.width > patch:
            assert (box.height - patch / 2) * (box.width - patch / 2) <= policy.max_view_pixels * (1 + 1e-9)


@pytest.mark.parametrize("aspect_jitter", [1.0, 2.0])
def test_crops_have_the_share_and_the_aspect_of_the_policy(aspect_jitter: float):
    policy = ViewConfig(min_crop=0.2, max_crop=0.3, aspect_jitter=aspect_jitter)
    shares, jitters = [], []
    for seed in range(300):
        box = draw_view(1000, 2000, policy, seed)
        crop_height, crop_width = box.bottom - box.top, box.right - box.left
        shares.append(crop_height * crop_width / 2e6)
        jitters.append(crop_width / crop_height / 2)
    assert 0.2 - 1e-9 <= min(shares) < 0.21
    assert 0.29 < max(shares) <= 0.3 + 1e-9
    assert 1 / aspect_jitter - 1e-9 <= min(jitters) <= 1.05 / aspect_jitter
    assert aspect_jitter / 1.05 <= max(jitters) <= aspect_jitter + 1e-9


def test_crops_lie_all_over_the_image():
    policy = ViewConfig(min_crop=0.05, max_crop=0.05)
    boxes = [draw_view(1000, 1000, policy, seed) for seed in range(300)]
    room = 1000 * (1 - math.sqrt(0.05))
    for edges in ([box.left for box in boxes], [box.top for box in boxes]):
        assert min(edges) < 0.05 * room
        assert max(edges) > 0.95 * room
        assert 0.4 * room < np.mean(edges) < 0.6 * room


def test_sizes_are_spread_between_the_bounds():
    policy = ViewConfig(min_view_pixels=10_000, max_view_pixels=90_000)
    pixels = [box.height * box.width for box in (draw_view(1000, 1000, policy, seed) for seed in range(300))]
    assert min(pixels) < 16_000
    assert max(pixels) > 84_000


def test_a_seed_is_a_view_and_views_differ():
    rgb = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    policy = ViewConfig(min_crop=0.2, max_crop=0.5)
    views = [make_view(rgb, policy, seed_of(0, "cat", view)) for view in range(4)]
    again = [make_view(rgb, policy, seed_of(0, "cat", view)) for view in reversed(range(4))][::-1]
    assert all(np.array_equal(one, other) for one, other in zip(views, again, strict=True))
    boxes = {draw_view(60, 90, policy, seed_of(0, key, view)) for view in range(4) for key in ("cat", "dog")}
    assert len(boxes) == 8
    assert draw_view(60, 90, policy, seed_of(1, "cat", 0)) != draw_view(60, 90, policy, seed_of(0, "cat", 0))


def test_an_image_of_whole_patches_within_the_bounds_is_its_own_view():
    rgb = np.random.default_rng(1).integers(0, 256, (21, 70, 3), dtype=np.uint8)
    assert np.array_equal(make_view(rgb, ViewConfig(), 5), rgb)


def test_a_crop_shows_the_pixels_of_its_box():
    """A ramp keeps its values: the mean over the view is the mean over the box."""
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8), (100, 200))
    rgb = np.stack([ramp, ramp, ramp], axis=2)
    policy = ViewConfig(min_crop=0.1, max_crop=0.3)
    for seed in range(20):
        box = draw_view(100, 200, policy, seed)
        view = make_view(rgb, policy, seed)
        assert view.shape == (box.height, box.width, 3)
        assert view.dtype == np.uint8
        assert abs(view.mean() - ((box.left + box.right) / 2 - 0.5)) < 1


@pytest.mark.parametrize(("height", "width"), [(1, 400), (400, 1), (6, 6), (1, 1)])
def test_less_than_a_patch_is_refused(height: int, width: int):
    with pytest.raises(Rejected) as caught:
        make_view(np.zeros((height, width, 3), np.uint8), ViewConfig(patch_size=7), 0)
    assert caught.value.reason == "too_small"
    assert f"{width} x {height}" in caught.value.message


def test_bounds_that_contradict_each_other_are_refused():
    with pytest.raises(ValidationError, match="min_view_pixels"):
        ViewConfig(max_view_pixels=100)
    with pytest.raises(ValidationError, match="min_crop"):
        ViewConfig(min_crop=0.5, max_crop=0.4)


def test_an_image_smaller_than_a_patch_is_too_small():
    check_holds_patch(16, 20, 16)
    with pytest.raises(Rejected, match="20 x 15 pixels; one patch needs 16 x 16") as caught:
        check_holds_patch(15, 20, 16)
    assert caught.value.reason == Reason.TOO_SMALL
