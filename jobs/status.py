"""Shows how far a job is: which shards of its plan are committed; of a training run, its steps and validations. It also
shows which process holds the folder's lease, which is the one that works there.

It needs no running service and no log. With --json it prints one JSON object; docs/operations.md lists its keys.

air status targets/
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from jobs.command import make_parser
from jobs.report import print_table, rejections
from pipeline.config import Config
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.work.lease import Standing, describe, read_standing
from pipeline.work.manifest import Manifest, count_rows, read_manifests
from pipeline.work.plan import Plan, read_plan
from pipeline.work.tally import mean_psnr

MAX_MISSING_SHOWN = 5


class LeaseStatus(Config):
    """Who holds the folder's lease.

    Attributes:
        number: The fencing number.
        purpose: What the process does, such as `distill`.
        host: Name of its machine.
        pid: Its process number there.
        command: Its command line.
        since: When it took the lease, UTC, ISO 8601.
        silence_seconds: Since its last sign of life, by two clocks that may differ.
        lease_seconds: After so many seconds without a sign of life another command may take over.
    """

    number: int
    purpose: str
    host: str
    pid: int
    command: str
    since: str
    silence_seconds: float
    lease_seconds: float


class UnitCount(Config):
    """Units of a plan."""

    total: int
    done: int


class Rates(Config):
    """What work costs, by the commits so far; None where nothing is known yet.

    Attributes:
        seconds_per_image: Worker seconds for each image, those in quarantine included.
        seconds_per_megapixel: Worker seconds for each million pixels of results.
        seconds_left: Estimate of the worker seconds that are left, by the images, or else the bytes, that are left.
    """

    seconds_per_image: float | None
    seconds_per_megapixel: float | None
    seconds_left: float | None


class JobStatus(Config):
    """How far a bulk job is.

    Attributes:
        output: URI of the folder.
        job: Name of the job.
        plan: Hash of the plan.
        input: Where the input is.
        lease: Who holds the lease; None if nobody does.
        finished: Whether every unit is committed.
        units: Units of the plan.
        to_do: Names of the units that are not committed.
        samples: Images of the committed units, those in quarantine included.
        rejected: Images in quarantine by reason.
        rows: Rows of the committed Parquet files; without such files, samples in tars.
        bytes: Size of the committed data files.
        summary: Sums that the job chooses.
        psnr: Mean PSNR of the results, in dB; None if the job measures none.
        seconds: Seconds of workers on the committed units.
        seconds_by_part: The same by part of an attempt: prepare, read, process, write.
        rates: What the work costs.
    """

    output: str
    job: str
    plan: str
    input: tuple[str, ...]
    lease: LeaseStatus | None
    finished: bool
    units: UnitCount
    to_do: tuple[str, ...]
    samples: int
    rejected: dict[str, int]
    rows: int
    bytes: int
    summary: dict[str, float]
    psnr: float | None
    seconds: float
    seconds_by_part: dict[str, float]
    rates: Rates


class Validation(Config):
    """A validation: its step and the PSNR in dB."""

    step: int
    psnr: float


class TrainingStatus(Config):
    """How far a training run is.

    Attributes:
        output: URI of the folder.
        job: Always `train`.
        plan: Hash of the plan.
        input: Where the input is.
        lease: Who holds the lease; None if nobody does.
        finished: Whether the run has ended.
        step: The step of the newest checkpoint.
        steps: Steps of the whole run.
        step_by_metrics: The last step in `metrics.jsonl`.
        samples: Samples until the checkpoint.
        skipped: How many of these could not be used.
        seconds: Training time until the checkpoint.
        round: Of a rule that learns in rounds, where it stands, in words; None for other runs.
        validations: In the order of steps.
    """

    output: str
    job: Literal["train"]
    plan: str
    input: tuple[str, ...]
    lease: LeaseStatus | None
    finished: bool
    step: int
    steps: int
    step_by_metrics: int
    samples: int
    skipped: int
    seconds: float
    round: str | None
    validations: tuple[Validation, ...]


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("status", __doc__)
    parser.add_argument("out", metavar="OUT", help="output folder of a job; a local path or a URI")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    output = open_storage(given.out)
    plan = read_plan(output)
    lease = read_standing(output)
    status = status_of_training(output, plan, lease) if plan.job == "train" else status_of_job(output, plan, lease)
    if given.json:
        print(status.model_dump_json(indent=1))
    elif isinstance(status, TrainingStatus):
        print_training(given.out, status, describe(lease))
    else:
        print_job(given.out, status, describe(lease))
    return 0


def status_of_job(output: Storage, plan: Plan, lease: Standing | None) -> JobStatus:
    """How far a bulk job is, by its plan and its commits."""
    manifests = list(read_manifests(output))
    done = {manifest.unit for manifest in manifests}
    to_do = sorted(unit.name for unit in plan.units if unit.name not in done)
    rejected: Counter[str] = Counter()
    summary: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    for manifest in manifests:
        rejected.update(manifest.rejected)
        summary.update(manifest.summary)
        parts.update(manifest.seconds_by_part)
    files = [file for manifest in manifests for file in manifest.files]
    return JobStatus(
        output=output.uri(),
        job=plan.job,
        plan=plan.hash,
        input=plan.source,
        lease=_lease_status(lease),
        finished=not to_do,
        units=UnitCount(total=len(plan.units), done=len(manifests)),
        to_do=tuple(to_do),
        samples=sum(manifest.samples for manifest in manifests),
        rejected=dict(rejected.most_common()),
        rows=count_rows(files),
        bytes=sum(file.bytes for file in files),
        summary=dict(summary),
        psnr=mean_psnr(lambda name: summary[name]),
        seconds=round(sum(manifest.seconds for manifest in manifests), 3),
        seconds_by_part={part: round(seconds, 3) for part, seconds in parts.items()},
        rates=_rates(plan, manifests, summary["pixels"]),
    )


def _lease_status(lease: Standing | None) -> LeaseStatus | None:
    if lease is None or lease.is_free:
        return None
    shown = lease.holder.model_dump(include=set(LeaseStatus.model_fields))
    return LeaseStatus(number=lease.number, silence_seconds=round(lease.silence, 3), **shown)


def _rates(plan: Plan, manifests: Sequence[Manifest], pixels: float) -> Rates:
    seconds = sum(manifest.seconds for manifest in manifests)
    samples = sum(manifest.samples for manifest in manifests)
    done = {manifest.unit for manifest in manifests}
    counted = all(unit.samples is not None for unit in plan.units)
    sizes = {unit.name: (unit.samples or 0) if counted else unit.bytes for unit in plan.units}
    size_done = sum(size for name, size in sizes.items() if name in done)
    left = sum(sizes.values()) - size_done
    return Rates(
        seconds_per_image=seconds / samples if samples else None,
        seconds_per_megapixel=seconds / pixels * 1e6 if pixels else None,
        seconds_left=0.0 if len(done) == len(plan.units) else seconds / size_done * left if size_done else None,
    )


def status_of_training(output: Storage, plan: Plan, lease: Standing | None) -> TrainingStatus:
    """How far a training run is, by its checkpoints and metrics."""
    if plan.config.get("phase") == "rule":
        from pipeline.rules.audit import standing
    else:
        from pipeline.training.audit import standing

    run = standing(output)
    rounds = None
    if plan.config.get("targets") == "rounds":
        from pipeline.rules.audit import round_at

        rounds = round_at(output, run.step)
    return TrainingStatus(
        output=output.uri(),
        job="train",
        plan=plan.hash,
        input=plan.source,
        lease=_lease_status(lease),
        finished=run.finished,
        step=run.step,
        steps=run.steps,
        step_by_metrics=run.told,
        samples=run.samples,
        skipped=run.skipped,
        seconds=run.seconds,
        round=rounds,
        validations=tuple(Validation(step=step, psnr=psnr) for step, psnr in run.validations),
    )


def print_job(title: str, status: JobStatus, lease: str) -> None:
    """Prints how far a bulk job is and who holds its lease, for people."""
    rows: list[tuple[str, object]] = [
        ("job", status.job),
        ("plan", status.plan[:12]),
        ("input", ", ".join(status.input)),
        ("lease", lease),
        ("shards done", f"{status.units.done} of {status.units.total}"),
        ("images seen", status.samples),
        ("quarantined", rejections(status.rejected.items())),
        ("rows", status.rows),
        ("MB", status.bytes / 1e6),
        ("worker seconds", status.seconds),
    ]
    if status.psnr is not None:
        rows.append(("mean PSNR, dB", status.psnr))
    print_table(title, ("", ""), rows)
    print_cost(status)
    if status.to_do:
        more = f" and {len(status.to_do) - MAX_MISSING_SHOWN} more" if len(status.to_do) > MAX_MISSING_SHOWN else ""
        shown = ", ".join(status.to_do[:MAX_MISSING_SHOWN])
        print(f"to do: {shown}{more}. Run the same `air {status.job}` again to go on.")
    else:
        print("complete")


def print_cost(status: JobStatus) -> None:
    """Prints what the work costs, in one line; nothing before the first commit."""
    rates = status.rates
    parts = [
        f"{seconds:,.3g} s per {thing}"
        for thing, seconds in (("image", rates.seconds_per_image), ("megapixel", rates.seconds_per_megapixel))
        if seconds is not None
    ]
    if parts and rates.seconds_left:
        parts.append(f"about {rates.seconds_left:,.0f} s to the end")
    if parts:
        print(f"cost in worker time: {', '.join(parts)}")


def print_training(title: str, status: TrainingStatus, lease: str) -> None:
    """Prints how far a training run is and who holds its lease, for people."""
    rows: list[tuple[str, object]] = [
        ("job", status.job),
        ("plan", status.plan[:12]),
        ("input", ", ".join(status.input)),
        ("lease", lease),
        ("steps, by the newest checkpoint", f"{status.step} of {status.steps}"),
        ("steps, by metrics.jsonl", status.step_by_metrics),
        ("samples", status.samples),
        ("samples that could not be used", status.skipped),
        ("training seconds", status.seconds),
    ]
    if status.round is not None:
        rows.append(("round", status.round))
    if status.validations:
        best = max(status.validations, key=lambda validation: validation.psnr)
        rows += [
            (f"{name} validation", f"{validation.psnr:.2f} dB in step {validation.step}")
            for name, validation in (("last", status.validations[-1]), ("best", best))
        ]
    print_table(title, ("", ""), rows)
    print(
        "finished"
        if status.finished
        else "not finished. If no `air train` holds the lease, run the same command again to go on."
    )
