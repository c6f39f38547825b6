"""Small checkpoints of predictors and update rules for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from air.optimization.rule_file import save_rule
from air.predictor.checkpoint import save_checkpoint
from air.predictor.network import build
from pipeline.rules.reference import fresh_rule


def save_network(path: Path, patch_size: int = 5, seed: int = 0, stages: int = 2, **card: Any) -> Path:
    """Writes an untrained network with its card; the seed draws its weights."""
    torch.manual_seed(seed)
    network = build("compact", {"patch_size": patch_size, "num_stages": stages, "channels": 4, "depth": 1, "passes": 1})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, network, **card)
    return path


def save_fresh_rule(path: Path, seed: int = 0) -> Path:
    """Writes an untrained update rule with its card."""
    save_rule(path, fresh_rule(seed))
    return path
