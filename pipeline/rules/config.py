"""Configuration of roll-outs of an update rule, and of what is learned from them.

Every command checks every section of a configuration file, so this module loads without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from air.defaults import ADAM
from pipeline.config import Background, Config, LeaseConfig
from pipeline.formats import images
from pipeline.identity import seed_of
from pipeline.training.order import FeedConfig

if TYPE_CHECKING:
    from air.fitting.grow import GrowthConfig
    from air.fitting.rollout import CreditConfig

_Horizon = Annotated[int, Field(ge=1, le=100_000)]


class RollOutConfig(Config):
    """How fits are drawn that an update rule is rolled out in, and how later losses count for a move."""

    seed: int = Field(0, ge=0, lt=2**63, description="seed of crops, budgets, steps and samples; and of a fresh rule")
    crop: int = Field(128, ge=8, le=16384, description="side of a random crop in pixels; smaller images are whole")
    turn: bool = Field(True, description="mirror and transpose crops at random")
    min_steps: int = Field(8, ge=1, le=100_000, description="fewest updates of a fit, which are drawn log-uniformly")
    max_steps: int = Field(100, ge=1, le=100_000, description="most updates of a fit")
    min_pixels_per_gaussian: float = Field(
        5.6, ge=1, le=1e6, description="fewest pixels for each Gaussian of a fit, which are drawn log-uniformly"
    )
    max_pixels_per_gaussian: float = Field(197.0, ge=1, le=1e6, description="most pixels for each Gaussian of a fit")
    start_fraction: float = Field(
        0.27, gt=0, le=1, description="fraction of the Gaussians in the grid that a fit begins with"
    )
    growths: int = Field(4, ge=0, le=1000, description="times that a fit adds Gaussians")
    growth_fraction: float = Field(0.42, gt=0, le=1, description="fraction of the updates before the last growth")
    discount: float = Field(
        0.8, ge=0, lt=1, description="weight of a later loss in a move's credit, as against the loss before it"
    )
    final_weight: float = Field(1.0, ge=0, le=1e6, description="additional weight of the last loss of the fit")
    max_pixels: int = Field(images.MAX_PIXELS, ge=1, description="images with more pixels are refused before decoding")
    background: Background = images.WHITE

    @model_validator(mode="after")
    def _ordered(self) -> RollOutConfig:
        for low, high in (("min_steps", "max_steps"), ("min_pixels_per_gaussian", "max_pixels_per_gaussian")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} = {getattr(self, low)} is above {high} = {getattr(self, high)}: set both")
        return self

    def growth(self) -> GrowthConfig:
        """How a fit grows, as `air.fitting` takes it."""
        from air.fitting.grow import GrowthConfig

        return GrowthConfig(self.start_fraction, self.growths, self.growth_fraction)

    def credit(self) -> CreditConfig:
        """How later losses count, as `air.fitting` takes it."""
        from air.fitting.rollout import CreditConfig

        return CreditConfig(self.discount, self.final_weight)


class StoreConfig(RollOutConfig):
    """How much of a corpus is rolled out on, and how much of that is stored."""

    shards: int | None = Field(
        None, ge=1, le=1_000_000, description="shards that are drawn from the input, at most; default: all"
    )
    images: int | None = Field(
        None, ge=1, le=10_000_000, description="images that are drawn from each shard, at most; default: all"
    )
    fits: int = Field(1, ge=1, le=1000, description="fits of each image")
    samples: int = Field(
        4000, ge=1, le=10_000_000, description="updates of single Gaussians that a fit stores, about as many"
    )


class DistillRuleConfig(StoreConfig):
    """How `air distill --rule R` rolls a rule out on images."""

    rule: str = Field(
        ADAM,
        description="adam, the rule before any training; shipped, the rule of this package; NAME.safetensors; or a "
        "name in a registry",
    )


class LearnerConfig(Config):
    """Adam on the rule's weights, and its schedule."""

    learning_rate: float = Field(5e-3, gt=0, le=1, description="highest learning rate")
    warmup_steps: int = Field(20, ge=0, le=1_000_000, description="steps in which the learning rate rises from zero")
    final_fraction: float = Field(
        0.05, ge=0, le=1, description="learning rate that the linear fall ends at, as a fraction of the highest"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's average of gradients")
    beta2: float = Field(0.99, ge=0, lt=1, description="Adam's average of squared gradients")
    max_norm_ratio: float = Field(
        2.0, gt=0, le=1e6, description="largest norm of the gradient, in medians of the last 100 norms"
    )

    def learning_rate_at(self, step: int, steps: int) -> float:
        """The learning rate of step number `step` of `steps`, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.learning_rate * warm * (1 - (1 - self.final_fraction) * step / steps)


class StoredConfig(Config):
    """How a rule learns from stored samples."""

    batch: int = Field(16_384, ge=1, le=65_536, description="stored samples of a step")
    window: int = Field(
        8, ge=1, le=4096, description="row groups, of 64 MB each at most, whose stored samples are mixed at a time"
    )
    step_size: float = Field(
        0.1,
        gt=0,
        le=100,
        description="how far stored samples ask a rule to go, as a fraction of a lone Gaussian's best move",
    )


class RunConfig(RollOutConfig, LearnerConfig, StoredConfig):
    """What every run that learns a rule has."""

    from_: str | None = Field(
        None,
        alias="from",
        description="rule to begin with: adam, shipped, NAME.safetensors or a name in a registry; default: adam, or "
        "the rule of the stored roll-outs if that is shipped",
    )
    valid_images: int = Field(12, ge=1, le=100_000, description="images to validate on")
    valid_side: int = Field(
        256, ge=16, le=16384, description="validation crops larger images to their middle, this many pixels a side"
    )
    valid_steps: tuple[_Horizon, ...] = Field(
        (10, 20, 50, 100), min_length=1, description="updates of the fits that validation makes of each image"
    )
    valid_pixels_per_gaussian: float = Field(14.0, ge=1, le=1e6, description="pixels for each Gaussian of these fits")
    # These change how the work is done, not its result: they are excluded from dumps, and so from the plan.
    log_every: int = Field(10, ge=1, exclude=True, description="steps between entries of metrics.jsonl")
    validate_every: int = Field(200, ge=1, exclude=True, description="steps between validations")
    checkpoint_seconds: float = Field(
        60.0,
        gt=0,
        le=1e6,
        exclude=True,
        description="seconds between checkpoints, at most; a crash costs that much time at most",
    )
    keep: int = Field(
        2, ge=1, le=1000, exclude=True, description="checkpoints that stay in the folder, the newest ones"
    )

    def feed(self) -> FeedConfig:
        """The order of stored samples."""
        return FeedConfig(seed=self.seed, batch=self.batch, window=self.window)


class RuleConfig(RunConfig, LeaseConfig):
    """How `air train --phase rule` learns a rule from stored roll-outs, or from roll-outs of its own."""

    steps: int | None = Field(
        None,
        ge=1,
        le=100_000_000,
        description="steps of the whole run; default: `passes` over stored roll-outs, or 2,000 without files",
    )
    passes: int = Field(4, ge=1, le=10_000, description="stored: how often each sample is learned from")
    roll_outs: int = Field(1, ge=1, le=10_000, description="online: fits of a step")
    samples: int = Field(
        200_000, ge=1, le=100_000_000, description="online: updates of single Gaussians that a fit learns from, at most"
    )
    workers: int = Field(1, ge=1, le=1024, exclude=True, description="online: processes that roll out")
    checkpoint_every: int = Field(
        100, ge=1, exclude=True, description="steps between checkpoints; a crash costs that many steps at most"
    )


class RoundsConfig(StoreConfig, RunConfig):
    """How `air train --phase rule --rounds N` rolls out and learns, round by round."""

    rounds: int = Field(80, ge=1, le=9999, description="times that the present rule is rolled out and learns")
    round_steps: int = Field(48, ge=1, le=1_000_000, description="steps of a round")
    shards: int = Field(1, ge=1, le=1_000_000, description="shards that a round draws from the input, at most")
    images: int = Field(12, ge=1, le=10_000_000, description="images that a round draws from each shard, at most")
    batch: int = Field(4096, ge=1, le=65_536, description="stored samples of a step")
    learning_rate: float = Field(3e-3, gt=0, le=1, description="highest learning rate")
    validate_every: int = Field(480, ge=1, exclude=True, description="steps between validations")

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints: a crash costs what a round has learned, at most, and no committed roll-out."""
        return self.round_steps

    def of_round(self, number: int, rule: str) -> DistillRuleConfig:
        """What round `number`, counted from 1, rolls out; each round draws other shards, images and fits."""
        same = {name: getattr(self, name) for name in StoreConfig.model_fields}
        return DistillRuleConfig.model_validate({**same, "seed": self._seed_of(number), "rule": rule})

    def feed_of(self, number: int) -> FeedConfig:
        """The order of a round's stored samples."""
        return self.feed().model_copy(update={"seed": self._seed_of(number)})

    def _seed_of(self, number: int) -> int:
        return seed_of(self.seed, "round", number) >> 1  # seeds have 63 bits
