"""Encodes images as .air files, in tars, with a Parquet row about each: bytes, bits per pixel, PSNR, MS-SSIM.

IMAGES are the output of `air shard`, or folders, globs, image files, tars and Parquet files with image bytes. Give at
most one target: --gaussians, --pixels-per-gaussian, --bpp or --psnr. Without a target Gaussians start from the shipped
predictor, which is quickest; with one they are grown, which gives more decibels for the same bits; --predictor decides
otherwise. Images that cannot be used go to OUT/quarantine with a reason. Run again to go on after a stop: the files are
the same, byte for byte.

  air encode photos/ encoded/
  air encode photos/ encoded/ --bpp 0.5
  air encode shards/ encoded/ --predictor run/best.safetensors --stored-steps 20
"""

from collections.abc import Sequence

from jobs.command import configure, make_parser
from jobs.display import show
from jobs.report import print_outcome
from pipeline.config import RunnerConfig
from pipeline.encode import EncodeConfig, EncodeJob, find_start, plan_encode
from pipeline.runner import Tally, run
from pipeline.sources import check_outside
from pipeline.storage import normalise, open_storage
from pipeline.work import settle_plan


def encode(inputs: Sequence[str], output_uri: str, config: EncodeConfig, runner: RunnerConfig) -> Tally:
    """Plans and runs; returns the totals.

    Raises:
        ConfigError: No images, two with one key, an output within an input, or more stages than the predictor has.
        CheckpointError: There is no such predictor.
    """
    output = open_storage(output_uri)
    inputs = [normalise(given) for given in inputs]
    check_outside(output, inputs)
    predictor = find_start(config)
    plan, listings, read = plan_encode(config, predictor, inputs, output)
    plan = settle_plan(output, plan, listings)
    with show("encode") as display:
        return run(EncodeJob(config, predictor, read), plan, output, runner, display)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("encode", __doc__, EncodeConfig, RunnerConfig)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="output of `air shard`, or what it takes")
    parser.add_argument("out", metavar="OUT", help="folder for the files; a local path or a URI")
    given = parser.parse_args(arguments)
    config, runner = configure(given, encode=EncodeConfig, runner=RunnerConfig)
    tally = encode(given.images, given.out, config, runner)
    print_outcome(describe(tally), given.out, tally)
    return 0


def describe(tally: Tally) -> str:
    """What an encode job made, in one phrase."""
    done = tally.summary
    count, size = int(done["images"]), done["file_bytes"]
    text = f"{count} files ({size / 1e6:.2f} MB), {int(done['gaussians']):,} Gaussians"
    if count:
        text += (
            f", {8 * size / done['pixels']:.3f} bits per pixel, mean PSNR {done['psnr_sum'] / count:.2f} dB, "
            f"mean MS-SSIM {done['ms_ssim_sum'] / count:.4f}"
        )
    return text
