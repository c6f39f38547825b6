"""Learns an update rule, from stored roll-outs or from fresh ones, and writes it with its card.

INPUT is the output of `air distill --rule R`, once or several times with one rule: then the run needs no image and no
renderer. Or it is pictures or the output of `air shard`: then every step rolls out the present rule. OUT gets
rule.safetensors with its card, metrics.jsonl, TensorBoard events and checkpoints. After a stop, the same command goes
on from the last checkpoint.

  air train shards/ run/ --phase rule --steps 2000 --valid validation-pictures/
  air train round-1/ rule-1/ --phase rule --valid validation-pictures/

With --rounds N one command rolls out into files and learns from them, N times;
`air train --phase rule --rounds 80 --help` has the options of that.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.command import configure, make_parser
from pipeline.rules.config import RuleConfig


def train_rule(
    inputs: Sequence[str], output_uri: str, config: RuleConfig, valid: str | None = None
) -> dict[str, float]:
    """Plans and learns; returns the last figures.

    Args:
        inputs: Outputs of `air distill --rule`; or pictures, or outputs of `air shard`.
        output_uri: The run's folder.
        config: What is learned.
        valid: Images or shards to validate on; packaged photographs if not given.

    Raises:
        AirError: What `pipeline.rules.plan.plan_rule` and `pipeline.rules.loop.train_rule` raise.
    """
    from jobs.train_display import show_training
    from pipeline.rules.loop import train_rule as learn
    from pipeline.rules.plan import plan_rule

    job = plan_rule(inputs, output_uri, config, valid)
    with show_training(job.steps, samples="samples" if job.blocks else "roll-outs") as report:
        return learn(job, report)


def main(arguments: Sequence[str]) -> int:
    """The command `air train --phase rule`."""
    parser = make_parser("train", __doc__, RuleConfig)
    parser.add_argument("--phase", choices=("rule",), help="learns an update rule")
    parser.add_argument("input", nargs="+", metavar="INPUT", help="roll-outs of one rule, or pictures to roll out on")
    parser.add_argument("out", metavar="OUT", help="folder for the run; a local path or a URI")
    parser.add_argument(
        "--valid", metavar="IMAGES", help="images or shards to validate on; default: photographs that packages ship"
    )
    given = parser.parse_args(arguments)
    (config,) = configure(given, rule=RuleConfig)
    figures = train_rule(given.input, given.out, config, given.valid)
    print(describe(figures, given.out))
    return 0


def describe(figures: dict[str, float], output: str) -> str:
    """One sentence about a finished run: steps, samples, time, the last validation, and where the rule is."""
    reached = ", ".join(
        f"{value:.2f} dB after {name.removeprefix('valid_psnr_')} steps"
        for name, value in figures.items()
        if name.startswith("valid_psnr_")
    )
    return (
        f"{int(figures['step']):,} steps, {int(figures['samples']):,} samples in {figures['seconds']:.0f} s; "
        f"validation: {reached}. The rule: {output.rstrip('/')}/rule.safetensors"
    )
