"""All Parquet schemas of the project, with units in the field metadata, and writers of such tables.

Each quantity is a column; quantities of Gaussians are a list per image. DuckDB, Polars and pandas read the files
without this project. This module knows columns and must not know how their values are computed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 1
"""Grows by one whenever a column changes its name, type or meaning."""

ROW_GROUP_BYTES = 64 * 1024 * 1024
"""A row group ends when its uncompressed columns reach this size."""

GAUSSIAN_QUANTITIES = ("x", "y", "scale_1", "scale_2", "angle", "red", "green", "blue")
"""Column suffixes of one Gaussian, in the order of the raw channels."""

_UNITS = {
    "x": "pixels, 0 at the centre of the left column",
    "y": "pixels, 0 at the centre of the top row",
    "scale_1": "pixels, standard deviation along the first axis",
    "scale_2": "pixels, standard deviation along the second axis",
    "angle": "radians from x towards y (downwards), between 0 and 2 pi",
    "red": "signed amplitude, 1 is white",
    "green": "signed amplitude, 1 is white",
    "blue": "signed amplitude, 1 is white",
}


def _field(name: str, kind: pa.DataType, unit: str) -> pa.Field:
    return pa.field(name, kind, nullable=False, metadata={"unit": unit})


def _per_gaussian(name: str, kind: pa.DataType, unit: str) -> pa.Field:
    return _field(name, pa.list_(pa.field("element", kind, nullable=False)), f"per Gaussian: {unit}")


def _per_stage(name: str, kind: pa.DataType, unit: str) -> pa.Field:
    return _field(name, pa.list_(pa.field("element", kind, nullable=False)), f"per stage: {unit}")


def _vector(size: int) -> pa.DataType:
    return pa.list_(pa.field("element", pa.float32(), nullable=False), size)


def _per_sample(name: str, kind: pa.DataType, unit: str) -> pa.Field:
    return _field(name, pa.list_(pa.field("element", kind, nullable=False)), f"per sample: {unit}")


TARGETS = pa.schema(
    [
        _field("key", pa.string(), "identifies the image"),
        _field("view", pa.int32(), "number of the view of the image, from 0"),
        _field("shard", pa.string(), "shard that held the image"),
        _field("seed", pa.uint64(), "seed of the view, from the plan's seed, key and view"),
        _field("height", pa.int32(), "pixels"),
        _field("width", pa.int32(), "pixels"),
        _field("patch_size", pa.int32(), "pixels"),
        _field("image", pa.binary(), "the view as a lossless PNG, sRGB"),
        _per_gaussian("stage", pa.int8(), "stage that added it, from 0"),
        _per_gaussian("anchor", pa.int32(), "row-major index of its patch"),
        *[_per_gaussian(f"predicted_{name}", pa.float32(), _UNITS[name]) for name in GAUSSIAN_QUANTITIES],
        *[_per_gaussian(f"target_{name}", pa.float32(), _UNITS[name]) for name in GAUSSIAN_QUANTITIES],
        _per_stage("gaussians", pa.int32(), "Gaussians that it added"),
        _per_stage("steps", pa.int32(), "optimisation steps"),
        _per_stage(
            "psnr_predicted", pa.float32(), "dB, this stage's Gaussians as predicted, on the earlier stages' canvas"
        ),
        _per_stage("psnr_target", pa.float32(), "dB, the targets of this stage and of all earlier ones together"),
        _per_stage("loss_first", pa.float32(), "0.7 L1 + 0.3 (1 - SSIM) before the first step"),
        _per_stage("loss_last", pa.float32(), "0.7 L1 + 0.3 (1 - SSIM) of the picture of psnr_target"),
    ]
)
"""Distillation targets: one row per view, sorted by shard, key and view."""

RULE_FEATURES, RAW_NUMBERS = 52, 8
"""Lengths of the vectors of a roll-out: what an update rule sees of a Gaussian, and the raw numbers that it moves."""

ROLL_OUTS = pa.schema(
    [
        _field("key", pa.string(), "identifies the image"),
        _field("fit", pa.int32(), "number of the fit of the image, from 0"),
        _field("shard", pa.string(), "shard that held the image"),
        _field("seed", pa.uint64(), "seed of the fit, from the plan's seed, key and fit"),
        _field("top", pa.int32(), "pixels of the image above the crop"),
        _field("left", pa.int32(), "pixels of the image to the left of the crop"),
        _field("height", pa.int32(), "pixels of the crop, before it is turned"),
        _field("width", pa.int32(), "pixels of the crop, before it is turned"),
        _field("turn", pa.int8(), "sum of 1: left and right swapped, 2: top and bottom swapped, 4: then transposed"),
        _field("patch_size", pa.int32(), "pixels between the anchors of the grid at the start"),
        _field("num_gaussians", pa.int32(), "most Gaussians of the fit"),
        _field("steps", pa.int32(), "updates of the fit"),
        _field("start_fraction", pa.float64(), "fraction of the Gaussians in the grid at the start"),
        _field("growths", pa.int32(), "times that Gaussians are added"),
        _field("growth_fraction", pa.float64(), "fraction of the steps before the last growth"),
        _field("discount", pa.float64(), "weight of a later loss as against the loss before it"),
        _field("final_weight", pa.float64(), "additional weight of the last loss"),
        _field("rule", pa.string(), "rule that made the moves: adam, or rule:checksum of its weights"),
        _field("fraction", pa.float64(), "fraction of the Gaussians that each update drew as samples"),
        _field("samples", pa.int32(), "samples of the fit, which all lists per sample have"),
        _field(
            "loss",
            pa.list_(pa.field("element", pa.float32(), nullable=False)),
            "per picture: 0.7 L1 + 0.3 (1 - SSIM) before every update, and after the last",
        ),
        _field(
            "psnr",
            pa.list_(pa.field("element", pa.float32(), nullable=False)),
            "per picture: dB before every update, and after the last",
        ),
        _per_sample("update", pa.int32(), "number of the update in the fit, from 0"),
        _per_sample("features", _vector(RULE_FEATURES), "what the rule saw of the Gaussian"),
        _per_sample("move", _vector(RAW_NUMBERS), "move of each raw number, in scheduled learning rates"),
        _per_sample("credit", _vector(RAW_NUMBERS), "derivative of the objective by the move"),
        _per_sample("curvature", _vector(RAW_NUMBERS), "second derivative of the objective by each number of the move"),
    ]
)
"""Roll-outs of an update rule: one row per fit of a crop, sorted by shard, key and fit."""

ENCODED = pa.schema(
    [
        _field("key", pa.string(), "identifies the image, and names its file in the tar"),
        _field("shard", pa.string(), "shard that held the image"),
        _field("height", pa.int32(), "pixels"),
        _field("width", pa.int32(), "pixels"),
        _per_stage("gaussians", pa.int32(), "Gaussians in the file"),
        _field("bytes", pa.int64(), "size of the .air file"),
        _field("bpp", pa.float64(), "bits per pixel, the whole file counted"),
        _field("psnr", pa.float32(), "dB, of the decoded picture against the image"),
        _field("ms_ssim", pa.float32(), "MS-SSIM of the decoded picture, 1 if equal"),
    ]
)
"""Encoded images: one row each, in the order of the tar that has the files."""

ENCODED_WITH_FILES = ENCODED.append(_field("air", pa.binary(), "the .air file"))
"""Encoded images with the files in the table, for output without a tar."""

QUARANTINE = pa.schema(
    [
        _field("key", pa.string(), "identifies the image"),
        _field("shard", pa.string(), "shard at work"),
        _field("stage", pa.string(), "job that refused the image"),
        _field("reason", pa.string(), "short code"),
        _field("message", pa.string(), "what was found, and in which file"),
        _field("sha256", pa.string(), "of the image's bytes, hexadecimal; empty where they could not be read"),
        _field("bytes", pa.int64(), "size of the image's bytes"),
    ]
)
"""Images that could not be used: one row each, from every job."""

EVALUATION = pa.schema(
    [
        _field("key", pa.string(), "identifies the image"),
        _field("predictor", pa.string(), "what predicted: architecture:checksum of a checkpoint, grid, or plain grid"),
        _field("patch_size", pa.int32(), "pixels between anchors"),
        _field("refine_steps", pa.int32(), "steps of joint optimisation after the prediction"),
        _field("height", pa.int32(), "pixels"),
        _field("width", pa.int32(), "pixels"),
        _field("psnr", pa.float64(), "dB, of the image clamped to [0, 1]"),
        _field("ms_ssim", pa.float64(), "multi-scale structural similarity, at most 1"),
        _field("num_gaussians", pa.int32(), "Gaussians of all stages"),
        _per_stage("gaussians", pa.int32(), "Gaussians that it added"),
        _field("predict_seconds", pa.float64(), "wall time of all stages, from pixels to Gaussians"),
        _field("refine_seconds", pa.float64(), "wall time of the optimisation"),
    ]
)
"""Quality and time of predictors: one row per image, predictor and number of refinement steps."""

CODEC_EVALUATION = pa.schema(
    [
        _field("key", pa.string(), "identifies the image"),
        _field("codec", pa.string(), "AIR, JPEG, WebP, JPEG 2000 or AVIF"),
        _field(
            "target_bpp",
            pa.float64(),
            "limit of the .air file, in bits per pixel; other codecs' files are no larger than that file if possible",
        ),
        _field("height", pa.int32(), "pixels"),
        _field("width", pa.int32(), "pixels"),
        _field("setting", pa.float64(), "step of AIR's quantiser; quality; for JPEG 2000 the compression ratio"),
        _field("num_gaussians", pa.int32(), "Gaussians of the .air file, 0 for other codecs"),
        _field("bytes", pa.int64(), "size of the file"),
        _field("bpp", pa.float64(), "bits per pixel, the whole file counted"),
        _field("psnr", pa.float64(), "dB, of the decoded picture, 8 bits a channel"),
        _field("ms_ssim", pa.float64(), "MS-SSIM of the decoded picture, 1 if equal"),
        _field(
            "encode_seconds", pa.float64(), "wall time from pixels to the file; AIR's with the search for the target"
        ),
        _field("decode_seconds", pa.float64(), "wall time from the file to 8-bit pixels, least of three"),
    ]
)
"""Quality, size and time of codecs: one row per image, target and codec."""

FRONT = pa.schema(
    [
        _field("key", pa.string(), "identifies the image"),
        _field(
            "method",
            pa.string(),
            "architecture:checksum of a network; grid; growing and the update rule; or plain grid",
        ),
        _field("steps", pa.int32(), "steps of the fit, or of joint optimisation after the prediction"),
        _field("height", pa.int32(), "pixels"),
        _field("width", pa.int32(), "pixels"),
        _field("num_gaussians", pa.int32(), "Gaussians of the image"),
        _field("psnr", pa.float64(), "dB, of the image clamped to [0, 1]"),
        _field("ms_ssim", pa.float64(), "multi-scale structural similarity, at most 1"),
        _field("loss", pa.float64(), "0.7 L1 + 0.3 (1 - SSIM) of the image as drawn, not clamped"),
        _field("seconds", pa.float64(), "wall time from pixels to Gaussians"),
        _field("cpu_seconds", pa.float64(), "time of all cores together from pixels to Gaussians"),
    ]
)
"""Quality over time of the ways to Gaussians: one row per image, number of steps and method."""


class RowWriter:
    """Writes rows to one Parquet file, one row group at a time, so memory is bounded."""

    def __init__(self, path: Path, schema: pa.Schema, metadata: Mapping[str, str]) -> None:
        self._path = path
        self._schema = schema
        self._parquet = open_writer(str(path), stamped(schema, metadata))
        self._batches: list[pa.RecordBatch] = []
        self._bytes = 0
        self._count = 0

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows, each a value for every column by name."""
        batch = pa.RecordBatch.from_pylist(rows, schema=self._schema)
        self._batches.append(batch)
        self._bytes += batch.nbytes
        self._count += len(rows)
        if self._bytes >= ROW_GROUP_BYTES:
            self._flush()

    def finish(self) -> tuple[Path, int]:
        """Closes the file; returns its path and its number of rows. A file without rows still has its columns."""
        self._flush()
        self._parquet.close()
        return self._path, self._count

    def _flush(self) -> None:
        if self._batches:
            table = pa.Table.from_batches(self._batches, schema=self._schema)
            stamp = self._parquet.schema.metadata
            self._parquet.write_table(table.replace_schema_metadata(stamp), row_group_size=2**31)
        self._batches, self._bytes = [], 0


def stamped(schema: pa.Schema, metadata: Mapping[str, str]) -> pa.Schema:
    """The schema with the schema version and `metadata` as file metadata.

    Args:
        schema: One of this module's schemas.
        metadata: Identifies the run, such as the plan's hash.
    """
    return schema.with_metadata({"air.schema_version": str(SCHEMA_VERSION), **metadata})


def open_writer(path: str, schema: pa.Schema) -> pq.ParquetWriter:
    """A Parquet writer with this project's encodings: zstd, floats split by byte, dictionaries for short codes only."""
    dictionaries = []
    encodings = {}
    for field in schema:
        column, kind = field.name, field.type
        while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            column, kind = f"{column}.list.element", kind.value_type
        if pa.types.is_floating(kind):
            encodings[column] = "BYTE_STREAM_SPLIT"
        elif field.name == "anchor":
            encodings[column] = "DELTA_BINARY_PACKED"
        elif field.name in ("shard", "stage", "reason", "predictor", "codec", "rule", "method"):
            dictionaries.append(column)
    options: dict[str, Any] = {"use_dictionary": dictionaries or False, "column_encoding": encodings or None}
    return pq.ParquetWriter(path, schema, compression="zstd", **options)
