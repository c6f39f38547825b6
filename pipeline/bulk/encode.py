"""Bulk encoding: an .air file and a Parquet row for every image; a tar and a Parquet file for every unit of work.

The files depend on the images' bytes and keys and on the configuration alone, so a run that was killed and started
again leaves the same files, byte for byte. Times differ from run to run and are therefore in the manifests. This module
knows nothing of Ray; torch and the kernels load with the first image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from pydantic import Field, model_validator

from air.defaults import GRID, GROW, GROWING_STEPS, STEPS_AFTER_PREDICTION, STORED_STEPS, start_of_encoding
from air.errors import CodecError, InvalidGaussiansError, NonFiniteLossError, TargetMissedError
from pipeline.config import Background, Config
from pipeline.errors import ConfigError, Reason, Rejected
from pipeline.formats import images, tables
from pipeline.formats.tars import MAX_SHARD_BYTES, open_tar
from pipeline.inputs.shards import list_images, list_shards, read_listing, read_samples
from pipeline.inputs.sources import ItemReader
from pipeline.predictors import PredictorReference, find_predictor, load
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.work.plan import PLAN_PATH, Plan, Unit
from pipeline.work.process import EncodedImage, Sample

_TARGETS = ("gaussians", "pixels_per_gaussian", "bpp", "psnr")


class EncodeConfig(Config):
    """How `air encode` encodes an image.

    At most one target is given. Without a target, growing takes one Gaussian for every 48 pixels, and a predictor as
    many Gaussians as it predicts.
    """

    gaussians: int | None = Field(None, ge=1, le=100_000_000, description="target: most Gaussians of an image")
    pixels_per_gaussian: float | None = Field(
        None, ge=3, le=1e8, description="target: pixels of the image for each Gaussian, at least"
    )
    bpp: float | None = Field(None, gt=0, le=1000, description="target: most bits per pixel of the whole file")
    psnr: float | None = Field(None, gt=0, le=100, description="target: least dB of the decoded picture")
    predictor: str | None = Field(
        None,
        description="grow: fit from scratch; or start from a prediction of compact, grid, NAME.safetensors or a name "
        "in a registry; default: grow with a target, compact without one",
    )
    stages: int | None = Field(None, ge=1, le=16, description="most stages of a predictor; default: all")
    steps: int | None = Field(
        None, ge=0, le=1_000_000, description="steps on all Gaussians together; default: 150, or 10 after a prediction"
    )
    stored_steps: int = Field(
        STORED_STEPS, ge=0, le=1_000_000, description="further steps, on the Gaussians as they are stored"
    )
    embed: bool = Field(False, description="put the files in the Parquet column air instead of a tar")
    max_count: int = Field(64, ge=1, le=1_000_000, description="images in a unit of work; of shards, each is a unit")
    image_column: str | None = Field(None, description="Parquet column with image bytes; default: a known name")
    max_pixels: int = Field(images.MAX_PIXELS, ge=1, description="images with more pixels are refused before decoding")
    background: Background = images.WHITE

    @model_validator(mode="after")
    def _bounded(self) -> EncodeConfig:
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are targets: give only one of them")
        if self.stages is not None and (self.predictor == GROW or (self.predictor is None and given)):
            raise ValueError(f"stages = {self.stages} needs a predictor: name one, such as predictor = compact")
        return self

    def settled(self, reference: PredictorReference | None) -> EncodeConfig:
        """The configuration with the values that depend on the predictor filled in.

        Args:
            reference: The predictor; None if Gaussians are grown.

        Raises:
            ConfigError: More stages are asked for than the predictor has, or stages without a predictor.
        """
        if reference is None and self.stages is not None:
            raise ConfigError(f"stages = {self.stages} needs a predictor: name one, such as predictor = grid")
        usual = GROWING_STEPS if reference is None else STEPS_AFTER_PREDICTION
        steps = usual if self.steps is None else self.steps
        stages = None if reference is None else reference.stages(self.stages)
        name = GROW if reference is None else reference.name
        return self.model_copy(update={"predictor": name, "stages": stages, "steps": steps})

    @property
    def has_target(self) -> bool:
        """Whether the configuration gives a target."""
        return any(getattr(self, name) is not None for name in _TARGETS)

    def target(self, height: int, width: int) -> dict[str, Any]:
        """The target for an image of that size, as arguments of `air.encode`."""
        if self.pixels_per_gaussian is not None:
            return {"gaussians": max(1, int(height * width / self.pixels_per_gaussian))}
        return {name: getattr(self, name) for name in ("gaussians", "bpp", "psnr") if getattr(self, name) is not None}


def find_start(config: EncodeConfig, output: Storage | None = None) -> PredictorReference | None:
    """The predictor of a configuration, by the same rule as `air.encode`; None if Gaussians are grown.

    Args:
        config: How to encode.
        output: The output folder, whose plan says what an alias of a registry stood for when the job began.

    Raises:
        CheckpointError: There is no such predictor.
    """
    name = start_of_encoding(config.has_target) if config.predictor is None else config.predictor
    return None if name == GROW else find_predictor(name, others=(GROW, GRID), output=output)


def plan_encode(
    config: EncodeConfig, predictor: PredictorReference | None, inputs: Sequence[str], output: Storage
) -> tuple[Plan, dict[str, bytes], Callable[[Unit], Iterator[Sample]]]:
    """The plan, the listings that the plan names, and a function that reads the samples of a unit.

    Args:
        config: How to encode.
        predictor: From `find_start`.
        inputs: The output of `air shard`, alone; or what `air shard` takes.
        output: The storage for the files.

    Raises:
        ConfigError: There are no images, or two have the same key; or shards are given beside other inputs.
        StorageError: An input cannot be read.
        JobFailedError: The shards are not finished.
    """
    of_jobs = [given for given in inputs if open_storage(given).exists(PLAN_PATH)]
    if of_jobs and len(inputs) > 1:
        raise ConfigError(f"{of_jobs[0]} is the output of a job: give it alone, without other inputs")
    if of_jobs:
        source = open_storage(of_jobs[0])
        plan = _plan(config, predictor, list_shards(source), [source.uri()])
        return plan, {}, partial(read_samples, source)
    units, listings = list_images(inputs, config.max_count, MAX_SHARD_BYTES, config.image_column)
    plan = _plan(config, predictor, units, inputs)
    return plan, listings, partial(read_listing, output, ItemReader(inputs, config.image_column))


def _plan(
    config: EncodeConfig, predictor: PredictorReference | None, units: Sequence[Unit], source: Sequence[str]
) -> Plan:
    plan = Plan.make("encode", config.settled(predictor), units, source)
    return plan if predictor is None else predictor.hold(plan)


@dataclass(frozen=True)
class EncodedFile:
    """An .air file, its row of the table, and the seconds spent on decoding, encoding and measuring, by name."""

    row: dict[str, Any]
    blob: bytes
    seconds: dict[str, float]


class EncodeJob:
    """Turns images into .air files.

    Args:
        config: How to encode.
        predictor: From `find_start`.
        read: Reads the samples of a unit.
    """

    name: ClassVar[str] = "encode"

    def __init__(
        self, config: EncodeConfig, predictor: PredictorReference | None, read: Callable[[Unit], Iterator[Sample]]
    ) -> None:
        self._config = config.settled(predictor)
        self._predictor = predictor
        self._read = read

    def prepare(self, say: Callable[[str], None]) -> None:
        """Loads the predictor, and compiles the kernels once per machine and version.

        Raises:
            CheckpointError: The predictor cannot be loaded, or is not the one in the plan.
        """
        prepare_encoder(self._predictor, say)

    def samples(self, unit: Unit, scratch: Path) -> Iterator[Sample]:
        """The unit's images."""
        return self._read(unit)

    def process(self, image: EncodedImage) -> EncodedFile:
        """The image's file and row. Raises Rejected as `images.decode` and `encode_image` do."""
        begin = time.perf_counter()
        rgb = images.decode(image.data, background=self._config.background, max_pixels=self._config.max_pixels)
        decoded = time.perf_counter()
        blob = encode_image(rgb, self._config, self._predictor)
        encoded = time.perf_counter()
        row = {"key": image.key, "shard": image.unit, **measure(blob, rgb)}
        seconds = {
            "decode_seconds": decoded - begin,
            "encode_seconds": encoded - decoded,
            "measure_seconds": time.perf_counter() - encoded,
        }
        return EncodedFile(row, blob, seconds)

    def writer(self, unit: Unit, scratch: Path, metadata: Mapping[str, str]) -> EncodeWriter:
        """A writer of one tar and one Parquet file."""
        model = {} if self._predictor is None else {"air.model": self._predictor.model}
        return EncodeWriter(unit.name, scratch, {**metadata, **model}, self._config.embed)


