"""Runs every step on photographs that scikit-image and scikit-learn ship: shard, distill, verify, stats, contact sheet.

All files go to OUT (default: demo-out). The last printed line is the path of a picture to open.

  air demo
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from jobs import distill, shard, stats, verify
from jobs.command import configure, make_parser
from jobs.report import counted, print_outcome
from jobs.sections import DemoConfig
from pipeline.bulk.distill import DistillConfig
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.errors import DamagedDataError
from pipeline.inputs.packaged import collect_pictures
from pipeline.storage.open import open_storage


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
    """Runs all steps, and prints before each the command that does the same.

    Args:
        out: The folder for all files.
        demo: Which pictures.
        shard_config: How they are packed.
        distill_config: How Gaussians are fitted.
        runner: Where and how the jobs run.
        file: The configuration file, for the printed commands.

    Raises:
        ConfigError: The packages that ship the photographs are not installed.
        DamagedDataError: The targets do not verify.
    """
    from pipeline.reports.sheet import save_sheet

    begin = time.monotonic()
    option = f" --config {file}" if file else ""
    pictures, shards, targets = (str(out / name) for name in ("pictures", "shards", "targets"))
    count = collect_pictures(out / "pictures", demo.pictures)
    print(f"{pictures}/ holds {counted(count, 'photograph')} that scikit-image and scikit-learn ship.")

    _announce(f"air shard {pictures} {shards}{option}", "Packs the photographs, unchanged, into WebDataset shards.")
    tally = shard.shard([pictures], shards, shard_config, runner)
    print_outcome(shard.describe(tally), shards, tally)

    _announce(
        f"air distill {shards} {targets}{option}",
        "Fits Gaussians in stages; each stage adds Gaussians only where the picture is still bad.",
    )
    tally = distill.distill(shards, targets, distill_config, runner)
    print_outcome(distill.describe(tally), targets, tally)

    _announce(f"air verify {targets}", "Compares every file with its checksum and its count.")
    if verify.main([targets]) != 0:
        raise DamagedDataError(f"{targets} did not verify; delete {out} and run the demo again")

    _announce(f"air stats {targets}", "Summarises the Parquet files.")
    stats.main([targets])

    picture = out / "contact-sheet.png"
    storage = open_storage(targets)
    save_sheet(storage, picture)
    print(f"\nDone in {time.monotonic() - begin:.0f} s. Side by side: originals, predictions, optimised Gaussians, and")
    print("where the stages added them:")
    print(picture.resolve())


def _announce(command: str, purpose: str) -> None:
    print(f"\n$ {command}\n{purpose}", flush=True)
