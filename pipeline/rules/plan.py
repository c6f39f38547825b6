"""What a rule's run is to do: its plan, the rule that it begins with, and the pictures that it validates on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from air.defaults import ADAM, SHIPPED, has_rule
from pipeline.errors import TrainingError
from pipeline.inputs.pictures import fingerprint
from pipeline.inputs.sources import check_outside
from pipeline.rules.config import RuleConfig
from pipeline.rules.reference import RuleReference, find_rule
from pipeline.rules.rollouts import JOB
from pipeline.rules.stored import StoredBlock, StoredRollOuts, find_roll_outs
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.storage.uri import normalise
from pipeline.training.plan import VALIDATION, keep_validation, validation_pictures
from pipeline.training.validation import check_images
from pipeline.work.plan import PLAN_PATH, Plan, read_plan, settle_plan

PHASE = "rule"
"""The phase of `air train` that learns a rule, as plans have it."""

_ONLINE_STEPS = 2000
"""Steps of a run without files, unless it is given another number."""


@dataclass(frozen=True)
class RuleJob:
    """Everything that a run needs to know.

    Attributes:
        config: What is learned; its number of steps is settled.
        steps: Steps of the whole run.
        begin: The rule to begin with.
        blocks: Stored samples; empty if the run rolls out itself.
        pictures: Inputs to roll out on; empty if the samples are stored.
        output: URI of the run's folder.
        plan: Hash of the run's plan.
        valid: URI of the validation images.
        notes: What the card says of data and settings.
    """

    config: RuleConfig
    steps: int
    begin: RuleReference
    blocks: tuple[StoredBlock, ...]
    pictures: tuple[str, ...]
    output: str
    plan: str
    valid: str
    notes: dict[str, object]


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
    plan = plan.holding("from_", begin.model, begin.sha256)
    with validation_pictures(output, valid) as pictures:
        check_images(pictures, config.valid_images)
        held = {"phase": PHASE, **held, VALIDATION: fingerprint(pictures)}
        plan = settle_plan(output, plan.model_copy(update={"config": {**plan.config, **held}}))
        pictures = normalise(valid) if valid else keep_validation(output, pictures)
    return RuleJob(
        config=config,
        steps=steps,
        begin=begin,
        blocks=tuple(stored.blocks) if stored else (),
        pictures=() if stored else tuple(normalise(given) for given in inputs),
        output=output.uri(),
        plan=plan.hash,
        valid=pictures,
        notes={"settings": plan.config, "data": _data(plan)},
    )


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
