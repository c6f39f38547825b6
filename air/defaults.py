"""What is taken where nobody asks for anything else, and the names that can be asked for.

This module loads nothing, so commands plan with it before torch is there.
"""

from __future__ import annotations

from pathlib import Path

GRID = "grid"
"""The built-in predictor in closed form."""

COMPACT = "compact"
"""The predictor whose checkpoint this package ships."""

GROW = "grow"
"""In place of a predictor that Gaussians start from: that there is none, and they are fitted by `air.grow`."""

COMPACT_PATH = Path(__file__).parent / "predictor" / "weights" / f"{COMPACT}.safetensors"
"""The shipped checkpoint, where it is shipped."""

GRID_PATCH_SIZE, GRID_STAGES = 7, 4
"""Pixels between the grid's anchors, and its stages."""

GROWING_STEPS, STEPS_AFTER_PREDICTION = 150, 10
"""Of encoding: steps on all Gaussians together, before they are refined as they are stored."""

STORED_STEPS = 60
"""Of encoding: steps on the Gaussians as they are stored."""

PIXELS_PER_GAUSSIAN = 48
"""Of encoding without a target, when Gaussians are grown."""


def has_compact() -> bool:
    """Whether this installation ships the predictor "compact"."""
    return COMPACT_PATH.exists()


def start_of_encoding(has_target: bool) -> str:
    """What encoding starts from: the shipped network, which is quickest, or with a target growing, which gives more.

    Args:
        has_target: Whether bits, decibels or Gaussians are asked for; docs/format.md has the measurement.
    """
    return GROW if has_target or not has_compact() else COMPACT
