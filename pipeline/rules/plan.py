"""What a rule's run is to do: its plan, the rule that it begins with, and the pictures that it validates on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from air.defaults import ADAM, SHIPPED, has_rule
from pipeline.config import LeaseConfig, RunnerConfig
from pipeline.errors import TrainingError
from pipeline.inputs.pictures import fingerprint
from pipeline.inputs.shards import list_shards
from pipeline.inputs.sources import check_outside
from pipeline.rules.config import RoundsConfig, RuleConfig, RunConfig
from pipeline.rules.reference import RuleReference, find_rule
from pipeline.rules.rollouts import JOB
from pipeline.rules.stored import StoredBlock, StoredRollOuts, find_roll_outs
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.storage.uri import normalise
from pipeline.training.plan import VALIDATION, keep_validation, validation_pictures
from pipeline.training.validation import check_images
from pipeline.work.plan import PLAN_PATH, Plan, Unit, read_plan, settle_plan

PHASE = "rule"
"""The phase of `air train` that learns a rule, as plans have it."""

ROUNDS = "rounds"
"""What plans of runs in rounds have as `targets`."""

_ONLINE_STEPS = 2000
"""Steps of a run without files, unless it is given another number."""


@dataclass(frozen=True)
class _RunJob:
    """What every run needs to know.

    Attributes:
        steps: Steps of the whole run.
        begin: The rule to begin with.
        output: URI of the run's folder.
        plan: Hash of the run's plan.
        valid: URI of the validation images.
        notes: What the card says of data and settings.
    """

    steps: int
    begin: RuleReference
    output: str
    plan: str
    valid: str
    notes: dict[str, object]


@dataclass(frozen=True)
class RuleJob(_RunJob):
    """A run that learns from stored samples, or from fresh roll-outs without files.

    Attributes:
        config: What is learned; its number of steps is settled.
        blocks: Stored samples; empty if the run rolls out itself.
        pictures: Inputs to roll out on; empty if the samples are stored.
    """

    config: RuleConfig
    blocks: tuple[StoredBlock, ...]
    pictures: tuple[str, ...]

    @property
    def lease(self) -> LeaseConfig:
        """How the run holds its folder."""
        return self.config


@dataclass(frozen=True)
class RoundsJob(_RunJob):
    """A run that rolls out and learns in rounds.

    Attributes:
        config: What is learned, and what a round rolls out.
        runner: Where and how roll-outs run.
        source: URI of the shards.
        shards: All shards.
    """

    config: RoundsConfig
    runner: RunnerConfig
    source: str
    shards: tuple[Unit, ...]

    @property
    def lease(self) -> LeaseConfig:
        """How the run holds its folder, and the folders of its rounds."""
        return self.runner


def plan_rule(inputs: Sequence[str], output_uri: str, config: RuleConfig, valid: str | None = None) -> RuleJob:
    """Checks everything that can be checked beforehand, and writes the plan or compares it with the folder's plan.

    Args:
        inputs: Outputs of `air distill --rule`; or pictures, or outputs of `air shard`, to roll out on.
        output_uri: The run's folder.
        config: What is learned.
        valid: Images or shards to validate on; packaged photographs if not given.

    Raises:
        CheckpointError: There is no such rule to begin with.
        ConfigError: There are no pictures, or the packaged photographs are not installed.
        DamagedDataError: A stored file cannot be read.
        PlanMismatchError: The folder belongs to another plan.
        TrainingError: The inputs or the rule to begin with do not fit.
    """
    output = open_storage(output_uri)
    sources = [open_storage(given) for given in inputs]
    check_outside(output, [source.uri() for source in sources])
    stored = _stored(sources)
    if stored:
        begin = _begin_of(stored, config, inputs, output)
        steps = config.steps or max(1, -(-config.passes * stored.samples // config.batch))
        held: dict[str, object] = {"targets": "offline"}
    else:
        begin = find_rule(config.from_ or ADAM, output, "from_")
        steps = config.steps or _ONLINE_STEPS
        held = {"targets": "online", "pictures": [fingerprint(given) for given in inputs]}
    config = config.model_copy(update={"steps": steps, "from_": begin.name})
    plan = Plan.make("train", config, stored.units if stored else (), [source.uri() for source in sources])
    plan, valid = _settle(output, plan.holding("from_", begin.model, begin.sha256), held, config, valid)
    return RuleJob(
        steps=steps,
        begin=begin,
        output=output.uri(),
        plan=plan.hash,
        valid=valid,
        notes={"settings": plan.config, "data": _data(plan)},
        config=config,
        blocks=tuple(stored.blocks) if stored else (),
        pictures=() if stored else tuple(normalise(given) for given in inputs),
    )


def plan_rounds(
    source_uri: str, output_uri: str, config: RoundsConfig, runner: RunnerConfig, valid: str | None = None
) -> RoundsJob:
    """Checks everything that can be checked beforehand, and writes the plan or compares it with the folder's plan.

    Args:
        source_uri: Output of `air shard`, or a folder of WebDataset tars.
        output_uri: The run's folder.
        config: What is learned, and what a round rolls out.
        runner: Where and how roll-outs run.
        valid: Images or shards to validate on; packaged photographs if not given.

    Raises:
        CheckpointError: There is no such rule to begin with.
        ConfigError: There are no shards, or the packaged photographs are not installed.
        JobFailedError: The job that makes the shards has not finished.
        PlanMismatchError: The folder belongs to another plan.
    """
    output, source = open_storage(output_uri), open_storage(source_uri)
    check_outside(output, [source.uri()])
    shards = list_shards(source)
    begin = find_rule(config.from_ or ADAM, output, "from_")
    steps = config.rounds * config.round_steps
    config = config.model_copy(update={"from_": begin.name})
    plan = Plan.make("train", config, shards, [source.uri()]).holding("from_", begin.model, begin.sha256)
    plan, valid = _settle(output, plan, {"targets": ROUNDS, "steps": steps}, config, valid)
    data = f"{sum(shard.samples or 0 for shard in shards)} images in {len(shards)} shards, plan {plan.hash[:12]}"
    return RoundsJob(
        steps=steps,
        begin=begin,
        output=output.uri(),
        plan=plan.hash,
        valid=valid,
        notes={"settings": plan.config, "data": [data]},
        config=config,
        runner=runner,
        source=source.uri(),
        shards=tuple(shards),
    )


def _settle(
    output: Storage, plan: Plan, held: Mapping[str, object], config: RunConfig, valid: str | None
) -> tuple[Plan, str]:
    """Settles the plan, with `held` beside the configuration; returns it, and the URI of the validation images."""
    with validation_pictures(output, valid) as pictures:
        check_images(pictures, config.valid_images)
        held = {"phase": PHASE, **held, VALIDATION: fingerprint(pictures)}
        plan = settle_plan(output, plan.model_copy(update={"config": {**plan.config, **held}}))
        return plan, normalise(valid) if valid else keep_validation(output, pictures)


def _stored(sources: Sequence[Storage]) -> StoredRollOuts | None:
    """The stored roll-outs, if the inputs are such; None if they are pictures."""
    are = [source.exists(PLAN_PATH) and read_plan(source).job == JOB for source in sources]
    if not any(are):
        return None
    if not all(are):
        other = sources[are.index(False)].uri()
        raise TrainingError(f"{other} is not the output of `air {JOB}`, and other inputs are: give one kind of input")
    return find_roll_outs(sources)


def _begin_of(stored: StoredRollOuts, config: RuleConfig, inputs: Sequence[str], output: Storage) -> RuleReference:
    """The rule to begin with, which must be the one that rolled out: goals lie around its moves.

    Raises:
        TrainingError: It is another rule, or it must be named.
    """
    listed = ", ".join(inputs)
    if config.from_ is None:
        for name in (ADAM, SHIPPED):
            if (name != SHIPPED or has_rule()) and (found := find_rule(name)).model == stored.rule:
                return found
        raise TrainingError(f"the roll-outs in {listed} are of {stored.rule}: name its file with --from")
    begin = find_rule(config.from_, output, "from_")
    if begin.model != stored.rule:
        raise TrainingError(
            f"the roll-outs in {listed} are of {stored.rule}, and --from {config.from_} is {begin.model}: begin with "
            "the rule that rolled out, or roll out again with this one"
        )
    return begin


def _data(plan: Plan) -> list[str]:
    """The inputs by name and checksum, without their places."""
    pictures = plan.config.get("pictures")
    return list(pictures) if pictures else [f"{unit.name}: sha256 {unit.sha256}" for unit in plan.units]
