"""Crops of one size for a batch, and augmentation: drawn from a sample's own seed, never from order or worker.

The augmented crop is input and target alike, as training is self-supervised: augmentation widens what the network
sees (method.md section 5), it does not ask it to undo anything.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from pydantic import Field, model_validator

from pipeline.bulk.views import check_holds_patch
from pipeline.config import Config
from pipeline.identity import seed_of


class AugmentConfig(Config):
    """Which part of an image is trained on, and what is done to it."""

    patch_size: int = Field(7, ge=2, le=64, description="pixels between anchors; crops are sized in whole patches")
    min_crop: int = Field(168, ge=2, le=8192, description="lower end of a batch's random crop side, in pixels")
    max_crop: int = Field(168, ge=2, le=8192, description="upper end of a batch's random crop side, in pixels")
    min_zoom: float = Field(
        0.5, gt=0, le=1, description="images are reduced by a random factor from this to 1, but not below the crop"
    )
    flip: float = Field(0.5, ge=0, le=1, description="share of crops that are mirrored")
    colour_jitter: float = Field(0.2, ge=0, le=1, description="share of crops with other brightness, contrast, colour")
    noise: float = Field(0.1, ge=0, le=1, description="share of crops with shot noise")
    jpeg: float = Field(0.1, ge=0, le=1, description="share of crops compressed as JPEG of quality 30 to 95")
    blur: float = Field(0.1, ge=0, le=1, description="share of crops blurred by a Gaussian of up to 1.5 pixels")

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        if self.min_crop > self.max_crop:
            raise ValueError(f"min_crop = {self.min_crop} is above max_crop = {self.max_crop}: set both")
        if self.max_crop < self.patch_size:
            raise ValueError(f"max_crop = {self.max_crop} is below patch_size = {self.patch_size}")
        return self


def crop_side(config: AugmentConfig, seed: int, step: int) -> int:
    """The side of the square crops of a global batch in pixels, whole patches: the same on every rank."""
    random = np.random.Generator(np.random.PCG64(seed_of(seed, "crop", step)))
    side = random.integers(config.min_crop, config.max_crop, endpoint=True)
    return config.patch_size * max(1, int(side) // config.patch_size)


def make_crop(rgb: np.ndarray, side: int, config: AugmentConfig, seed: int) -> np.ndarray:
    """An augmented crop.

    Args:
        rgb: The image, shape (H, W, 3), uint8.
        side: Of the crop, in pixels, whole patches.
        config: What is done.
        seed: 64 bits; equal seeds give equal crops.

    Returns:
        Shape (side, side, 3), uint8; smaller, in whole patches, where the image is.

    Raises:
        Rejected: `too_small`: the image has less than one patch in a direction.
    """
    check_holds_patch(rgb.shape[0], rgb.shape[1], config.patch_size)
    random = np.random.Generator(np.random.PCG64(seed))
    zoom, place_x, place_y, *chances = random.uniform(size=8)
    crop = _cut(rgb, side, config.patch_size, config.min_zoom + (1 - config.min_zoom) * zoom, place_x, place_y)
    flips, jitters, adds_noise, compresses, blurs = (
        chance < share
        for chance, share in zip(
            chances, (config.flip, config.colour_jitter, config.noise, config.jpeg, config.blur), strict=True
        )
    )
    if flips:
        crop = crop[:, ::-1]
    if jitters:
        crop = _jitter(crop, random)
    if blurs:
        radius = random.uniform(0.3, 1.5)
        crop = np.asarray(Image.fromarray(np.ascontiguousarray(crop)).filter(ImageFilter.GaussianBlur(radius)))
    if adds_noise:
        photons = math.exp(random.uniform(math.log(50), math.log(2000)))  # of a white pixel
        crop = np.clip(random.poisson(crop / 255 * photons) / photons * 255 + 0.5, 0, 255).astype(np.uint8)
    if compresses:
        crop = _compress(crop, int(random.integers(30, 95, endpoint=True)))
    return np.ascontiguousarray(crop)


def aligned_corner(rows: int, columns: int, side: int, patch_size: int, seed: int) -> tuple[int, int, int, int]:
    """A crop of whole patches of a grid: first row and column, and numbers of rows and columns, all in patches."""
    random = np.random.Generator(np.random.PCG64(seed))
    height, width = min(rows, side // patch_size), min(columns, side // patch_size)
    top = int(random.integers(rows - height, endpoint=True))
    left = int(random.integers(columns - width, endpoint=True))
    return top, left, height, width


def _cut(rgb: np.ndarray, side: int, patch_size: int, zoom: float, place_x: float, place_y: float) -> np.ndarray:
    height, width = rgb.shape[:2]
    # Reduce no further than to the crop, and enlarge nothing.
    zoom = min(1.0, max(zoom, side / min(height, width)))
    crop_height = min(side, patch_size * (height // patch_size))
    crop_width = min(side, patch_size * (width // patch_size))
    if zoom == 1:
        top = int(place_y * (height - crop_height + 1))
        left = int(place_x * (width - crop_width + 1))
        return rgb[top : top + crop_height, left : left + crop_width]
    part_height, part_width = min(height, crop_height / zoom), min(width, crop_width / zoom)
    top, left = place_y * (height - part_height), place_x * (width - part_width)
    box = (left, top, left + part_width, top + part_height)
    return np.asarray(Image.fromarray(rgb).resize((crop_width, crop_height), Image.Resampling.BICUBIC, box=box))


def _jitter(crop: np.ndarray, random: np.random.Generator) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(crop))
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = change(picture).enhance(random.uniform(0.7, 1.3))
    return np.asarray(picture)


def _compress(crop: np.ndarray, quality: int) -> np.ndarray:
    packed = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(crop)).save(packed, "JPEG", quality=quality)
    return np.asarray(Image.open(packed).convert("RGB"))
