"""The whole way on photographs that scikit-image and scikit-learn ship: shard, distill, verify, summarise, look.

Everything goes to OUT (default: demo-out), and the last line printed is a picture to open.

  air demo
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from jobs.command import configure, make_parser
from jobs.sections import DemoConfig
from pipeline.bulk.distill import DistillConfig
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.errors import DamagedDataError
from pipeline.inputs.packaged import collect_pictures
from pipeline.storage.open import open_storage
from pipeline.work.plan import read_plan


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("demo", __doc__, DemoConfig)
    parser.add_argument("out", nargs="?", default="demo-out", metavar="OUT", help="local folder (default: demo-out)")
    given = parser.parse_args(arguments)
    models = {"demo": DemoConfig, "shard": ShardConfig, "distill": DistillConfig, "runner": RunnerConfig}
    run_demo(Path(given.out), *configure(given, **models), file=given.config)
    return 0


def run_demo(
    out: Path,
    demo: DemoConfig,
    shard_config: ShardConfig,
    distill_config: DistillConfig,
    runner: RunnerConfig,
    file: str | None,
) -> None:
    """All the steps, each with the command that does it alone; `file` is the configuration, for those commands."""
    from jobs import distill, shard, stats, verify
    from jobs.report import counted, print_outcome
    from pipeline.reports.sheet import save_sheet

    begin = time.monotonic()
    option = f" --config {file}" if file else ""
    pictures, shards, targets = (str(out / name) for name in ("pictures", "shards", "targets"))
    count = collect_pictures(out / "pictures", demo.pictures)
    print(f"{pictures}/ holds {counted(count, 'photograph')} that scikit-image and scikit-learn ship.")

    _announce(f"air shard {pictures} {shards}{option}", "Pack them, untouched, into WebDataset shards.")
    tally = shard.shard([pictures], shards, shard_config, runner)
    print_outcome(shard.describe(tally), shards, tally)

    _announce(
        f"air distill {shards} {targets}{option}",
        "Fit Gaussians in stages, each adding Gaussians only where the picture is still bad.",
    )
    tally = distill.distill(shards, targets, distill_config, runner)
    print_outcome(distill.describe(tally), targets, tally)

    _announce(f"air verify {targets}", "Hold every file against its checksum and its count.")
    if verify.main([targets]) != 0:
        raise DamagedDataError(f"{targets} did not verify; delete {out} and run the demo again")

    _announce(f"air stats {targets}", "What is in the Parquet files.")
    stats.main([targets])

    picture = out / "contact-sheet.png"
    storage = open_storage(targets)
    save_sheet(storage, read_plan(storage).config["canvas"], picture)
    print(
        f"\nDone in {time.monotonic() - begin:.0f} s. Originals, predictions, optimised Gaussians and where the stages"
    )
    print("added them, side by side:")
    print(picture.resolve())


def _announce(command: str, purpose: str) -> None:
    print(f"\n$ {command}\n{purpose}", flush=True)
