"""Checks counts and checksums of everything that a job committed, and names what is damaged or missing.

The exit status is 1 if anything is. With --repair it takes back the commits that do not verify; the job's own command
then does those shards again. Of a training run it checks checkpoints, cards and metrics; --repair removes damaged files
from OUT/checkpoints, and damaged roll-outs from OUT/rounds. While a job works in the folder, --repair refuses.

air verify targets/ && next-step
"""

import logging
from collections.abc import Sequence

from jobs.command import make_parser
from jobs.report import counted
from pipeline.storage.open import open_storage
from pipeline.work.lease import hold
from pipeline.work.manifest import count_rows, read_manifests
from pipeline.work.plan import read_plan

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("verify", __doc__)
    parser.add_argument("out", metavar="OUT", help="output folder of a job; a local path or a URI")
    parser.add_argument("--repair", action="store_true", help="take back the commits that do not verify")
    given = parser.parse_args(arguments)
    output = open_storage(given.out)
    plan = read_plan(output)
    training = plan.job == "train"
    if training and plan.config.get("phase") == "rule":
        from pipeline.rules.audit import repair_rule as repair
        from pipeline.rules.audit import verify_rule as verify
    elif training:
        from pipeline.training.audit import repair_run as repair
        from pipeline.training.audit import verify_run as verify
    else:
        from pipeline.work.audit import repair, verify
    if given.repair:
        with hold(output, "verify --repair") as lease:
            for path in repair(output.guarded(lease.check)):
                logger.warning("took back %s", path)
    problems = 0
    for problem in verify(output):
        problems += 1
        logger.error("%s", problem)
    if problems:
        logger.error(
            "%s: %s. The job's own command, run again, does shards that are not done; after `air verify --repair` it "
            "does damaged ones, too.",
            given.out,
            counted(problems, "problem"),
        )
        return 1
    if training:
        more = " and all rounds" if plan.config.get("targets") == "rounds" else ""
        print(f"{given.out}: verified the checkpoints, their cards, the metrics{more}; the run is finished and intact")
        return 0
    manifests = list(read_manifests(output))
    files = [file for manifest in manifests for file in manifest.files]
    quarantined = sum(manifest.quarantine.rows for manifest in manifests if manifest.quarantine)
    megabytes = sum(file.bytes for file in files) / 1e6
    print(
        f"{given.out}: verified {counted(len(manifests), 'shard')}, {counted(len(files), 'file')}, "
        f"{counted(count_rows(files), 'row')}, {megabytes:.1f} MB, {counted(quarantined, 'row')} in quarantine; "
        "complete and intact"
    )
    return 0
