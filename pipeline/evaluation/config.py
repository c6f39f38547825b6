"""Configuration of `air evaluate`. Loads without torch, as every command reads it."""

from __future__ import annotations

from pydantic import Field, model_validator

from air.defaults import ADAM, GROWING_STEPS, PIXELS_PER_GAUSSIAN, SHIPPED, STORED_STEPS
from pipeline.config import Config, StageControlConfig
from pipeline.formats import images

_ABOUT_PREDICTORS = (
    "predictor",
    "refine",
    "learning_rate_factor",
    "stages",
    "patch_size",
    "gaussians",
    "baseline",
    "max_patch_mse",
    "max_patch_dssim",
)
_ABOUT_THE_CODEC = ("bpp", "steps", "stored_steps")
_MAX_BPP = 24.0


_MAX_STEPS = 100_000


def _check_steps(name: str, counts: tuple[int, ...]) -> None:
    if not counts or not all(0 <= count <= _MAX_STEPS for count in counts):
        raise ValueError(f"{name} must be one or more counts from 0 to {_MAX_STEPS}")
    if list(counts) != sorted(set(counts)):
        raise ValueError(f"{name} must rise, without repetition")


class EvaluateConfig(StageControlConfig):
    """What `air evaluate` measures: a predictor, or the codec."""

    predictor: str | None = Field(
        None,
        description="grid, compact, a checkpoint NAME.safetensors or a name in a registry; default: compact if "
        "it is shipped and has the patch size and stages asked for, else grid",
    )
    refine: tuple[int, ...] = Field(
        (0, 10, 50), description="numbers of refinement steps; each starts from the prediction"
    )
    learning_rate_factor: float = Field(
        1.0,
        gt=0,
        le=100,
        description="factor on the learning rates of the refinement (docs/optimizer.md)",
    )
    stages: int | None = Field(None, ge=1, le=16, description="stages; default: all of a network, 4 of the grid")
    patch_size: int | None = Field(
        None, ge=2, le=64, description="pixels between anchors; default: the network's, or 7 for the grid"
    )
    gaussians: int | None = Field(
        None,
        ge=1,
        le=100_000_000,
        description="most Gaussians of an image, placed in its worst patches; default: no limit",
    )
    baseline: bool = Field(
        True, description="also measure grids, one with the same patch size and one with about as many Gaussians"
    )
    limit: int | None = Field(None, ge=1, description="number of images to measure, the first ones; default: all")
    threads: int = Field(1, ge=1, le=1024, description="CPU threads")
    max_pixels: int = Field(images.MAX_PIXELS, ge=1, description="images with more pixels are refused before decoding")
    codec: bool = Field(
        False,
        description="measure the codec instead of a predictor: .air files beside JPEG, WebP, JPEG 2000 and AVIF files "
        "that are no larger",
    )
    bpp: tuple[float, ...] = Field(
        (0.15, 0.25, 0.5, 1.0), description="with codec: targets, the most bits per pixel of the .air files"
    )
    steps: int = Field(GROWING_STEPS, ge=0, le=1_000_000, description="with codec: steps of each fit")
    stored_steps: int = Field(
        STORED_STEPS, ge=0, le=1_000_000, description="with codec: further steps, on the Gaussians as they are stored"
    )

    @model_validator(mode="after")
    def _bounded(self) -> EvaluateConfig:
        _check_steps("refine", self.refine)
        if not self.bpp or not all(0 < bpp <= _MAX_BPP for bpp in self.bpp):
            raise ValueError(f"bpp must be one or more numbers above 0, at most {_MAX_BPP:g}")
        if list(self.bpp) != sorted(set(self.bpp)):
            raise ValueError("bpp must rise, without repetition")
        foreign = _ABOUT_PREDICTORS if self.codec else _ABOUT_THE_CODEC
        wrong = [name for name in foreign if name in self.model_fields_set]
        if wrong and self.codec:
            raise ValueError(f"{', '.join(wrong)}: not with codec, which measures no predictor; leave this out")
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: only with codec; set codec, or leave this out")
        return self


class FrontConfig(Config):
    """What `air evaluate --front` measures: the quality that each way to get Gaussians reaches over time."""

    predictor: str | None = Field(
        None,
        description="grid, compact, a checkpoint NAME.safetensors, or grow for none; default: compact if it is "
        "shipped, else grid",
    )
    gaussians: int | None = Field(
        None,
        ge=1,
        le=100_000_000,
        description="most Gaussians of an image; default: as many as are predicted, or without a predictor one for "
        f"every {PIXELS_PER_GAUSSIAN} pixels",
    )
    steps: tuple[int, ...] = Field(
        (0, 10, 20, 30, 50, 75, 150),
        description="numbers of steps: each is a fit of its own, and a refinement of its own after a prediction",
    )
    rules: tuple[str, ...] = Field(
        (ADAM, SHIPPED),
        description="update rules of growing fits: adam, shipped, NAME.safetensors, or auto for the one that `air fit` "
        "takes",
    )
    baseline: bool = Field(True, description="also measure a plain grid with about as many Gaussians")
    limit: int | None = Field(None, ge=1, description="number of images to measure, the first ones; default: all")
    threads: int = Field(1, ge=1, le=1024, description="CPU threads of every method")
    max_pixels: int = Field(images.MAX_PIXELS, ge=1, description="images with more pixels are refused before decoding")

    @model_validator(mode="after")
    def _bounded(self) -> FrontConfig:
        _check_steps("steps", self.steps)
        if not self.rules or len(set(self.rules)) != len(self.rules):
            raise ValueError("rules must be one or more rules, without repetition")
        return self
