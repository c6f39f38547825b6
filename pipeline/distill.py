"""Distillation: for every view of an image and every stage, predict Gaussians, optimise them shortly, record both.

`process` is pure: what it returns depends on the image's bytes and key and on the configuration alone. It knows nothing
of Ray; torch and the kernels load with the first image, so that a driver can plan without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from pipeline import images, tables
from pipeline.errors import Rejected
from pipeline.process import EncodedImage, Sample
from pipeline.shards import read_samples
from pipeline.storage import Storage
from pipeline.views import ViewConfig, make_view
from pipeline.work import Unit, seed_of

if TYPE_CHECKING:
    from air.gaussians import Gaussians
    from air.optimize import OptimizeConfig
    from air.stages import StageResult


class DistillConfig(ViewConfig):
    """What `air distill` makes of an image: its views, and how Gaussians are fitted to them."""

    seed: int = Field(0, ge=0, lt=2**63, description="seed of the views")
    predictor: Literal["grid"] = Field("grid", description="what predicts; grid is the built-in closed form")
    stages: int = Field(4, ge=1, le=16, description="stages, each adding Gaussians where the picture is still bad")
    steps: tuple[int, ...] = Field(
        (50,), description="optimisation steps per stage; the last one holds for all further"
    )
    rate: float = Field(1.0, gt=0, le=100, description="factor on the optimiser's learning rates (docs/optimizer.md)")
    canvas: Literal["target", "predicted"] = Field(
        "target", description="what the next stage builds on: this stage's optimised Gaussians, or the predicted ones"
    )
    max_patch_mse: float = Field(10**-3.5, ge=0, le=10, description="a patch with a larger mean squared error is bad")
    max_patch_dssim: float = Field(0.05, ge=0, le=2, description="a patch with a larger 1 - SSIM is bad")
    max_pixels: int = Field(images.MAX_PIXELS, ge=1, description="images with more pixels are refused before decoding")
    background: tuple[int, int, int] = Field((255, 255, 255), description="colour behind transparent pixels, 0 to 255")

    @model_validator(mode="after")
    def _bounded(self) -> DistillConfig:
        if not self.steps or not all(0 <= count <= 100_000 for count in self.steps):
            raise ValueError("steps must be one or more counts from 0 to 100000")
        if not all(0 <= value <= 255 for value in self.background):
            raise ValueError("background must be three numbers from 0 to 255")
        return self

    def optimization(self) -> list[OptimizeConfig]:
        """The optimiser's configuration for every stage."""
        from air.optimize import OptimizeConfig

        counts = [self.steps[min(stage, len(self.steps) - 1)] for stage in range(self.stages)]
        return [OptimizeConfig(steps=count).scaled(self.rate) for count in counts]


class DistillJob:
    """Turns shards into targets."""

    name: ClassVar[str] = "distill"

    def __init__(self, config: DistillConfig, source: Storage) -> None:
        self._config = config
        self._source = source

    def prepare(self, say: Callable[[str], None]) -> None:
        """Compiles the kernels, once per machine and version."""
        from air.optimize import COMPILE_SECONDS, compile_kernels, kernels_are_compiled

        if not kernels_are_compiled():
            say(f"compiling kernels, once on this machine: about {COMPILE_SECONDS} s")
        compile_kernels()

    def samples(self, unit: Unit, scratch: Path) -> Iterator[Sample]:
        """The samples of the input shard."""
        return read_samples(self._source, unit)

    def process(self, image: EncodedImage) -> list[dict[str, Any]]:
        """The target rows of all views of an image."""
        config = self._config
        rgb = images.decode(image.data, background=config.background, max_pixels=config.max_pixels)
        rows = []
        for view in range(config.views):
            seed = seed_of(config.seed, image.key, view)
            rows.append(
                {
                    "key": image.key,
                    "view": view,
                    "shard": image.unit,
                    "seed": seed,
                    "patch_size": config.patch_size,
                    **distill_view(make_view(rgb, config, seed), config),
                }
            )
        return rows

    def writer(self, unit: Unit, scratch: Path, metadata: Mapping[str, str]) -> TargetWriter:
        """A writer of one Parquet file of targets."""
        return TargetWriter(scratch / f"{unit.name}.parquet", {**metadata, "air.model": self._config.predictor})


