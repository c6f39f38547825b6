"""Default values, and the names of the built-in predictors.

This module imports nothing heavy: commands plan their work with it before they load torch.
"""

from __future__ import annotations

from pathlib import Path

GRID = "grid"
"""The predictor in closed form (`air.predictor.base.GridPredictor`)."""

COMPACT = "compact"
"""The predictor whose checkpoint this package ships."""

GROW = "grow"
"""Given in place of a predictor: Gaussians are not predicted, but grow in a fit within a budget (`air.fit`)."""

AUTO = "auto"
"""The shipped update rule in short fits, and Adam in long ones."""

ADAM = "adam"
"""The update rule before any training, which is the cautious Adam."""

SHIPPED = "shipped"
"""The update rule that this package ships."""

COMPACT_PATH = Path(__file__).parent / "predictor" / "weights" / f"{COMPACT}.safetensors"
"""Path of the shipped checkpoint. An installation may lack it."""

RULE_PATH = Path(__file__).parent / "optimization" / "weights" / "rule.safetensors"
"""Path of the shipped update rule. An installation may lack it."""

GRID_PATCH_SIZE, GRID_STAGES = 7, 4
"""Pixels between the grid's anchors, and its number of stages."""

GROWING_STEPS, STEPS_AFTER_PREDICTION = 150, 10
"""Encoding's steps on all Gaussians before it quantises them: in a growing fit, and after a prediction."""

STORED_STEPS = 60
"""Steps that encoding makes on the quantised Gaussians."""

FIT_STEPS = 100
"""Updates of `air.fit`, if neither steps nor seconds are given."""

PIXELS_PER_GAUSSIAN = 16
"""Pixels for each Gaussian of `air.fit`, if no number is given."""

PIXELS_PER_STORED_GAUSSIAN = 48
"""Pixels for each Gaussian that encoding grows, if no target is given."""


def has_rule() -> bool:
    """Whether this installation ships a learned update rule."""
    return RULE_PATH.exists()


def has_compact() -> bool:
    """Whether this installation ships the predictor "compact"."""
    return COMPACT_PATH.exists()


def start_of_encoding(has_target: bool) -> str:
    """The default start of encoding: the shipped network, which is fastest, or `GROW`.

    Args:
        has_target: Whether a target of bits, decibels or Gaussians is given. Then the default is `GROW`, which gives
            more decibels for the same bits (docs/format.md has the measurement).
    """
    return GROW if has_target or not has_compact() else COMPACT
