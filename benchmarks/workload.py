"""The Gaussians and images on which a step's speed is measured, and how many pixels they touch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from air.gaussians import SUPPORT_CUTOFF, Gaussians, activate

PATCH_SIZE = 7


@dataclass(frozen=True)
class Size:
    """How many Gaussians, and the image's size in pixels."""

    gaussians: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.gaussians:,} at {self.width} x {self.height}"


SIZES = {"8k": Size(8_140, 512, 768), "30k": Size(30_000, 512, 768), "100k": Size(100_000, 1365, 2048)}


def workload(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Raw (N, 8), anchors in reading order, target; scales log-normal about 2.5 px, as in a fitted image."""
    count, height, width = size.gaussians, size.height, size.width
    generator = torch.Generator().manual_seed(0)
    anchor = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) - 0.5
    anchor = anchor[torch.argsort(torch.floor(anchor[:, 1] / 8) * 10_000 + anchor[:, 0])]
    scale = (2.5 * torch.exp(0.5 * torch.randn(count, 2, generator=generator))).clamp(0.55, 7.45)
    raw = torch.zeros(count, 8)
    raw[:, 2:4] = torch.logit((scale - 0.5) / PATCH_SIZE)
    raw[:, 4] = torch.randn(count, generator=generator)
    raw[:, 5:8] = torch.randn(count, 3, generator=generator) * 0.1
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator)
    target = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)[0]
    return raw, anchor, target


@dataclass(frozen=True)
class Support:
    """What the supports of all Gaussians cover of the image.

    Attributes:
        pixels: Pairs of a Gaussian and a pixel inside its support.
        columns: Pairs of a Gaussian and a column of pixels with one inside.
    """

    pixels: int
    columns: int


def count_support(size: Size) -> Support:
    """Counts, in float64, the pixels with dᵀ Σ⁻¹ d <= 2 ln 255 of the workload's Gaussians."""
    raw, anchor, _ = workload(size)
    gaussians: Gaussians = activate(raw.double(), anchor.double(), PATCH_SIZE)
    reach = -2 * math.log(SUPPORT_CUTOFF)
    a, b, c = gaussians.conic().unbind(dim=1)
    x, y = gaussians.xy.unbind(dim=1)
    half_width = torch.sqrt(reach * c / (a * c - b * b))
    first = torch.ceil(x - half_width)
    pixels = columns = 0
    for step in range(int(2 * half_width.max()) + 2):
        column = first + step
        dx = column - x
        # dᵀ Σ⁻¹ d = (a - b²/c) dx² + c (dy + b/c dx)²: the rows inside are those about y - b/c dx.
        square = (reach - (a - b * b / c) * dx * dx) / c
        half_height = torch.sqrt(square.clamp(min=0))
        middle = y - b / c * dx
        top = torch.ceil(middle - half_height).clamp(min=0)
        bottom = torch.floor(middle + half_height).clamp(max=size.height - 1)
        inside = (square >= 0) & (column >= 0) & (column < size.width) & (bottom >= top)
        pixels += int((bottom - top + 1)[inside].sum())
        columns += int(inside.sum())
    return Support(pixels, columns)
