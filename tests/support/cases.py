"""Random Gaussians for tests, without any pixel on the edge of a support.

At the cut a weight jumps by 1/255, so float32 and float64 may disagree there about a whole pixel. Cases therefore
drop the Gaussians that have a pixel within a relative 1e-4 of the cut.
"""

import math

import torch
from torch import Tensor

from air.gaussians import SUPPORT_CUTOFF, Gaussians

# The pictures are so small that torch's threads would only wait for each other.
torch.set_num_threads(1)

BORDER = -2 * math.log(SUPPORT_CUTOFF)


def away_from_the_cut(gaussians: Gaussians, height: int, width: int) -> Gaussians:
    exact = gaussians.to(torch.float64)
    rows, columns = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    dx = columns - exact.xy[:, 0, None, None]
    dy = rows - exact.xy[:, 1, None, None]
    a, b, c = (part[:, None, None] for part in exact.conic().unbind(1))
    distance = a * dx * dx + 2 * b * dx * dy + c * dy * dy
    near = ((distance - BORDER).abs() < 1e-3).flatten(1).any(1)
    return gaussians[~near]


def random_gaussians(
    count: int, height: int, width: int, seed: int, *, median: float = 2.5, spread: float = 0.5, outside: float = 0.0
) -> Gaussians:
    """Log-normal scales around `median` px, centres up to `outside` px off the image."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height]) + 2 * outside
    gaussians = Gaussians(
        torch.rand(count, 2, generator=generator) * size - 0.5 - outside,
        median * torch.exp(spread * torch.randn(count, 2, generator=generator)),
        torch.rand(count, generator=generator) * 20 - 10,
        torch.tanh(torch.randn(count, 3, generator=generator) * 0.5),
    )
    return away_from_the_cut(gaussians, height, width)


def needles(height: int, width: int, angles: int = 36) -> Gaussians:
    """Gaussians of 0.6 px by 9 px at all angles, all around the middle."""
    generator = torch.Generator().manual_seed(angles)
    gaussians = Gaussians(
        torch.tensor([width / 2, height / 2]) + torch.rand(angles, 2, generator=generator) * 6 - 3,
        torch.tensor([[9.0, 0.6]]).repeat(angles, 1),
        torch.arange(angles) * (math.pi / angles),
        torch.tanh(torch.randn(angles, 3, generator=generator)) / 4,
    )
    return away_from_the_cut(gaussians, height, width)


def smooth_image(height: int, width: int, seed: int = 0) -> Tensor:
    """A picture in [0, 1] with detail down to about 8 px, shape (3, height, width), float32."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)[0]
