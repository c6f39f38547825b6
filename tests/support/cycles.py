"""A tiny cycle of retraining: photographs at 96 pixels, a network that learns in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from pipeline.registry.aliases import CHAMPION, history
from pipeline.retraining.rounds import read_rounds
from pipeline.storage.open import open_storage

ALWAYS: dict[str, Any] = {"min_psnr_change": -100, "min_ms_ssim_change": -1, "max_predict_ratio": 1000}
"""Gates that any candidate with finite numbers passes."""

_SECTIONS: dict[str, dict[str, Any]] = {
    "gates": {"max_predict_ratio": 1000},
    "distill": {
        "patch_size": 8,
        "stages": 1,
        "steps": 2,
        "joint_steps": 0,
        "canvas": "target",
        "min_view_pixels": 1_000_000,
        "max_view_pixels": 1_000_000,
    },
    "train": {
        "patch_size": 8,
        "stages": 1,
        "settings": {"channels": 8, "depth": 1, "passes": 1},
        "batch": 2,
        "min_crop": 32,
        "max_crop": 32,
        "min_zoom": 1,
        "steps": 40,
        "warmup_steps": 0,
        "learning_rate": 0.003,
        "ema_decay": 0.5,
        "valid_images": 2,
    },
    "evaluate": {"refine": 0, "baseline": False},
    "trainer": {"executor": "inline", "threads": 1, "checkpoint_every": 10, "validate_every": 20},
    "runner": {"executor": "inline"},
}


class TinyCycle:
    """A cycle in a folder, with its incoming shards, its registry and its configuration.

    Args:
        folder: Where all files go.
        photographs: Pictures for the frozen set.
        shards: The output of `air shard` that `deliver` copies.
    """

    def __init__(self, folder: Path, photographs: Path, shards: Path) -> None:
        self.folder = folder
        self._photographs = photographs
        self._shards = shards
        self.config = folder / "cycle.yaml"
        self.registry = open_storage(folder / "models")
        self.work = open_storage(folder / "work")
        (folder / "incoming").mkdir(parents=True)
        self.configure()

    def configure(self, **changes: dict[str, Any]) -> None:
        """Writes the configuration: that of a cycle which works, with some keys changed."""
        retrain = {
            "registry": str(self.folder / "models"),
            "work": str(self.folder / "work"),
            "shards": str(self.folder / "incoming" / "*"),
            "frozen": str(self._photographs),
            "valid": str(self._photographs),
        }
        sections = {"retrain": retrain, **_SECTIONS}
        merged = {name: {**values, **changes.get(name, {})} for name, values in sections.items()}
        self.config.write_text(yaml.safe_dump(merged))

    def deliver(self, name: str, shard: int) -> None:
        """Puts one shard, as a tar of its own, into the incoming folder."""
        tars = sorted((self._shards / "data").glob("*.tar"))
        shutil.copyfile(tars[shard], self.folder / "incoming" / f"{name}.tar")

    @property
    def command(self) -> list[str]:
        """The arguments of `air` for a round."""
        return ["retrain", "--config", str(self.config), "--once"]

    def champions(self) -> list[str]:
        """The versions that were champion, in the order of the history."""
        return [move.version for move in history(self.registry, CHAMPION)]

    def rounds(self) -> int:
        """Number of rounds that were begun."""
        return len(list(read_rounds(self.work)))
