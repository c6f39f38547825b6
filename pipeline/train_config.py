"""Configuration of `air train`: what is trained, and where it runs. The keys of its parts are beside their code."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.augment import AugmentConfig
from pipeline.config import Config
from pipeline.feed import FeedConfig
from pipeline.losses import LossConfig
from pipeline.training_state import OptimizerConfig


class TrainConfig(FeedConfig, AugmentConfig, LossConfig, OptimizerConfig):
    """What `air train` makes of samples: everything that the trained weights depend on."""

    phase: Literal["finetune"] = Field("finetune", description="finetune: all stages jointly through the renderer")
    from_: str | None = Field(None, alias="from", description="checkpoint to begin with; default: fresh weights")
    architecture: str = Field("compact", description="network, where it is fresh")
    settings: dict[str, Any] = Field({}, description="its settings beside patch_size and num_stages, a mapping or JSON")
    stages: int = Field(4, ge=1, le=16, description="stages, each adding Gaussians where the picture is still bad")
    stage_starts: tuple[float, ...] = Field(
        (0.0,), description="share of the run after which each stage joins; the last one holds for all further"
    )
    steps: int = Field(10_000, ge=1, le=100_000_000, description="steps of the whole run")
    schedule: Literal["steps", "time"] = Field(
        "steps", description="what the learning rate falls with: steps, or the share of max_seconds that is over"
    )
    max_seconds: float | None = Field(None, gt=0, description="stop after so much training time, whatever the steps")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the network's own computations")
    valid_images: int = Field(16, ge=1, le=100_000, description="images to validate on")
    valid_side: int = Field(768, ge=16, le=16384, description="larger images are validated on their middle, in pixels")

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.schedule == "time" and self.max_seconds is None:
            raise ValueError("schedule = 'time' needs max_seconds")
        if not self.stage_starts or not all(0 <= share <= 1 for share in self.stage_starts):
            raise ValueError("stage_starts must be one or more shares from 0 to 1")
        if list(self.stage_starts) != sorted(self.stage_starts) or self.stage_starts[0] != 0:
            raise ValueError("stage_starts must begin with 0 and never fall")
        return self

    def stages_at(self, progress: float) -> int:
        """How many stages take part when that share of the run is over."""
        starts = [self.stage_starts[min(stage, len(self.stage_starts) - 1)] for stage in range(self.stages)]
        return sum(start <= progress for start in starts)

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is over."""
        if self.schedule == "time":
            assert self.max_seconds is not None
            return seconds / self.max_seconds
        return step / self.steps

    def is_over(self, step: int, seconds: float) -> bool:
        """Whether the run ends here."""
        return step >= self.steps or (self.max_seconds is not None and seconds >= self.max_seconds)


class TrainerConfig(Config):
    """Where and how training runs. Nothing here changes the weights, so it is no part of the plan."""

    executor: Literal["ray", "inline"] = Field("ray", description="workers on Ray, or a single one in this process")
    address: str | None = Field(None, description="existing Ray cluster, such as `auto` or ray://host:10001")
    workers: int = Field(1, ge=1, le=10_000, description="training workers")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of a worker; default: its share of the cores"
    )
    num_gpus: float = Field(0.0, ge=0, le=1, description="GPUs of a worker; 0 trains on the CPU")
    max_failures: int = Field(3, ge=0, le=1000, description="times that lost workers are replaced")
    log_every: int = Field(10, ge=1, description="steps between entries of metrics.jsonl and TensorBoard")
    validate_every: int = Field(500, ge=1, description="steps between validations")
    checkpoint_every: int = Field(250, ge=1, description="steps between checkpoints: the work that a crash can cost")
    keep: int = Field(2, ge=1, le=1000, description="checkpoints kept to go on from")
    cache_mb: int = Field(1024, ge=0, description="memory of a worker for decoded images, in MB")
    prefetch: int = Field(4, ge=1, le=1024, description="batches of a worker made ahead")
