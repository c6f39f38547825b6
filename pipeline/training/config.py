"""Configuration of `air train`: what is trained, and where it runs. Loads without torch, as every command reads it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.training.augment import AugmentConfig
from pipeline.training.order import FeedConfig

if TYPE_CHECKING:
    from air.optimization.optimize import OptimizeConfig
    from air.stages.control import StageControl


class LossConfig(Config):
    """What is asked of the network."""

    stage_weights: tuple[float, ...] = Field(
        (1.0,), description="weight of each stage's loss; the last one holds for all further"
    )
    photometric_weight: float = Field(1.0, ge=0, le=1e6, description="weight of 0.7 L1 + 0.3 (1 - SSIM)")
    mse_weight: float = Field(0.0, ge=0, le=1e6, description="weight of the mean squared error")
    psnr_weight: float = Field(
        0.0, ge=0, le=1e6, description="weight of -PSNR / 10, with which every image counts alike, easy or hard"
    )
    proposal_weight: float = Field(
        0.3, ge=0, le=1e6, description="weight of what a network passes through on its way to a stage's result"
    )
    max_patch_mse: float = Field(10**-3.5, ge=0, le=10, description="a patch with a larger mean squared error is bad")
    max_patch_dssim: float = Field(0.05, ge=0, le=2, description="a patch with a larger 1 - SSIM is bad")

    @model_validator(mode="after")
    def _weights_are_weights(self) -> LossConfig:
        if not self.stage_weights or not all(0 <= weight <= 1e6 for weight in self.stage_weights):
            raise ValueError("stage_weights must be one or more numbers from 0 to 1000000")
        return self

    def stage_weight(self, stage: int) -> float:
        """The weight of a stage's loss."""
        return self.stage_weights[min(stage, len(self.stage_weights) - 1)]

    def control(self) -> StageControl:
        """Which patches get a Gaussian."""
        from air.stages.control import StageControl

        return StageControl(self.max_patch_mse, self.max_patch_dssim)


class OptimizerConfig(Config):
    """AdamW, its schedule, and the moving average of the weights."""

    rate: float = Field(1e-3, gt=0, le=10, description="highest learning rate")
    final_fraction: float = Field(0.02, ge=0, le=1, description="the rate's end, as a share of the highest")
    warmup_steps: int = Field(200, ge=0, description="steps in which the rate rises from zero")
    weight_decay: float = Field(
        0.05, ge=0, le=10, description="AdamW's decay of weights of linear and convolution layers"
    )
    clip: float = Field(1.0, gt=0, le=1e6, description="longest gradient; a longer one is shortened to it")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's average of gradients")
    beta2: float = Field(0.99, ge=0, lt=1, description="AdamW's average of squared gradients")
    average: float = Field(0.999, ge=0, lt=1, description="moving average of the weights that is validated and kept")

    def rate_share(self, step: int, progress: float) -> float:
        """The rate of a step as a share of the highest: a linear warm-up, a cosine from 1 to `final_fraction`.

        Args:
            step: From 0.
            progress: Share of the run that is done, 0 to 1.
        """
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return warm * (self.final_fraction + (1 - self.final_fraction) * cosine)


class TrainConfig(FeedConfig, AugmentConfig, LossConfig, OptimizerConfig):
    """What `air train` makes of samples: everything that the trained weights depend on."""

    phase: Literal["pod", "finetune", "refine", "patch", "quantize"] = Field(
        "finetune",
        description="pod: against optimised Gaussians; finetune: all stages jointly through the renderer; refine: "
        "finetune a checkpoint on other data; patch: finetune a checkpoint at another patch size; quantize: finetune "
        "a checkpoint together with the quantiser that its Gaussians are stored with",
    )
    from_: str | None = Field(None, alias="from", description="checkpoint to begin with; default: fresh weights")
    targets: Literal["offline", "online"] = Field(
        "offline", description="pod: targets out of `air distill`, or optimised in the loop"
    )
    horizon: tuple[int, ...] = Field(
        (50,), description="online pod: optimisation steps per stage; the last one holds for all further"
    )
    horizon_rate: float = Field(
        1.0, gt=0, le=100, description="online pod: factor on the optimiser's rates (docs/optimizer.md)"
    )
    patch_warmup_steps: int = Field(
        500, ge=0, description="patch: steps in which only weights that another patch size replaces are trained"
    )
    quantizer_bits: tuple[int, ...] = Field(
        (8, 8, 7, 7, 7, 8, 4, 4),
        description="quantize: bits of x, y, scale 1, scale 2, angle, luma, red and blue difference, 1 to 16 each",
    )
    quantizer_alone: bool = Field(False, description="quantize: leave the network as it is and train the quantiser")
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
        if self.phase in ("refine", "patch", "quantize") and self.from_ is None:
            raise ValueError(f"phase = '{self.phase}' needs a checkpoint to begin with: set from")
        if len(self.quantizer_bits) != 8 or not all(1 <= bits <= 16 for bits in self.quantizer_bits):
            raise ValueError("quantizer_bits must be eight whole numbers from 1 to 16, one for each channel")
        if not self.horizon or not all(0 <= count <= 100_000 for count in self.horizon):
            raise ValueError("horizon must be one or more counts from 0 to 100000")
        if not self.stage_starts or not all(0 <= share <= 1 for share in self.stage_starts):
            raise ValueError("stage_starts must be one or more shares from 0 to 1")
        if list(self.stage_starts) != sorted(self.stage_starts) or self.stage_starts[0] != 0:
            raise ValueError("stage_starts must begin with 0 and never fall")
        return self

    @property
    def uses_targets(self) -> bool:
        """Whether stored targets are trained on, not images alone."""
        return self.phase == "pod" and self.targets == "offline"

    def horizons(self, stages: int) -> list[OptimizeConfig]:
        """How online pod optimises, for each of the first stages."""
        from air.optimization.optimize import OptimizeConfig

        counts = [self.horizon[min(stage, len(self.horizon) - 1)] for stage in range(stages)]
        return [OptimizeConfig(steps=count).scaled(self.horizon_rate) for count in counts]

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
    max_bad_share: float = Field(0.5, ge=0, le=1, description="stop above this share of samples that cannot be used")
    log_every: int = Field(10, ge=1, description="steps between entries of metrics.jsonl and TensorBoard")
    validate_every: int = Field(500, ge=1, description="steps between validations")
    checkpoint_every: int = Field(250, ge=1, description="steps between checkpoints: the work that a crash can cost")
    keep: int = Field(2, ge=1, le=1000, description="checkpoints kept to go on from")
    cache_mb: int = Field(1024, ge=0, description="memory of a worker for decoded images, in MB")
    gradient_checkpointing: bool = Field(
        False,
        description="compute activations again in the backward pass: less memory, more time; for dinov3 alone",
    )
    prefetch: int = Field(4, ge=1, le=1024, description="batches of a worker made ahead")