def prepare_encoder(predictor: PredictorReference | None, say: Callable[[str], None]) -> None:
    """Loads the predictor and compiles the kernels of `encode_image`, and says so if that takes long.

    Raises:
        CheckpointError: The predictor cannot be loaded, or is not the one that the reference names.
    """
    import torch

    from air.warmup import warm_up

    if predictor is not None:
        load(predictor, torch.device("cpu"))
    warm_up("encode", say)


def encode_image(
    rgb: np.ndarray, config: EncodeConfig, predictor: PredictorReference | None, threads: int = 1
) -> bytes:
    """The .air file of an image, the same with any number of threads.

    Args:
        rgb: The image, shape (H, W, 3), uint8.
        config: How to encode; must be settled.
        predictor: From `find_start`.
        threads: Number of CPU threads, at most.

    Raises:
        Rejected: `target_missed`: no file meets the target; `unsupported`: the .air format cannot hold the image;
            `non_finite`: the fit diverged.
    """
    import torch

    from air.encoding.encode import encode

    start = GROW if predictor is None else load(predictor, torch.device("cpu"))
    options = {"steps": config.steps, "stored_steps": config.stored_steps, **config.target(*rgb.shape[:2])}
    with encoding_rejects():
        return encode(rgb, predictor=start, stages=config.stages, threads=threads, **options)


