"""Learns an update rule in many small rounds, each of roll-outs in Parquet and of learning from these, in one command.

SHARDS is the output of `air shard`, or a folder of WebDataset tars. A round draws some of the shards and images, rolls
the present rule out on them as `air distill --rule` does, on Ray or in this process, and learns from what that has
stored, with no renderer. OUT gets rule.safetensors with its card, metrics.jsonl, TensorBoard events, checkpoints, and
rounds/ with every round's roll-outs. After a stop, the same command goes on; no roll-out is lost that was committed.

  air train shards/ run/ --phase rule --rounds 80 --valid validation-pictures/
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.command import configure, make_parser
from jobs.train_rule import describe
from pipeline.config import RunnerConfig
from pipeline.rules.config import RoundsConfig


def train_rounds(
    source_uri: str, output_uri: str, config: RoundsConfig, runner: RunnerConfig, valid: str | None = None
) -> dict[str, float]:
    """Plans, rolls out and learns; returns the last figures.

    Args:
        source_uri: Output of `air shard`, or a folder of WebDataset tars.
        output_uri: The run's folder.
        config: What is learned, and what a round rolls out.
        runner: Where and how roll-outs run.
        valid: Images or shards to validate on; packaged photographs if not given.

    Raises:
        AirError: What `pipeline.rules.plan.plan_rounds` and `pipeline.rules.loop.train_rule` raise.
    """
    from jobs.train_display import show_training
    from pipeline.rules.loop import train_rule as learn
    from pipeline.rules.plan import plan_rounds

    job = plan_rounds(source_uri, output_uri, config, runner, valid)
    with show_training(job.steps, samples="samples") as report:
        return learn(job, report)


def main(arguments: Sequence[str]) -> int:
    """The command `air train --phase rule --rounds N`."""
    parser = make_parser("train", __doc__, RoundsConfig, RunnerConfig)
    parser.add_argument("--phase", choices=("rule",), help="learns an update rule")
    parser.add_argument("shards_in", metavar="SHARDS", help="output of `air shard`, or a folder of WebDataset tars")
    parser.add_argument("out", metavar="OUT", help="folder for the run; a local path or a URI")
    parser.add_argument(
        "--valid", metavar="IMAGES", help="images or shards to validate on; default: photographs that packages ship"
    )
    given = parser.parse_args(arguments)
    config, runner = configure(given, rounds=RoundsConfig, runner=RunnerConfig)
    figures = train_rounds(given.shards_in, given.out, config, runner, given.valid)
    print(describe(figures, given.out))
    return 0
