"""A job of your own on the runner: the mean colour of every image in a folder, in Parquet.

The runner plans, retries, quarantines, commits and resumes. The job says what the result of one image is.

python examples/own_job.py                    on packaged photographs and a file that is cut short
python examples/own_job.py photos/ colours/   then `air status colours/` and `air verify colours/`
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipeline.config import Config, RunnerConfig
from pipeline.formats import images, tables
from pipeline.inputs.packaged import collect_pictures
from pipeline.inputs.shards import list_images, read_listing
from pipeline.inputs.sources import ItemReader
from pipeline.storage.open import open_storage
from pipeline.work.manifest import read_manifests, read_quarantine
from pipeline.work.plan import Plan, Unit, settle_plan
from pipeline.work.process import EncodedImage, Sample
from pipeline.work.runner import run

SCHEMA = pa.schema([("key", pa.string()), ("red", pa.float64()), ("green", pa.float64()), ("blue", pa.float64())])


class ColourConfig(Config):
    """All that the rows depend on, beside the images. It is part of the plan."""

    max_pixels: int = Field(images.MAX_PIXELS, ge=1, description="larger images are refused")


@dataclass(frozen=True)
class ColourJob:
    """One row per image. A job pickles: it travels to the workers."""

    config: ColourConfig
    read: Callable[[Unit], Iterator[Sample]]
    name: ClassVar[str] = "colour"

    def prepare(self, say: Callable[[str], None]) -> None:
        """Loads models and compiles kernels, in jobs that have them."""

    def samples(self, unit: Unit, scratch: Path) -> Iterator[Sample]:
        """The images of a unit."""
        return self.read(unit)

    def process(self, image: EncodedImage) -> dict[str, Any]:
        """The row of an image. `images.decode` raises Rejected for one that cannot be used: it goes to quarantine."""
        rgb = images.decode(image.data, max_pixels=self.config.max_pixels)
        return {"key": image.key, **dict(zip(("red", "green", "blue"), rgb.mean(axis=(0, 1)).tolist(), strict=True))}

    def writer(self, unit: Unit, scratch: Path, metadata: Mapping[str, str]) -> "ColourWriter":
        """A writer of one Parquet file for the unit."""
        return ColourWriter(tables.RowWriter(scratch / f"{unit.name}.parquet", SCHEMA, metadata))


@dataclass(frozen=True)
class ColourWriter:
    """Writes the rows of one unit. What `add` returns is summed in the unit's manifest."""

    rows: tables.RowWriter

    def add(self, result: dict[str, Any]) -> Mapping[str, float]:
        """Takes a row."""
        self.rows.add([result])
        return {"images": 1}

    def finish(self) -> list[tuple[Path, int]]:
        """Closes the file."""
        return [self.rows.finish()]


def mean_colours(pictures: str, out: str) -> None:
    """Plans and runs the job, then prints what is committed."""
    config, output = ColourConfig(), open_storage(out)
    units, listings = list_images([pictures], max_count=64, max_bytes=256_000_000, image_column=None)
    plan = settle_plan(output, Plan.make("colour", config, units, [pictures]), listings)
    job = ColourJob(config, partial(read_listing, output, ItemReader([pictures], None)))
    # executor="ray" runs the same job on Ray. Move its class to a module first: a process that isolates an image which
    # killed its worker loads the class by name.
    tally = run(job, plan, output, RunnerConfig(executor="inline"))
    for manifest in read_manifests(output):
        for row in pq.read_table(f"{out}/{manifest.files[0].path}").to_pylist():
            print(f"{row['key']:<32} red {row['red']:5.1f}  green {row['green']:5.1f}  blue {row['blue']:5.1f}")
    for row in read_quarantine(output):
        print(f"{row['key']:<32} in quarantine: {row['reason']}")
    print(f"{int(tally.summary['images'])} rows in {tally.units_done} unit(s)")


def main() -> None:
    """Runs the job on the given folder, or on pictures of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="?", help="folder; default: packaged photographs")
    parser.add_argument("out", nargs="?", default="colours", help="output folder (default: colours)")
    given = parser.parse_args()
    if given.pictures:
        mean_colours(given.pictures, given.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        collect_pictures(pictures, 4)
        (pictures / "cut.jpg").write_bytes((pictures / "china.jpg").read_bytes()[:50_000])
        mean_colours(str(pictures), f"{folder}/colours")


if __name__ == "__main__":
    main()
