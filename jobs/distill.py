"""Makes distillation targets: for every view of every image and every stage, Gaussians as predicted and as optimised.

SHARDS is the output of `air shard`, or a folder of WebDataset tars. Images that cannot be used go to OUT/quarantine
with a reason. After a stop, the same command goes on; `air status OUT` shows how far the job is.

  air distill shards/ targets/ --predictor grid --patch-size 5 --steps 50
  air distill shards/ targets-2/ --predictor run-1/best.safetensors

With --rule it rolls out an update rule and stores what its moves should have been; `air distill --rule adam --help`
has the options of that.
"""

from collections.abc import Sequence

from jobs.command import configure, make_parser, option_value
from jobs.display import show
from jobs.report import counted, print_outcome
from pipeline.bulk.distill import DistillConfig, DistillJob
from pipeline.config import RunnerConfig
from pipeline.errors import ConfigError
from pipeline.inputs.shards import list_shards
from pipeline.inputs.sources import check_outside
from pipeline.storage.open import open_storage
from pipeline.work.plan import Plan, Unit, settle_plan
from pipeline.work.runner import run
from pipeline.work.tally import Tally


def distill(
    source_uri: str,
    output_uri: str,
    config: DistillConfig,
    runner: RunnerConfig,
    shards: Sequence[Unit] | None = None,
) -> Tally:
    """Plans and runs the job; returns the totals.

    Args:
        source_uri: Output of `air shard`, or a folder of tars.
        output_uri: The folder for the targets.
        config: How to make them.
        runner: Where and how the job runs.
        shards: The shards to take, from `pipeline.inputs.shards.list_shards`; by default all of the source.

    Raises:
        ConfigError: The configuration asks for a GPU, but reserves none; or the predictor does not fit the
            configuration; or one of the two folders, shards and output, lies in the other.
        CheckpointError: There is no such predictor.
    """
    if config.device == "cuda" and runner.executor == "ray" and not runner.num_gpus:
        raise ConfigError("device = cuda on Ray needs GPUs to be reserved: set num_gpus, such as num_gpus = 1")
    source, output = open_storage(source_uri), open_storage(output_uri)
    check_outside(output, [source.uri()])
    predictor = config.find_predictor(output)
    units = list_shards(source) if shards is None else shards
    plan = Plan.make("distill", config.settled(predictor), units, [source.uri()])
    plan = settle_plan(output, predictor.hold(plan))
    with show("distill") as display:
        return run(DistillJob(config, source, predictor), plan, output, runner, display)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    if option_value(arguments, "--rule") is not None:
        from jobs.distill_rule import main as distill_rule

        return distill_rule(arguments)
    parser = make_parser("distill", __doc__, DistillConfig, RunnerConfig)
    parser.add_argument("--rule", metavar="RULE", help="roll out this update rule in place of making targets")
    parser.add_argument("shards", metavar="SHARDS", help="output of `air shard`, or a folder of WebDataset tars")
    parser.add_argument("out", metavar="OUT", help="folder for the targets; a local path or a URI")
    given = parser.parse_args(arguments)
    config, runner = configure(given, distill=DistillConfig, runner=RunnerConfig)
    tally = distill(given.shards, given.out, config, runner)
    print_outcome(describe(tally), given.out, tally)
    return 0


def describe(tally: Tally) -> str:
    """What a distill job made, as one phrase."""
    done = tally.summary
    views, images, gaussians = (int(done[name]) for name in ("views", "images", "gaussians"))
    text = f"{counted(views, 'view')} of {counted(images, 'image')}, {counted(gaussians, 'Gaussian')}"
    if done["psnr_views"]:
        predicted, target = (done[f"psnr_{name}_sum"] / done["psnr_views"] for name in ("predicted", "target"))
        text += f", mean PSNR {predicted:.2f} dB as predicted by stage 0, {target:.2f} dB after the last stage"
    return text
