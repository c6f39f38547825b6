"""Reads the targets of `air distill` in DuckDB: views, stages, and one view drawn from its row.

python examples/targets_in_duckdb.py             makes targets of two packaged photographs first
python examples/targets_in_duckdb.py targets/    reads the output of `air distill`
"""

import argparse
import tempfile
from pathlib import Path

import duckdb

import air
from air.arguments import image_tensor
from air.metrics import psnr
from jobs.distill import distill
from jobs.shard import shard
from pipeline.bulk.distill import DistillConfig
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.formats.images import decode
from pipeline.formats.targets import gaussians_of
from pipeline.inputs.packaged import collect_pictures


def make_targets(folder: Path) -> Path:
    """What `air shard` and `air distill` make of two photographs, one view of 40,000 pixels each."""
    runner = RunnerConfig(executor="inline")
    collect_pictures(folder / "pictures", 2)
    shard([str(folder / "pictures")], str(folder / "shards"), ShardConfig(), runner)
    config = DistillConfig(predictor="grid", stages=2, steps=(20,), min_view_pixels=40_000, max_view_pixels=40_000)
    distill(str(folder / "shards"), str(folder / "targets"), config, runner)
    return folder / "targets"


def show(targets: Path) -> None:
    """Prints two queries, and draws one row."""
    database = duckdb.connect()
    table = f"'{targets}/data/*.parquet'"
    columns = "key, view, width, height, len(stage) as gaussians, round(psnr_target[-1], 2) as psnr"
    print("views")
    database.sql(f"select {columns} from {table} order by key, view").show(max_width=160)
    flat = f"select unnest(stage) as stage, unnest(target_scale_1) as scale_1, unnest(target_red) as red from {table}"
    columns = "stage, count(*) as gaussians, median(scale_1) as median_scale_1, avg(abs(red)) as mean_abs_red"
    print("Gaussians by stage")
    database.sql(f"select {columns} from ({flat}) group by stage order by stage").show(max_width=160)

    row = database.sql(f"select * from {table} order by key, view limit 1").to_arrow_table().to_pylist()[0]
    drawn = air.render(gaussians_of(row, "target"), row["height"], row["width"])
    view = image_tensor(decode(row["image"]))
    print(f"{row['key']}: its target_* columns, drawn, are {psnr(drawn, view):.2f} dB from the view in its row")


def main() -> None:
    """Reads the given targets, or makes some first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="?", type=Path, help="output of `air distill`, on this machine's disk")
    given = parser.parse_args()
    if given.targets:
        show(given.targets)
        return
    with tempfile.TemporaryDirectory() as folder:
        show(make_targets(Path(folder)))


if __name__ == "__main__":
    main()
