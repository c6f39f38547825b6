"""Rolls an update rule out on every image, and stores what the moves should have been: targets of `air train`.

SHARDS is the output of `air shard`, or a folder of WebDataset tars. A fit of a crop grows as `air fit` does, by the
rule. Of a sample of its updates OUT gets what the rule saw, the move that it made, and the derivative of the later
losses by the move. Images that cannot be used go to OUT/quarantine with a reason. After a stop, the same command goes
on; `air status OUT` shows how far the job is.

  air distill shards/ round-1/ --rule adam --fits 4
  air train round-1/ rule-1/ --phase rule
  air distill shards/ round-2/ --rule rule-1/rule.safetensors --fits 4
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.command import configure, make_parser
from jobs.display import show
from jobs.report import counted, print_outcome
from pipeline.config import RunnerConfig
from pipeline.inputs.shards import list_shards
from pipeline.inputs.sources import check_outside
from pipeline.rules.config import DistillRuleConfig
from pipeline.rules.reference import find_rule
from pipeline.rules.rollouts import RollOutJob, settle_roll_outs
from pipeline.storage.open import open_storage
from pipeline.work.runner import run
from pipeline.work.tally import Tally


def distill_rule(source_uri: str, output_uri: str, config: DistillRuleConfig, runner: RunnerConfig) -> Tally:
    """Plans and runs the job; returns the totals.

    Raises:
        ConfigError: One of the two folders, shards and output, lies in the other.
        CheckpointError: There is no such rule.
    """
    source, output = open_storage(source_uri), open_storage(output_uri)
    check_outside(output, [source.uri()])
    rule = find_rule(config.rule, output)
    config = config.model_copy(update={"rule": rule.name})
    plan = settle_roll_outs(output, config, source, list_shards(source), rule)
    with show("distill") as display:
        return run(RollOutJob(config, source, rule), plan, output, runner, display)


def main(arguments: Sequence[str]) -> int:
    """The command `air distill --rule R`."""
    parser = make_parser("distill", __doc__, DistillRuleConfig, RunnerConfig)
    parser.add_argument("shards", metavar="SHARDS", help="output of `air shard`, or a folder of WebDataset tars")
    parser.add_argument("out", metavar="OUT", help="folder for the roll-outs; a local path or a URI")
    given = parser.parse_args(arguments)
    config, runner = configure(given, rollout=DistillRuleConfig, runner=RunnerConfig)
    tally = distill_rule(given.shards, given.out, config, runner)
    print_outcome(describe(tally), given.out, tally)
    return 0


def describe(tally: Tally) -> str:
    """What the job made, as one phrase."""
    done = tally.summary
    fits, images, samples = (int(done[name]) for name in ("fits", "images", "samples"))
    text = f"{counted(fits, 'roll-out')} of {counted(images, 'image')}, {counted(samples, 'sample')}"
    if fits:
        first, last = (done[f"psnr_{name}_sum"] / fits for name in ("first", "last"))
        text += f", mean PSNR {first:.2f} dB at the start, {last:.2f} dB at the end"
    return text
