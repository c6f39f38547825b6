"""What a configuration file may hold: one section for each configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config import Config, RunnerConfig
from pipeline.formats import images
from pipeline.inputs.packaged import PICTURES


def sections() -> dict[str, type[Config]]:
    """The sections of a configuration file: one per configurable command, and `runner` for all."""
    from jobs.sections import DemoConfig, FitConfig
    from pipeline.bulk.decode import DecodeConfig
    from pipeline.bulk.distill import DistillConfig
    from pipeline.bulk.encode import EncodeConfig
    from pipeline.bulk.shard import ShardConfig
    from pipeline.evaluation.config import EvaluateConfig
    from pipeline.training.config import TrainConfig, TrainerConfig

    return {
        "demo": DemoConfig,
        "fit": FitConfig,
        "shard": ShardConfig,
        "distill": DistillConfig,
        "train": TrainConfig,
        "trainer": TrainerConfig,
        "evaluate": EvaluateConfig,
        "encode": EncodeConfig,
        "decode": DecodeConfig,
        "runner": RunnerConfig,
    }


class DemoConfig(Config):
    """What `air demo` shows."""

    pictures: int = Field(len(PICTURES), ge=1, le=len(PICTURES), description="how many of the pictures")


class FitConfig(Config):
    """How one image is fitted."""

    gaussians: int | None = Field(None, ge=1, le=100_000_000, description="most Gaussians; default: one per 16 pixels")
    patch_size: int | None = Field(
        None, ge=1, le=256, description="fit a plain grid, one Gaussian per patch of so many pixels, instead of growing"
    )
    steps: int = Field(100, ge=0, le=1_000_000, description="optimisation steps")
    learning_rate_factor: float = Field(
        1.0, gt=0, le=100, description="factor on the optimiser's learning rates (docs/optimizer.md)"
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; default: all cores")
    max_pixels: int = Field(images.MAX_PIXELS, ge=1, description="an image with more pixels is refused")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where to compute; auto takes a GPU that is there"
    )
    backend: Literal["auto", "cpu", "cuda", "reference"] = Field(
        "auto", description="kernels; reference is plain torch, for comparison"
    )