def distill_view(rgb: np.ndarray, config: DistillConfig) -> dict[str, Any]:
    """The columns of a target row that depend on the view's pixels.

    Args:
        rgb: The view, shape (H, W, 3), uint8, whole patches.
        config: How to fit.

    Raises:
        Rejected: `non_finite`: the optimisation diverged.
    """
    import torch

    from air.errors import InvalidGaussiansError, NonFiniteLossError
    from air.predictor import GridPredictor
    from air.stages import StageControl, all_gaussians, run_stages

    torch.set_num_threads(1)  # sums of another order would make other values on another machine
    image = torch.from_numpy(rgb.astype(np.float32) / 255).permute(2, 0, 1).contiguous()
    try:
        stages = list(
            run_stages(
                image,
                GridPredictor(config.patch_size),
                config.optimization(),
                control=StageControl(config.max_patch_mse, config.max_patch_dssim),
                canvas=config.canvas,
            )
        )
    except (InvalidGaussiansError, NonFiniteLossError) as error:
        raise Rejected("non_finite", str(error)) from None
    return {
        "height": rgb.shape[0],
        "width": rgb.shape[1],
        "image": images.encode_png(rgb),
        "stage": np.concatenate(
            [np.full(len(stage), stage.stage, np.int8) for stage in stages] or [np.empty(0, np.int8)]
        ),
        "anchor": np.concatenate([stage.patch.numpy().astype(np.int32) for stage in stages] or [np.empty(0, np.int32)]),
        **_columns("predicted", all_gaussians(stages, config.patch_size, "predicted")),
        **_columns("target", all_gaussians(stages, config.patch_size, "target")),
        **_stage_columns(stages),
    }


def _columns(prefix: str, gaussians: Gaussians) -> dict[str, np.ndarray]:
    quantities = (*gaussians.xy.unbind(1), *gaussians.scale.unbind(1), gaussians.angle, *gaussians.colour.unbind(1))
    return {
        f"{prefix}_{name}": values.numpy().astype(np.float32)
        for name, values in zip(tables.GAUSSIAN_QUANTITIES, quantities, strict=True)
    }


def _stage_columns(stages: Sequence[StageResult]) -> dict[str, list[Any]]:
    return {
        "gaussians": [len(stage) for stage in stages],
        "steps": [stage.steps for stage in stages],
        "psnr_predicted": [stage.psnr[0] for stage in stages],
        "psnr_target": [stage.psnr[1] for stage in stages],
        "loss_first": [stage.loss[0] for stage in stages],
        "loss_last": [stage.loss[1] for stage in stages],
    }


class TargetWriter:
    """Writes target rows to one Parquet file, a row group at a time, so that memory is bounded."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._path = path
        self._parquet = tables.open_writer(str(path), tables.stamped(tables.TARGETS, metadata))
        self._rows: list[pa.RecordBatch] = []
        self._bytes = 0
        self._count = 0

    def add(self, result: list[dict[str, Any]]) -> Mapping[str, float]:
        """Takes the views of one image; counts views, Gaussians and decibels."""
        batch = pa.RecordBatch.from_pylist(result, schema=tables.TARGETS)
        self._rows.append(batch)
        self._bytes += batch.nbytes
        self._count += len(result)
        if self._bytes >= tables.ROW_GROUP_BYTES:
            self._flush()
        # A view without any bad patch from the start (all black) has no stage and no PSNR to count.
        fitted = [row for row in result if row["psnr_target"]]
        return {
            "images": 1,
            "views": len(result),
            "gaussians": sum(len(row["stage"]) for row in result),
            "pixels": sum(row["height"] * row["width"] for row in result),
            "psnr_views": len(fitted),
            "psnr_predicted_sum": sum(row["psnr_predicted"][0] for row in fitted),
            "psnr_target_sum": sum(row["psnr_target"][-1] for row in fitted),
        }

    def finish(self) -> list[tuple[Path, int]]:
        """Closes the file, which is there even without rows: readers find its columns."""
        self._flush()
        self._parquet.close()
        return [(self._path, self._count)]

    def _flush(self) -> None:
        if self._rows:
            table = pa.Table.from_batches(self._rows, schema=tables.TARGETS)
            self._parquet.write_table(
                table.replace_schema_metadata(self._parquet.schema.metadata), row_group_size=2**31
            )
        self._rows, self._bytes = [], 0
