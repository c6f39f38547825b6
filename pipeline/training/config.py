"""Configuration of `air train`: what is trained, and where it runs.

Every command checks every section of a configuration file, so this module loads without torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config import Config, LeaseConfig, PerStage, StageControlConfig
from pipeline.training.augment import AugmentConfig
from pipeline.training.order import FeedConfig

if TYPE_CHECKING:
    from air.optimization.config import OptimizeConfig

_Weight = Annotated[float, Field(ge=0, le=1e6)]
_Count = Annotated[int, Field(ge=0, le=100_000)]
_Fraction = Annotated[float, Field(ge=0, le=1)]


class LossConfig(StageControlConfig):
    """The terms of the loss, and which patches get a Gaussian."""

    stage_weights: PerStage[_Weight] = Field(
        PerStage((1.0,)), description="weight of each stage's loss; the last number holds for all further stages"
    )
    photometric_weight: float = Field(1.0, ge=0, le=1e6, description="weight of 0.7 L1 + 0.3 (1 - SSIM)")
    mse_weight: float = Field(0.0, ge=0, le=1e6, description="weight of the mean squared error")
    psnr_weight: float = Field(
        0.0, ge=0, le=1e6, description="weight of -PSNR / 10, in which easy and hard images count alike"
    )
    proposal_weight: float = Field(
        0.3,
        ge=0,
        le=1e6,
        description="weight of the loss of the proposals that a network makes before a stage's result",
    )


class OptimizerConfig(Config):
    """AdamW, its schedule, and the moving average of the weights."""

    learning_rate: float = Field(1e-3, gt=0, le=10, description="highest learning rate")
    final_fraction: float = Field(
        0.02, ge=0, le=1, description="learning rate at the end, as a fraction of the highest"
    )
    warmup_steps: int = Field(200, ge=0, description="steps in which the learning rate rises from zero")
    weight_decay: float = Field(
        0.05, ge=0, le=10, description="AdamW's decay of the weights of linear and convolutional layers"
    )
    max_grad_norm: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="largest norm of the gradient; a gradient with a larger norm is scaled down to it",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's average of gradients")
    beta2: float = Field(0.99, ge=0, lt=1, description="AdamW's average of squared gradients")
    ema_decay: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="decay of the exponential moving average of the weights, which is validated and kept",
    )

    def learning_rate_fraction(self, step: int, progress: float) -> float:
        """The learning rate of a step as a fraction of the highest: linear warm-up times cosine to `final_fraction`.

        Args:
            step: Number of the step, from 0.
            progress: Fraction of the run that is done, 0 to 1.
        """
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return warm * (self.final_fraction + (1 - self.final_fraction) * cosine)


class TrainConfig(FeedConfig, AugmentConfig, LossConfig, OptimizerConfig):
    """Everything that the trained weights depend on; part of the plan."""

    phase: Literal["pod", "finetune", "refine", "patch", "quantize", "rule"] = Field(
        "finetune",
        description="pod: towards optimised Gaussians; finetune: all stages jointly through the renderer; refine: "
        "finetune a checkpoint on other data; patch: finetune a checkpoint at another patch size; quantize: finetune "
        "a checkpoint together with the quantiser that stores its Gaussians; rule: learn an update rule of the "
        "optimiser, which has options of its own",
    )
    from_: str | None = Field(
        None, alias="from", description="checkpoint, or name in a registry, to begin with; default: fresh weights"
    )
    targets: Literal["offline", "online"] = Field(
        "offline", description="pod: offline takes the targets of `air distill`, online optimises them in the loop"
    )
    horizon: PerStage[_Count] = Field(
        PerStage((50,)),
        description="online pod: optimisation steps of each stage; the last number holds for all further stages",
    )
    horizon_learning_rate_factor: float = Field(
        1.0, gt=0, le=100, description="online pod: factor on the optimiser's learning rates (docs/optimizer.md)"
    )
    patch_warmup_steps: int = Field(
        500, ge=0, description="patch: steps that train only the weights that the new patch size replaced"
    )
    quantizer_bits: tuple[int, ...] = Field(
        (8, 8, 7, 7, 7, 8, 4, 4),
        description="quantize: bits of x, y, scale 1, scale 2, angle, luma, red and blue difference, 1 to 16 each",
    )
    quantizer_alone: bool = Field(False, description="quantize: train only the quantiser, and keep the network")
    architecture: str = Field("compact", description="architecture of a fresh network")
    settings: dict[str, Any] = Field(
        {}, description="settings of a fresh network besides patch_size and num_stages, a mapping or JSON"
    )
    stages: int = Field(4, ge=1, le=16, description="stages, each adding Gaussians where the picture is still bad")
    stage_starts: PerStage[_Fraction] = Field(
        PerStage((0.0,)),
        description="fraction of the run after which each stage joins; the last number holds for all further stages",
    )
    steps: int = Field(10_000, ge=1, le=100_000_000, description="steps of the whole run")
    schedule: Literal["steps", "time"] = Field(
        "steps", description="the learning rate falls with the steps done, or with the part of max_seconds that is over"
    )
    max_seconds: float | None = Field(
        None, gt=0, description="stop after this training time in seconds, even before the last step"
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="precision inside the network")
    valid_images: int = Field(16, ge=1, le=100_000, description="images to validate on")
    valid_side: int = Field(
        768, ge=16, le=16384, description="validation crops larger images to their middle, this many pixels a side"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.phase == "rule":
            raise ValueError(
                "phase = 'rule' learns an update rule: its keys are those of section rule, and the command line says "
                "--phase rule"
            )
        if self.schedule == "time" and self.max_seconds is None:
            raise ValueError("schedule = 'time' needs max_seconds")
        if self.phase in ("refine", "patch", "quantize") and self.from_ is None:
            raise ValueError(f"phase = '{self.phase}' needs a checkpoint to begin with: set from")
        if len(self.quantizer_bits) != 8 or not all(1 <= bits <= 16 for bits in self.quantizer_bits):
            raise ValueError("quantizer_bits must be eight whole numbers from 1 to 16, one for each channel")
        if list(self.stage_starts) != sorted(self.stage_starts) or self.stage_starts[0] != 0:
            raise ValueError("stage_starts must begin with 0 and never fall")
        return self

    @property
    def uses_targets(self) -> bool:
        """Whether training needs the stored targets of `air distill`."""
        return self.phase == "pod" and self.targets == "offline"

    def horizons(self, stages: int) -> list[OptimizeConfig]:
        """The optimiser's configuration in online pod, for each of the first `stages` stages."""
        from air.optimization.config import OptimizeConfig

        configs = [OptimizeConfig(steps=self.horizon.at(stage)) for stage in range(stages)]
        return [config.scaled(self.horizon_learning_rate_factor) for config in configs]

    def stages_at(self, progress: float) -> int:
        """How many stages take part when that fraction of the run is over."""
        return sum(self.stage_starts.at(stage) <= progress for stage in range(self.stages))

    def progress(self, step: int, seconds: float) -> float:
        """The fraction of the run that is over, by `schedule`: of the steps, or of the time."""
        if self.schedule == "time":
            assert self.max_seconds is not None
            return seconds / self.max_seconds
        return step / self.steps

    def is_over(self, step: int, seconds: float) -> bool:
        """Whether the run ends after that many steps and seconds."""
        return step >= self.steps or (self.max_seconds is not None and seconds >= self.max_seconds)


