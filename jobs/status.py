"""Shows how far a job is: which shards of its plan are committed; of a training run, its steps and validations.

It needs no running service and no log.

air status targets/
"""

from collections import Counter
from collections.abc import Sequence

from jobs.command import make_parser
from jobs.report import mean_psnr, print_table, rejections
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.work.manifest import count_rows, read_manifests
from pipeline.work.plan import Plan, read_plan

MAX_MISSING_SHOWN = 5


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("status", __doc__)
    parser.add_argument("out", metavar="OUT", help="output folder of a job; a local path or a URI")
    given = parser.parse_args(arguments)
    output = open_storage(given.out)
    plan = read_plan(output)
    if plan.job == "train":
        print_training(given.out, output, plan)
        return 0
    manifests = list(read_manifests(output))
    planned = {unit.name: unit for unit in plan.units}
    missing = sorted(planned.keys() - {manifest.unit for manifest in manifests})
    rejected: Counter[str] = Counter()
    summary: Counter[str] = Counter()
    for manifest in manifests:
        rejected.update(manifest.rejected)
        summary.update(manifest.summary)
    files = [file for manifest in manifests for file in manifest.files]
    rows: list[tuple[str, object]] = [
        ("job", plan.job),
        ("plan", plan.hash[:12]),
        ("input", ", ".join(plan.source)),
        ("shards done", f"{len(manifests)} of {len(plan.units)}"),
        ("images seen", sum(manifest.samples for manifest in manifests)),
        ("quarantined", rejections(rejected.most_common())),
        ("rows", count_rows(files)),
        ("MB", sum(file.bytes for file in files) / 1e6),
        ("worker seconds", sum(manifest.seconds for manifest in manifests)),
    ]
    psnr = mean_psnr(lambda name: summary[name])
    if psnr is not None:
        rows.append(("mean PSNR, dB", psnr))
    print_table(given.out, ("", ""), [(name, value) for name, value in rows])
    if missing:
        more = f" and {len(missing) - MAX_MISSING_SHOWN} more" if len(missing) > MAX_MISSING_SHOWN else ""
        print(f"to do: {', '.join(missing[:MAX_MISSING_SHOWN])}{more}. Run the same `air {plan.job}` again to go on.")
    else:
        print("complete")
    return 0


def print_training(title: str, output: Storage, plan: Plan) -> None:
    """Prints how far a training run is, by its checkpoints and metrics."""
    if plan.config.get("phase") == "rule":
        from pipeline.rules.audit import standing
    else:
        from pipeline.training.audit import standing

    run = standing(output)
    rows: list[tuple[str, object]] = [
        ("job", plan.job),
        ("plan", plan.hash[:12]),
        ("input", ", ".join(plan.source)),
        ("steps, by the newest checkpoint", f"{run.step} of {run.steps}"),
        ("steps, by metrics.jsonl", run.told),
        ("samples", run.samples),
        ("samples that could not be used", run.skipped),
        ("training seconds", run.seconds),
    ]
    if plan.config.get("targets") == "rounds":
        from pipeline.rules.audit import round_at

        rows.append(("round", round_at(output, run.step)))
    if run.validations:
        best = max(run.validations, key=lambda validation: validation[1])
        rows += [
            (f"{name} validation", f"{psnr:.2f} dB in step {step}")
            for name, (step, psnr) in (("last", run.validations[-1]), ("best", best))
        ]
    print_table(title, ("", ""), rows)
    print(
        "finished"
        if run.finished
        else "not finished. If no `air train` is running, run the same command again to go on."
    )
