"""Configuration of `air retrain`. Loads without torch, as every command reads it."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.registry.names import ENVIRONMENT


class RetrainConfig(Config):
    """What a cycle of retraining takes, and where it works. Sections of the same file configure its steps.

    What says where things are is not in a dump, so that a round that was begun goes on when they move.
    """

    registry: str | None = Field(
        None,
        exclude=True,
        description=f"folder or URI of the registry of predictors; default: the one that {ENVIRONMENT} names",
    )
    work: str | None = Field(None, exclude=True, description="folder or URI for the rounds")
    shards: tuple[str, ...] = Field(
        (),
        exclude=True,
        description="where new shards come: outputs of `air shard`, folders of tars, or globs of either",
    )
    frozen: tuple[str, ...] = Field(
        (), exclude=True, description="images that candidate and champion are compared on; never train on them"
    )
    valid: str | None = Field(
        None,
        exclude=True,
        description="images or shards that a training validates on; default: photographs that packages ship",
    )
    start: Literal["champion", "scratch"] = Field(
        "champion", description="what a candidate begins with; scratch: what section train says"
    )
    old_targets: bool = Field(True, description="train on the targets of earlier rounds, too")
    min_shards: int = Field(1, ge=1, le=1_000_000, exclude=True, description="a round waits for as many new shards")

    def complete(self) -> RetrainConfig:
        """The configuration with the registry filled in.

        Raises:
            ConfigError: Something that every cycle needs is missing; the message names the key.
        """
        registry = self.registry or os.environ.get(ENVIRONMENT)
        given = {"registry": registry, "work": self.work, "shards": self.shards, "frozen": self.frozen}
        missing = [name for name, value in given.items() if not value]
        if missing:
            hint = f" ({ENVIRONMENT} names a registry, too)" if "registry" in missing else ""
            raise ConfigError(f"retrain: set {', '.join(missing)} in section retrain{hint}")
        return self.model_copy(update={"registry": registry})


class GatesConfig(Config):
    """What a candidate must reach on the frozen set. A change is the candidate's value minus the champion's."""

    min_psnr: float | None = Field(None, ge=0, le=200, description="least mean PSNR in dB")
    min_psnr_change: float = Field(0.0, ge=-200, le=200, description="least change of the mean PSNR in dB")
    min_ms_ssim: float | None = Field(None, ge=0, le=1, description="least mean MS-SSIM")
    min_ms_ssim_change: float = Field(-0.001, ge=-1, le=1, description="least change of the mean MS-SSIM")
    worst_share: float = Field(0.05, gt=0, le=1, description="fraction of images that are the worst, by PSNR")
    min_worst_psnr: float | None = Field(None, ge=0, le=200, description="least mean PSNR in dB of the worst images")
    min_worst_psnr_change: float = Field(
        -0.1, ge=-200, le=200, description="least change of the mean PSNR in dB of the worst images of each"
    )
    slices: dict[str, str] = Field(
        {}, description='images that are judged by themselves: a name and a glob of keys each, {"faces": "faces/*"}'
    )
    min_slice_psnr_change: float = Field(
        -0.1, ge=-200, le=200, description="least change of the mean PSNR in dB of each slice"
    )
    max_predict_seconds: float | None = Field(
        None, gt=0, le=1e6, description="most seconds of a prediction, the median over images"
    )
    max_predict_ratio: float = Field(
        1.5, gt=0, le=1e6, description="most seconds of a prediction by those of the champion, the median over images"
    )

    @model_validator(mode="after")
    def _named(self) -> GatesConfig:
        if not all(name and pattern for name, pattern in self.slices.items()):
            raise ValueError("slices: every slice needs a name and a glob of keys")
        return self
