"""Packs images into WebDataset shards.

Folders (searched recursively), globs, image files, tars and Parquet files with image bytes go in. Images stay as they
are, byte for byte; images that cannot be read go to OUT/quarantine with a reason. After a stop, the same command goes
on.

  air shard photos/ 'more/**/*.jpg' archive.tar table.parquet shards/
"""

from collections.abc import Sequence

from jobs.command import configure, make_parser
from jobs.display import show
from jobs.report import counted, print_outcome
from pipeline.bulk.shard import ShardConfig, ShardJob, plan_shards
from pipeline.config import RunnerConfig
from pipeline.inputs.sources import check_outside
from pipeline.storage.open import open_storage
from pipeline.storage.uri import normalise
from pipeline.work.plan import settle_plan
from pipeline.work.runner import run
from pipeline.work.tally import Tally


def shard(inputs: Sequence[str], output_uri: str, config: ShardConfig, runner: RunnerConfig) -> Tally:
    """Plans and runs the job; returns the totals.

    Raises:
        ConfigError: There are no images, or two have the same key; or the output lies within an input.
        StorageError: An input cannot be read.
    """
    output = open_storage(output_uri)
    # Workers may run in another folder, where relative paths mean other files.
    inputs = [normalise(given) for given in inputs]
    check_outside(output, inputs)
    plan, listings = plan_shards(config, inputs)
    plan = settle_plan(output, plan, listings)
    with show("shard") as display:
        return run(ShardJob(config, inputs, output), plan, output, runner, display)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("shard", __doc__, ShardConfig, RunnerConfig)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="folders, globs, image files, tars, Parquet files")
    parser.add_argument("out", metavar="OUT", help="folder for the shards; a local path or a URI")
    given = parser.parse_args(arguments)
    config, runner = configure(given, shard=ShardConfig, runner=RunnerConfig)
    tally = shard(given.images, given.out, config, runner)
    print_outcome(describe(tally), given.out, tally)
    return 0


def describe(tally: Tally) -> str:
    """What a shard job made, as one phrase."""
    kept, size = int(tally.summary["images"]), tally.summary["image_bytes"] / 1e6
    return f"{counted(kept, 'image')} ({size:.1f} MB) in {counted(tally.units_total, 'shard')}"
