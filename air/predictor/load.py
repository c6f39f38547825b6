"""Loads predictors by name or path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from air import defaults
from air.defaults import COMPACT, GRID, GRID_PATCH_SIZE
from air.errors import CheckpointError
from air.predictor.base import GridPredictor, Predictor


def load_predictor(
    name_or_path: str | Path, patch_size: int | None = None, others: Sequence[str] = (GRID,)
) -> Predictor:
    """Loads a predictor.

    Args:
        name_or_path: "grid", the closed form; "compact", the checkpoint that this package ships; or the path of a
            checkpoint NAME.safetensors with its card beside it.
        patch_size: Pixels between anchors; by default 7 for the grid. A network has a fixed patch size.
        others: As for `checkpoint_path`.

    Raises:
        CheckpointError: There is no such predictor, its files cannot be read, or it has another patch size.

    Example:
        >>> load_predictor("grid", patch_size=5).patch_size
        5
    """
    if name_or_path == GRID:
        return GridPredictor(GRID_PATCH_SIZE if patch_size is None else patch_size)
    from air.predictor.checkpoint import load_checkpoint

    network, _ = load_checkpoint(checkpoint_path(name_or_path, others))
    if patch_size is not None and network.patch_size != patch_size:
        raise CheckpointError(
            f"{name_or_path} has patch size {network.patch_size}, not {patch_size}; leave patch_size out"
        )
    return network


def checkpoint_path(name_or_path: str | Path, others: Sequence[str] = (GRID,)) -> Path:
    """The path of a predictor's checkpoint.

    Args:
        name_or_path: "compact" or the path of a checkpoint.
        others: Further names that the caller accepts, which the message about an unknown name lists.

    Raises:
        CheckpointError: The name is neither "compact" nor the path of a checkpoint, or this installation does not ship
            "compact".
    """
    if name_or_path == COMPACT:
        if not defaults.has_compact():
            raise CheckpointError(
                f"this installation ships no compact predictor ({defaults.COMPACT_PATH} is missing): "
                "train one with `air train` and give its path, or use grid"
            )
        return defaults.COMPACT_PATH
    if not str(name_or_path).endswith(".safetensors"):
        known = ", ".join([*others, COMPACT])
        raise CheckpointError(f"unknown predictor {str(name_or_path)!r}: give {known} or a file NAME.safetensors")
    return Path(name_or_path)
