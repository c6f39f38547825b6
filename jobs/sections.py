"""What a configuration file may hold: the sections by name, and the configurations of commands without a job.

Commands import this module, and it imports no command: a configuration that a command and a file share is here, or in
pipeline/ beside the code that it configures.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from air.defaults import AUTO, FIT_STEPS, PIXELS_PER_GAUSSIAN
from pipeline.config import Config, RunnerConfig
from pipeline.formats import images
from pipeline.inputs.packaged import PICTURES


class DemoConfig(Config):
    """What `air demo` shows."""

    pictures: int = Field(len(PICTURES), ge=1, le=len(PICTURES), description="number of photographs")


class FitConfig(Config):
    """How `air fit` fits an image."""

    gaussians: int | None = Field(
        None, ge=1, le=100_000_000, description=f"most Gaussians; default: one for every {PIXELS_PER_GAUSSIAN} pixels"
    )
    patch_size: int | None = Field(
        None,
        ge=1,
        le=256,
        description="side of a patch in pixels: fit a plain grid, one Gaussian per patch, not growing",
    )
    steps: int | None = Field(
        None,
        ge=0,
        le=1_000_000,
        description=f"optimisation steps; default: {FIT_STEPS}, or as many as `seconds` allows",
    )
    seconds: float | None = Field(
        None, gt=0, le=1e6, description="seconds that the fit may take; the number of steps follows from the machine"
    )
    rule: str = Field(
        AUTO,
        description="update rule: auto, the shipped one in short fits and Adam in long ones; adam; shipped; "
        "NAME.safetensors; or a name in a registry",
    )
    learning_rate_factor: float = Field(
        1.0, gt=0, le=100, description="factor on the optimiser's learning rates (docs/optimizer.md)"
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; default: one for each core")
    max_pixels: int = Field(images.MAX_PIXELS, ge=1, description="an image with more pixels is refused")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where to compute; auto takes a GPU if there is one"
    )
    backend: Literal["auto", "cpu", "cuda", "reference"] = Field(
        "auto", description="kernels; reference is plain torch, for comparison"
    )


def sections() -> dict[str, type[Config]]:
    """The configuration class of every section.

    There is one per command; `rollout` for `air distill --rule`, `rule` for `air train --phase rule`, and `rounds` for
    that with `--rounds`; `front` for `air evaluate --front`; `gates` for what `air retrain` asks of a candidate;
    `trainer` for other training and `runner` for other jobs.
    """
    # Imported here, so that a command starts without the other commands' modules.
    from pipeline.bulk.decode import DecodeConfig
    from pipeline.bulk.distill import DistillConfig
    from pipeline.bulk.encode import EncodeConfig
    from pipeline.bulk.shard import ShardConfig
    from pipeline.evaluation.config import EvaluateConfig, FrontConfig
    from pipeline.retraining.config import GatesConfig, RetrainConfig
    from pipeline.rules.config import DistillRuleConfig, RoundsConfig, RuleConfig
    from pipeline.training.config import TrainConfig, TrainerConfig

    return {
        "demo": DemoConfig,
        "fit": FitConfig,
        "shard": ShardConfig,
        "distill": DistillConfig,
        "rollout": DistillRuleConfig,
        "train": TrainConfig,
        "rule": RuleConfig,
        "rounds": RoundsConfig,
        "trainer": TrainerConfig,
        "evaluate": EvaluateConfig,
        "front": FrontConfig,
        "retrain": RetrainConfig,
        "gates": GatesConfig,
        "encode": EncodeConfig,
        "decode": DecodeConfig,
        "runner": RunnerConfig,
    }
