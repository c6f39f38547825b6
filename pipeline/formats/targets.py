"""Converts rows of the table of targets to Gaussians and back. This module must not know files or jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from air.gaussians import Gaussians
from pipeline.formats import tables


def gaussians_of(row: Mapping[str, Any], which: str, stages: Sequence[int] | None = None) -> Gaussians:
    """The Gaussians of a target row, float32.

    Args:
        row: A row of the targets table.
        which: `predicted` or `target`.
        stages: Keeps the Gaussians of these stages; None keeps all.
    """
    chosen = slice(None) if stages is None else np.isin(np.asarray(row["stage"]), stages)
    x, y, scale_1, scale_2, angle, *colour = (
        torch.from_numpy(np.asarray(row[f"{which}_{name}"], np.float32)[chosen]) for name in tables.GAUSSIAN_QUANTITIES
    )
    return Gaussians(
        xy=torch.stack([x, y], dim=1),
        scale=torch.stack([scale_1, scale_2], dim=1),
        angle=angle,
        colour=torch.stack(colour, dim=1),
    )


def columns_of(which: str, gaussians: Gaussians) -> dict[str, np.ndarray]:
    """The columns of a target row that hold Gaussians, by name, float32: the inverse of `gaussians_of`.

    Args:
        which: `predicted` or `target`.
        gaussians: N Gaussians on the CPU.

    Returns:
        Arrays of shape (N,).
    """
    quantities = (*gaussians.xy.unbind(1), *gaussians.scale.unbind(1), gaussians.angle, *gaussians.colour.unbind(1))
    return {
        f"{which}_{name}": values.numpy().astype(np.float32)
        for name, values in zip(tables.GAUSSIAN_QUANTITIES, quantities, strict=True)
    }