@contextmanager
def encoding_rejects() -> Iterator[None]:
    """Within the block, errors of `air.encode` about an image become Rejected, with the reasons of `encode_image`."""
    try:
        yield
    except TargetMissedError as error:
        raise Rejected(Reason.TARGET_MISSED, str(error)) from None
    except CodecError as error:
        raise Rejected(Reason.UNSUPPORTED, str(error)) from None
    except (InvalidGaussiansError, NonFiniteLossError) as error:
        raise Rejected(Reason.NON_FINITE, str(error)) from None


def measure(blob: bytes, rgb: np.ndarray) -> dict[str, Any]:
    """Measures a file: the columns of its row about size, Gaussians, bits and quality.

    Args:
        blob: The .air file.
        rgb: The image, shape (H, W, 3), uint8.
    """
    import air
    from air.arguments import image_tensor
    from air.codec.file import read_info
    from air.metrics import ms_ssim, psnr

    height, width = rgb.shape[:2]
    image = image_tensor(rgb)
    drawn = air.render(air.decode(blob, max_pixels=height * width), height, width)
    return {
        "height": height,
        "width": width,
        "gaussians": list(read_info(blob, max_pixels=height * width).num_gaussians),
        "bytes": len(blob),
        "bpp": 8 * len(blob) / (height * width),
        "psnr": psnr(drawn, image),
        "ms_ssim": ms_ssim(drawn, image),
    }


class EncodeWriter:
    """Writes `<unit>.tar` with a member `<key>.air` for each image, and `<unit>.parquet` with its row.

    Equal results give equal bytes. With `embed` the files go into the rows, and there is no tar.
    """

    def __init__(self, unit: str, scratch: Path, metadata: Mapping[str, str], embed: bool) -> None:
        self._embed = embed
        schema = tables.ENCODED_WITH_FILES if embed else tables.ENCODED
        self._rows = tables.RowWriter(scratch / f"{unit}.parquet", schema, metadata)
        self._path = scratch / f"{unit}.tar"
        self._stream: BinaryIO | None = None if embed else self._path.open("wb")
        self._tar = open_tar(self._stream) if self._stream else None

    def add(self, result: EncodedFile) -> Mapping[str, float]:
        """Writes a file; returns counts of images, pixels, Gaussians and bytes, and sums of quality and of seconds."""
        row = result.row
        if self._tar is None:
            self._rows.add([{**row, "air": result.blob}])
        else:
            self._tar.write({"__key__": row["key"], "air": result.blob})
            self._rows.add([row])
        return {
            "images": 1,
            "pixels": row["height"] * row["width"],
            "gaussians": sum(row["gaussians"]),
            "file_bytes": row["bytes"],
            "psnr_sum": row["psnr"],
            "ms_ssim_sum": row["ms_ssim"],
            **result.seconds,
        }

    def finish(self) -> list[tuple[Path, int]]:
        """Closes the files, which exist even without images."""
        path, count = self._rows.finish()
        if self._tar is None or self._stream is None:
            return [(path, count)]
        self._tar.close()
        self._stream.close()
        return [(self._path, count), (path, count)]
