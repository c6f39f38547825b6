"""Encodes images as .air files: one image as one file, or any number in tars. A Parquet row about each image of a bulk
job gives bytes, bits per pixel, PSNR and MS-SSIM.

IMAGES are the output of `air shard`, or folders, globs, image files, tars and Parquet files with image bytes. Give at
most one target: --gaussians, --pixels-per-gaussian, --bpp or --psnr. Without a target Gaussians start from the shipped
predictor, which is quickest; with a target they are grown, which gives more decibels for the same bits. --predictor
overrides that choice. Images that cannot be used go to OUT/quarantine with a reason. After a stop, the same command
goes on; the files are the same, byte for byte.

One image file and an OUT that ends in .air give one file; a file of that name is replaced. Options of bulk work, such
as --embed and --executor, are then refused.

  air encode photo.jpg photo.air --bpp 0.5
  air encode photos/ encoded/
  air encode photos/ encoded/ --bpp 0.5
  air encode shards/ encoded/ --predictor run/best.safetensors --stored-steps 20
"""

import argparse
import os
import posixpath
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jobs.command import configure, make_parser
from jobs.display import show
from jobs.report import counted, print_outcome
from pipeline.bulk.decode import AIR_ENDING
from pipeline.bulk.encode import (
    EncodeConfig,
    EncodeJob,
    encode_image,
    find_start,
    measure,
    plan_encode,
    prepare_encoder,
)
from pipeline.config import RunnerConfig
from pipeline.errors import ConfigError, JobFailedError, Rejected
from pipeline.formats import images
from pipeline.inputs.sources import check_outside, find_file
from pipeline.storage.open import check_writable, open_parent, open_storage
from pipeline.storage.uri import normalise
from pipeline.work.plan import settle_plan
from pipeline.work.runner import run
from pipeline.work.tally import Tally

_BULK_ONLY = ("embed", "max_count", "image_column")


def encode(inputs: Sequence[str], output_uri: str, config: EncodeConfig, runner: RunnerConfig) -> Tally:
    """Plans and runs the job; returns the totals.

    Raises:
        ConfigError: There are no images, or two have the same key; or the output lies within an input; or the predictor
            has fewer stages than are asked for.
        CheckpointError: There is no such predictor.
    """
    output = open_storage(output_uri)
    inputs = [normalise(given) for given in inputs]
    check_outside(output, inputs)
    predictor = find_start(config, output)
    plan, listings, read = plan_encode(config, predictor, inputs, output)
    plan = settle_plan(output, plan, listings)
    with show("encode") as display:
        return run(EncodeJob(config, predictor, read), plan, output, runner, display)


def encode_file(image: str, output_uri: str, config: EncodeConfig) -> dict[str, Any]:
    """Encodes one image file as one .air file.

    Args:
        image: A local path or a URI.
        output_uri: The .air file, a local path or a URI. Written whole; a file of that name is replaced.
        config: What to make.

    Returns:
        As `pipeline.bulk.encode.measure`.

    Raises:
        ConfigError: There is no such image.
        StorageError: The image cannot be read, or the file cannot be written.
        JobFailedError: The image cannot be used, or no file meets the target.
        CheckpointError: There is no such predictor.
    """
    source, name = find_file(image)
    data = source.read(name)
    predictor = find_start(config)
    check_writable(output_uri)
    prepare_encoder(predictor, partial(print, flush=True))
    try:
        rgb = images.decode(data, background=config.background, max_pixels=config.max_pixels)
        blob = encode_image(rgb, config.settled(predictor), predictor, threads=os.cpu_count() or 1)
    except Rejected as rejection:
        raise JobFailedError(f"{image}: {rejection}") from None
    output, target = open_parent(output_uri)
    output.write(target, blob)
    return measure(blob, rgb)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("encode", __doc__, EncodeConfig, RunnerConfig)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="output of `air shard`, or what `air shard` takes")
    parser.add_argument("out", metavar="OUT", help="folder for the files, or one .air file; a local path or a URI")
    given = parser.parse_args(arguments)
    config, runner = configure(given, encode=EncodeConfig, runner=RunnerConfig)
    if given.out.endswith(AIR_ENDING):
        _check_single(given)
        print(describe_file(encode_file(given.images[0], given.out, config)), given.out, sep="\n")
        return 0
    tally = encode(given.images, given.out, config, runner)
    print_outcome(describe(tally), given.out, tally)
    return 0


def _check_single(given: argparse.Namespace) -> None:
    """Raises ConfigError unless the input is one image file and no option is for bulk work alone."""
    endings = images.IMAGE_EXTENSIONS
    if len(given.images) != 1 or posixpath.splitext(given.images[0])[1].lower() not in endings:
        raise ConfigError(
            f"{given.out} is one .air file, which is made from one image file, whose name ends in "
            f"{', '.join(sorted(endings))}; for other inputs OUT is a folder, whose name does not end in {AIR_ENDING}"
        )
    bulk_only = [name for name in (*_BULK_ONLY, *RunnerConfig.model_fields) if hasattr(given, name)]
    if bulk_only:
        flags = ", ".join("--" + name.replace("_", "-") for name in bulk_only)
        raise ConfigError(
            f"{flags}: only for bulk work, not for a single .air file; leave it out, or give a folder as OUT"
        )


def describe_file(measured: Mapping[str, Any]) -> str:
    """Size and quality of one .air file, in one line."""
    return (
        f"{measured['width']} x {measured['height']} pixels, {counted(sum(measured['gaussians']), 'Gaussian')}, "
        f"{counted(measured['bytes'], 'byte')}, {measured['bpp']:.3f} bits per pixel, {measured['psnr']:.2f} dB, "
        f"MS-SSIM {measured['ms_ssim']:.4f}"
    )


def describe(tally: Tally) -> str:
    """What an encode job made, as one phrase."""
    done = tally.summary
    count, size = int(done["images"]), done["file_bytes"]
    text = f"{counted(count, 'file')} ({size / 1e6:.2f} MB), {counted(int(done['gaussians']), 'Gaussian')}"
    if count:
        text += (
            f", {8 * size / done['pixels']:.3f} bits per pixel, mean PSNR {done['psnr_sum'] / count:.2f} dB, "
            f"mean MS-SSIM {done['ms_ssim_sum'] / count:.4f}"
        )
    return text