class TrainerConfig(LeaseConfig):
    """Where and how training runs. Nothing here changes the weights, so nothing here belongs to the plan."""

    executor: Literal["ray", "inline"] = Field("ray", description="workers on Ray, or a single one in this process")
    address: str | None = Field(None, description="existing Ray cluster, such as `auto` or ray://host:10001")
    workers: int = Field(1, ge=1, le=10_000, description="training workers")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of a worker; default: the cores divided by the workers"
    )
    num_gpus: float = Field(0.0, ge=0, le=1, description="GPUs of a worker; 0 trains on the CPU")
    max_failures: int = Field(3, ge=0, le=1000, description="how often lost workers are replaced")
    max_wait_seconds: float | None = Field(
        None, ge=1, le=1e7, description="end if the cluster has no room for the workers for so long; default: wait"
    )
    max_bad_share: float = Field(0.5, ge=0, le=1, description="stop above this fraction of unusable samples")
    log_every: int = Field(10, ge=1, description="steps between entries of metrics.jsonl and TensorBoard")
    validate_every: int = Field(500, ge=1, description="steps between validations")
    checkpoint_every: int = Field(
        250, ge=1, description="steps between checkpoints; a crash costs that many steps at most"
    )
    checkpoint_seconds: float = Field(
        60.0, gt=0, le=1e6, description="seconds between checkpoints, at most; a crash costs that much time at most"
    )
    keep: int = Field(2, ge=1, le=1000, description="checkpoints that stay in the folder, the newest ones")
    cache_mb: int = Field(1024, ge=0, description="memory of a worker for decoded images, in MB")
    gradient_checkpointing: bool = Field(
        False,
        description="compute activations again in the backward pass: less memory, more time; only dinov3 has it",
    )
    prefetch: int = Field(4, ge=1, le=1024, description="batches that a worker makes ahead of their use")
