"""Small problems for tests of the cuda backend, on a GPU or in triton's interpreter on the CPU."""

import os

import torch

from air.fitting.grid import grid_initialization
from air.gaussians import anchors
from air.optimization.problem import Problem
from tests.support.cases import smooth_image

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
PATCH = 5


def problem(height: int, width: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Problem:
    """A perturbed start: no two numbers alike, so that no gradient vanishes by symmetry."""
    target = smooth_image(height, width, seed)
    raw = grid_initialization(target, PATCH)
    raw = raw + 0.2 * torch.randn(raw.shape, generator=torch.Generator().manual_seed(seed))
    return Problem(*(part.to(DEVICE, dtype) for part in (raw, anchors(height, width, PATCH), target)))
