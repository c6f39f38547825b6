"""Distillation: for every view of an image, predict Gaussians stage by stage, optimise them together, record both.

`process` is pure: its result depends on the image's bytes and key and on the configuration alone (on a GPU, up to the
last bits). On a GPU many views are optimised together. This module knows nothing of Ray. Torch and the kernels load
with the first image, so that a driver plans without them; only the card of a network is read with torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from air.defaults import GRID
from air.errors import InvalidGaussiansError, NonFiniteLossError
from pipeline.bulk.views import ViewConfig, make_view
from pipeline.config import Background, PerStage, StageControlConfig
from pipeline.errors import ConfigError, Reason, Rejected
from pipeline.formats import images, tables
from pipeline.identity import seed_of
from pipeline.inputs.shards import read_samples
from pipeline.predictors import PredictorReference, default_predictor, find_predictor, load
from pipeline.storage.base import Storage
from pipeline.work.plan import Unit
from pipeline.work.process import EncodedImage, Sample, batched

if TYPE_CHECKING:
    import torch

    from air.optimization.config import OptimizeConfig
    from air.predictor.base import Predictor
    from air.stages.loop import StageResult

logger = logging.getLogger(__name__)

_Rows = list[dict[str, Any]]

Canvas = Literal["target", "predicted"]
"""As `air.stages.loop.Canvas`, which is not loaded here."""

_VIEWS_ON_GPU = 16
"""Views that a GPU optimises together by default."""

_JOINT_STEPS = 200
"""Joint steps by default; docs/training.md has what networks learn from 20 and from 200."""


class DistillConfig(StageControlConfig, ViewConfig):
    """How `air distill` makes the targets of an image: the views, and how Gaussians are fitted to them."""

    seed: int = Field(0, ge=0, lt=2**63, description="seed of the views")
    predictor: str | None = Field(
        None,
        description="grid, the closed form; compact, the shipped network; NAME.safetensors; or a name in a registry; "
        "default: compact if it "
        "is shipped and has this patch_size and as many stages, else grid",
    )
    stages: int | None = Field(
        None,
        ge=1,
        le=16,
        description="stages, each adding Gaussians where the picture is bad; default: all of a network, 4 of the grid",
    )
    steps: PerStage[Annotated[int, Field(ge=0, le=100_000)]] = Field(
        PerStage((50,)),
        description="optimisation steps of each stage alone; the last number holds for all further stages; on a "
        "predicted canvas these steps stand in place of the joint ones, and are not made unless they are given",
    )
    joint_steps: int | None = Field(
        None,
        ge=0,
        le=100_000,
        description="steps that then optimise the Gaussians of all stages together; default: 200, or 0 on a predicted "
        "canvas if steps are given",
    )
    learning_rate_factor: float = Field(
        1.0, gt=0, le=100, description="factor on the optimiser's learning rates (docs/optimizer.md)"
    )
    canvas: Canvas | None = Field(
        None,
        description="what the next stage builds on: this stage's optimised Gaussians, or the predicted ones; "
        "default: target, the best picture; predicted with a network that is named, what the next round trains on",
    )
    max_pixels: int = Field(images.MAX_PIXELS, ge=1, description="images with more pixels are refused before decoding")
    background: Background = images.WHITE
    # These two change how the work is done, not its result: they are excluded from dumps, and so from the plan.
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", exclude=True, description="where to compute; auto takes a GPU that the worker has"
    )
    batch: int | None = Field(
        None, ge=1, le=256, exclude=True, description="views optimised together; default: 1 on a CPU, 16 on a GPU"
    )

    def find_predictor(self, output: Storage | None = None) -> PredictorReference:
        """The predictor that the configuration names, or else the default one.

        Args:
            output: The output folder, whose plan says what an alias of a registry stood for when the job began.

        Raises:
            CheckpointError: There is no such predictor.
            ConfigError: The predictor has another patch size.
        """
        if self.predictor is None:
            return default_predictor(self.patch_size, self.stages)
        return find_predictor(self.predictor, self.patch_size, output=output)

    def settled(self, reference: PredictorReference) -> DistillConfig:
        """The configuration with the values that depend on the predictor filled in.

        Raises:
            ConfigError: More stages are asked for than the predictor has; or steps of each stage and joint steps are
                asked for on a predicted canvas.
        """
        named_network = self.predictor is not None and reference.name != GRID
        canvas = self.canvas or ("predicted" if named_network else "target")
        steps, joint_steps = self._settled_steps(canvas)
        return self.model_copy(
            update={
                "predictor": reference.name,
                "stages": reference.stages(self.stages),
                "canvas": canvas,
                "steps": steps,
                "joint_steps": joint_steps,
            }
        )

    def _settled_steps(self, canvas: Canvas) -> tuple[PerStage[int], int]:
        """Steps of each stage, and joint steps.

        On a predicted canvas, the joint steps start from the predictions. Targets of a stage alone would be lost.
        """
        if canvas == "target":
            return self.steps, _JOINT_STEPS if self.joint_steps is None else self.joint_steps
        asked = "steps" in self.model_fields_set and any(self.steps)
        if asked and self.joint_steps:
            raise ConfigError(
                f"steps = {list(self.steps)} and joint_steps = {self.joint_steps} on a predicted canvas: the joint "
                "steps start from the predictions, and the steps of each stage would be lost; leave one of the two "
                "out, or set canvas to target"
            )
        if self.joint_steps is None and not asked:
            return PerStage((0,)), _JOINT_STEPS
        return (self.steps, 0) if not self.joint_steps else (PerStage((0,)), self.joint_steps)

    def optimization(self) -> tuple[list[OptimizeConfig], OptimizeConfig]:
        """The optimiser's configuration of each stage alone, and of all stages together.

        The configuration must be settled. This is the one place where the optimiser of targets is chosen.
        """
        from air.optimization.settings import refinement

        assert self.stages is not None
        assert self.joint_steps is not None
        alone = [refinement(self.steps.at(stage)) for stage in range(self.stages)]
        jointly = refinement(self.joint_steps)
        return [config.scaled(self.learning_rate_factor) for config in alone], jointly.scaled(self.learning_rate_factor)


class DistillJob:
    """Turns shards into targets.

    Args:
        config: How to make the targets.
        source: The storage that holds the shards.
        predictor: From `config.find_predictor`; looked up if not given.

    Raises:
        CheckpointError: There is no such predictor.
        ConfigError: The predictor does not fit the configuration.
    """

    name: ClassVar[str] = "distill"

    def __init__(self, config: DistillConfig, source: Storage, predictor: PredictorReference | None = None) -> None:
        self._predictor = predictor or config.find_predictor()
        self._config = config.settled(self._predictor)
        self._source = source

    def prepare(self, say: Callable[[str], None]) -> None:
        """Loads the predictor, and compiles the CPU's kernels once per machine and version.

        Kernels of a GPU are compiled when they are first used.

        Raises:
            BackendUnavailableError: The configuration asks for a GPU that this worker does not have.
            CheckpointError: The predictor cannot be loaded, or is not the one in the plan.
        """
        from air.warmup import warm_up

        load(self._predictor, self._device())
        if self._device().type != "cuda":
            warm_up("predict", say)

    def _device(self) -> torch.device:
        """The device of this worker."""
        from air.compute.backends import choose_device

        return choose_device(self._config.device)

    def _views_at_once(self) -> int:
        return self._config.batch or (_VIEWS_ON_GPU if self._device().type == "cuda" else 1)

    def batch_size(self) -> int:
        """Number of images whose views are optimised together, at least one."""
        return max(1, self._views_at_once() // self._config.views)

    def samples(self, unit: Unit, scratch: Path) -> Iterator[Sample]:
        """The samples of the input shard."""
        return read_samples(self._source, unit)

    def process(self, image: EncodedImage) -> _Rows:
        """The target rows of all views of an image."""
        (result,) = self.process_many([image])
        if isinstance(result, Rejected):
            raise result
        return result

    def process_many(self, encoded: Sequence[EncodedImage]) -> list[_Rows | Rejected]:
        """The target rows of all views of each image, or the reason why the image has none."""
        results: list[_Rows | Rejected] = [[] for _ in encoded]
        for views in batched(self._views(encoded, results), self._views_at_once()):
            predictor = load(self._predictor, self._device())
            fitted = distill_views([view.rgb for view in views], predictor, self._config, self._device())
            for view, columns in zip(views, fitted, strict=True):
                rows = results[view.image]
                if isinstance(rows, Rejected):
                    continue
                if isinstance(columns, Rejected):
                    results[view.image] = columns
                    continue
                image = encoded[view.image]
                rows.append(
                    {
                        "key": image.key,
                        "view": view.number,
                        "shard": image.unit,
                        "seed": view.seed,
                        "patch_size": self._config.patch_size,
                        **columns,
                    }
                )
        return results

    def _views(self, encoded: Sequence[EncodedImage], results: list[_Rows | Rejected]) -> Iterator[_View]:
        """The views of all images, one decoded image in memory at a time; writes rejections into `results`."""
        config = self._config
        for number, image in enumerate(encoded):
            try:
                rgb = images.decode(image.data, background=config.background, max_pixels=config.max_pixels)
                for view in range(config.views):
                    seed = seed_of(config.seed, image.key, view)
                    yield _View(number, view, seed, make_view(rgb, config, seed))
                    if isinstance(results[number], Rejected):
                        break  # an earlier view has failed
            except Rejected as rejection:
                results[number] = rejection

    def writer(self, unit: Unit, scratch: Path, metadata: Mapping[str, str]) -> TargetWriter:
        """A writer of one Parquet file of targets."""
        return TargetWriter(scratch / f"{unit.name}.parquet", {**metadata, "air.model": self._predictor.model})


@dataclass(frozen=True, eq=False)
class _View:
    """A view to be fitted.

    Attributes:
        image: Index of its image among the images that are processed together.
        number: Index of the view among the views of its image, from 0.
        seed: The seed of 64 bits that the view was drawn from.
        rgb: Its pixels, shape (H, W, 3), uint8, whole patches.
    """

    image: int
    number: int
    seed: int
    rgb: np.ndarray


def distill_views(
    views: Sequence[np.ndarray], predictor: Predictor, config: DistillConfig, device: torch.device
) -> list[dict[str, Any] | Rejected]:
    """The columns of a target row that depend on the view's pixels, for each of several views optimised together.

    Args:
        views: Each of shape (H, W, 3), uint8, whole patches.
        predictor: The predictor, on `device`.
        config: How to fit; must be settled.
        device: Where to compute.

    Returns:
        For each view its columns, or Rejected `non_finite` if its optimisation diverged.
    """
    from air.arguments import image_tensor
    from air.compute.threads import limit_torch

    pictures = [image_tensor(rgb) for rgb in views]
    with limit_torch(1):  # sums of another order would make other values on another machine
        return [
            stages if isinstance(stages, Rejected) else _view_columns(rgb, stages, config)
            for rgb, stages in zip(
                views, _fit([picture.to(device) for picture in pictures], predictor, config), strict=True
            )
        ]


def _fit(
    pictures: Sequence[torch.Tensor], predictor: Predictor, config: DistillConfig
) -> list[list[StageResult] | Rejected]:
    """The stages of each picture, on the CPU.

    If a picture diverges, or memory does not hold all pictures, each half is fitted by itself.
    """
    import torch

    from air.stages.joint import optimize_jointly
    from air.stages.loop import run_stages_batch

    assert config.canvas is not None
    alone, jointly = config.optimization()
    try:
        fitted = run_stages_batch(pictures, predictor, alone, control=config.control(), canvas=config.canvas)
        if jointly.steps:
            fitted = optimize_jointly(pictures, fitted, config.patch_size, jointly, canvas=config.canvas)
        return [[stage.to("cpu") for stage in stages] for stages in fitted]
    except (InvalidGaussiansError, NonFiniteLossError) as error:
        if len(pictures) == 1:
            return [Rejected(Reason.NON_FINITE, str(error))]
    except torch.OutOfMemoryError:
        if len(pictures) == 1:
            raise
        logger.warning("the GPU's memory does not hold %d views at once: taking half of them", len(pictures))
    half = len(pictures) // 2
    return [*_fit(pictures[:half], predictor, config), *_fit(pictures[half:], predictor, config)]


def _view_columns(rgb: np.ndarray, stages: Sequence[StageResult], config: DistillConfig) -> dict[str, Any]:
    from air.stages.loop import all_gaussians
    from pipeline.formats.targets import columns_of

    return {
        "height": rgb.shape[0],
        "width": rgb.shape[1],
        "image": images.encode_png(rgb),
        "stage": np.concatenate(
            [np.full(len(stage), stage.stage, np.int8) for stage in stages] or [np.empty(0, np.int8)]
        ),
        "anchor": np.concatenate([stage.patch.numpy().astype(np.int32) for stage in stages] or [np.empty(0, np.int32)]),
        **columns_of("predicted", all_gaussians(stages, config.patch_size, "predicted")),
        **columns_of("target", all_gaussians(stages, config.patch_size, "target")),
        **_stage_columns(stages),
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
    """Writes target rows to one Parquet file."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._rows = tables.RowWriter(path, tables.TARGETS, metadata)

    def add(self, result: _Rows) -> Mapping[str, float]:
        """Writes the views of one image; returns counts of views, Gaussians and pixels, and sums of decibels."""
        self._rows.add(result)
        # A view that has no bad patch at the start, such as an all black one, has no stage and no PSNR.
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
        """Closes the file."""
        return [self._rows.finish()]
