"""Views: resized and cropped renditions of an image, sized in whole patches, drawn from a seeded policy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.errors import Reason, Rejected


class ViewConfig(Config):
    """How views of an image are drawn.

    A view is a crop of `min_crop` to `max_crop` of the image's area, at a place and of an aspect drawn at random, then
    reduced to `min_view_pixels` to `max_view_pixels`. An image is never enlarged, but for the last partial patch.
    """

    patch_size: int = Field(7, ge=2, le=64, description="pixels between anchors; views are sized in whole patches")
    views: int = Field(1, ge=1, le=1000, description="views of each image")
    min_view_pixels: int = Field(160_000, ge=1, description="lower end of a view's random size, in pixels")
    max_view_pixels: int = Field(640_000, ge=1, description="upper end of a view's random size, in pixels")
    min_crop: float = Field(1.0, gt=0, le=1, description="lower end of a view's random share of the image's area")
    max_crop: float = Field(1.0, gt=0, le=1, description="upper end of a view's random share of the image's area")
    aspect_jitter: float = Field(
        1.0, ge=1, le=8, description="a crop's aspect is the image's times up to this, or divided by it"
    )

    @model_validator(mode="after")
    def _ordered(self) -> ViewConfig:
        for low, high in (("min_view_pixels", "max_view_pixels"), ("min_crop", "max_crop")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} = {getattr(self, low)} is above {high} = {getattr(self, high)}: set both")
        return self


@dataclass(frozen=True)
class ViewBox:
    """Which part of an image a view shows, and how large.

    Attributes:
        left, top, right, bottom: The part, in pixels of the image.
        height, width: The view's size in pixels, whole patches.
    """

    left: float
    top: float
    right: float
    bottom: float
    height: int
    width: int


def draw_view(height: int, width: int, config: ViewConfig, seed: int) -> ViewBox:
    """The view of an image that a seed stands for.

    Args:
        height: Of the image, in pixels, at least one patch.
        width: Likewise.
        config: The policy.
        seed: 64 bits; equal seeds give equal views.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    share = random.uniform(config.min_crop, config.max_crop)
    aspect = math.exp(random.uniform(-1, 1) * math.log(config.aspect_jitter))
    place_x, place_y = random.uniform(size=2)
    pixels = random.uniform(config.min_view_pixels, config.max_view_pixels)

    patch = config.patch_size
    crop_width = min(width, max(patch, width * math.sqrt(share * aspect)))
    crop_height = min(height, max(patch, height * math.sqrt(share / aspect)))
    left, top = place_x * (width - crop_width), place_y * (height - crop_height)
    scale = min(1.0, math.sqrt(pixels / (crop_width * crop_height)))
    return ViewBox(
        left=left,
        top=top,
        right=left + crop_width,
        bottom=top + crop_height,
        height=patch * max(1, round(crop_height * scale / patch)),
        width=patch * max(1, round(crop_width * scale / patch)),
    )


def check_holds_patch(height: int, width: int, patch_size: int) -> None:
    """Refuses an image of `height` x `width` pixels that is smaller than one square patch of `patch_size` pixels.

    Raises:
        Rejected: `too_small`.
    """
    if min(height, width) < patch_size:
        message = f"{width} x {height} pixels; one patch needs {patch_size} x {patch_size}"
        raise Rejected(Reason.TOO_SMALL, message)


def make_view(rgb: np.ndarray, config: ViewConfig, seed: int) -> np.ndarray:
    """One view of an image.

    Args:
        rgb: The image, shape (H, W, 3), uint8.
        config: The policy.
        seed: 64 bits.

    Returns:
        Shape (h, w, 3), uint8; h and w are multiples of the patch size.

    Raises:
        Rejected: `too_small`: the image has less than one patch in a direction.
    """
    height, width = rgb.shape[:2]
    check_holds_patch(height, width, config.patch_size)
    box = draw_view(height, width, config, seed)
    corners = (box.left, box.top, box.right, box.bottom)
    if corners == (0, 0, width, height) and (box.height, box.width) == (height, width):
        return rgb
    resized = Image.fromarray(rgb).resize((box.width, box.height), Image.Resampling.LANCZOS, box=corners)
    return np.asarray(resized)
