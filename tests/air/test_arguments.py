"""Images as callers pass them and want them back."""

import numpy as np
import pytest
import torch
from PIL import Image

from air.arguments import image_tensor, to_levels


def test_levels_come_back() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    image = image_tensor(levels)
    assert image.shape == (3, 5, 7)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert torch.equal(image[:, 2, 3], torch.tensor(levels[2, 3].astype(np.float32) / 255))
    assert np.array_equal(to_levels(image), levels)


def test_a_pil_image_is_taken_as_rgb() -> None:
    grey = Image.new("L", (4, 3), 51)
    assert torch.equal(image_tensor(grey), torch.full((3, 3, 4), 0.2))


def test_values_are_clamped_and_rounded_to_the_nearest_level() -> None:
    values = torch.tensor([-0.3, 0.4 / 255, 0.6 / 255, 254.4 / 255, 254.6 / 255, 1.7])
    levels = to_levels(values.expand(3, 1, 6))
    assert levels.dtype == np.uint8
    assert levels.shape == (1, 6, 3)
    assert levels[0, :, 1].tolist() == [0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(4, 4, 3),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
        torch.full((3, 4, 4), 1.5),
        "photo.png",
    ],
)
def test_what_is_not_an_image_is_refused(image: object) -> None:
    with pytest.raises(ValueError, match="image"):
        image_tensor(image)
