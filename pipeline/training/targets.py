"""The targets of a crop, cut from a row of targets: each stage's canvas, active patches and their Gaussians."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from air.gaussians import RAW_CHANNELS, Gaussians, anchors, deactivate
from air.rendering.render import render
from pipeline.formats.targets import gaussians_of
from pipeline.training.augment import aligned_corner


class StageTargets(NamedTuple):
    """The targets of one stage, for one crop, or for a batch of crops with a leading dimension B.

    Attributes:
        canvas: The image that earlier stages drew, shape (3, H, W).
        active: Which patches have a Gaussian, boolean, shape (patches,).
        raw: The optimised raw numbers of active patches, shape (patches, 8); zeros in other patches.
    """

    canvas: Tensor
    active: Tensor
    raw: Tensor

    @staticmethod
    def stack(parts: Sequence[StageTargets]) -> StageTargets:
        """A batch of crops of one size."""
        return StageTargets(*(torch.stack(column) for column in zip(*parts, strict=True)))

    def to(self, device: torch.device) -> StageTargets:
        """The targets on a device."""
        return StageTargets(*(tensor.to(device) for tensor in self))


def cut_targets(
    row: dict[str, Any], rgb: np.ndarray, stages: int, side: int, canvas: str, seed: int
) -> tuple[np.ndarray, list[StageTargets]]:
    """A random crop of a view, in whole patches, and the targets of each stage in the crop.

    Args:
        row: A row of targets.
        rgb: The view of that row, shape (H, W, 3), uint8.
        stages: Number of stages; a stage that the row does not have gets no active patch.
        side: The crop's side in pixels, whole patches.
        canvas: "target" or "predicted": which Gaussians of a stage the row's next stage was built on.
        seed: Seed of the crop's position.

    Returns:
        The crop (h, w, 3), uint8, and the targets of each stage.
    """
    patch_size = row["patch_size"]
    rows, columns = rgb.shape[0] // patch_size, rgb.shape[1] // patch_size
    top, left, height, width = aligned_corner(rows, columns, side, patch_size, seed)
    corner = torch.tensor([left * patch_size, top * patch_size], dtype=torch.float32)
    stage_of, patch = np.asarray(row["stage"]), np.asarray(row["anchor"], np.int64)
    patch_row, patch_column = patch // columns - top, patch % columns - left
    inside = (patch_row >= 0) & (patch_row < height) & (patch_column >= 0) & (patch_column < width)
    anchor = anchors(rgb.shape[0], rgb.shape[1], patch_size)[torch.from_numpy(patch)]
    targets, drawn = gaussians_of(row, "target"), gaussians_of(row, canvas)
    goals = deactivate(targets, anchor, patch_size)
    # A render is a plain sum: the view's Gaussians, moved by the corner, draw exactly the crop of the view's canvas.
    moved = Gaussians(drawn.xy - corner, drawn.scale, drawn.angle, drawn.colour)

    background = torch.zeros(3, height * patch_size, width * patch_size)
    found = []
    for stage in range(stages):
        chosen = torch.from_numpy(np.flatnonzero((stage_of == stage) & inside))
        place = torch.from_numpy(patch_row * width + patch_column)[chosen]
        active = torch.zeros(height * width, dtype=torch.bool)
        active[place] = True
        raw = torch.zeros(height * width, RAW_CHANNELS)
        raw[place] = goals[chosen]
        found.append(StageTargets(background, active, raw))
        if stage + 1 < stages:
            of_stage = torch.from_numpy(np.flatnonzero(stage_of == stage))
            background = background + render(moved[of_stage], *background.shape[1:])
    rows_cut = slice(top * patch_size, (top + height) * patch_size)
    columns_cut = slice(left * patch_size, (left + width) * patch_size)
    return rgb[rows_cut, columns_cut], found
