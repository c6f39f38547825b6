"""Removes what killed attempts left behind: data that no manifest names, and temporary files.

A job that ends well does this itself, except for temporary files of the last day. While a job works in the folder, this
command refuses: attempts that have not committed yet would lose their files. A training run removes its old checkpoints
itself; of a training run only temporary files are removed.

  air gc targets/
"""

from collections.abc import Sequence

from jobs.command import make_parser
from jobs.report import counted
from pipeline.storage.open import open_storage
from pipeline.work.audit import remove_garbage
from pipeline.work.lease import hold
from pipeline.work.plan import read_plan


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("gc", __doc__)
    parser.add_argument("out", metavar="OUT", help="output folder of a job; a local path or a URI")
    given = parser.parse_args(arguments)
    output = open_storage(given.out)
    plan = read_plan(output)  # refuses a folder that is not the output of a job
    with hold(output, "gc") as lease:
        temporaries = output.sweep_temporaries(older_than=0)
        if plan.job == "train":
            print(f"{given.out}: a training run keeps no garbage; removed {counted(temporaries, 'temporary file')}")
            return 0
        files, size = remove_garbage(output.guarded(lease.check))
    print(
        f"{given.out}: removed {counted(files, 'file')} ({size / 1e6:.1f} MB) and "
        f"{counted(temporaries, 'temporary file')}"
    )
    return 0
