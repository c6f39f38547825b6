"""Throughput of `air encode`, what its time goes into, and what two Ray workers make of two cores.

    python benchmarks/encode.py [IMAGES] [--shards 32] [--images 4] [--repeat 2] [--predictor grow] [--stored-steps 60]

Without IMAGES (a folder) the pictures are those of `air demo` at 480 x 320, several renditions of each, so that nothing
is downloaded. First one inline process encodes some of the shards, with a clock around each part. Then two inline
processes share all shards, and one Ray job gets them with two workers, in turns. Rates are from the first sample to
the last commit: start-up is a fixed cost. Efficiency is the Ray job's rate over that of the two processes. Ray runs its
workers at niceness 15, so that other work on the machine would slow them only; here they get the niceness of the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from executors import make_images, timed

from air.encoding import encode as encoder
from air.encoding import refine, search
from air.warmup import warm_up
from jobs.encode import encode
from jobs.shard import shard
from pipeline.bulk import encode as encoding
from pipeline.bulk.encode import EncodeConfig
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.storage.open import open_storage
from pipeline.work.manifest import read_manifests

# What is timed, where it is looked up, and what it is called. A part's time is without that of parts within it.
_PARTS = (
    (encoding.images, "decode", "decode the image"),
    (encoder, "fit_grown", "grow"),
    (encoder, "fit_predicted", "predict and optimise"),
    (refine.Refiner, "run", "refine as stored"),
    (search, "write_stages", "entropy coding"),
    (encoding, "measure", "decode and measure the file"),
    (encoding.EncodeWriter, "add", "write"),
    (encoding.EncodeWriter, "finish", "write"),
)
_INLINE = RunnerConfig(executor="inline")


class Clock:
    """Seconds by part, each without the parts that it calls."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._within: list[str] = []

    def watch(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, with its time counted."""

        def watched(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            self._within.append(name)
            try:
                return function(*args, **options)
            finally:
                self._within.pop()
                spent = time.perf_counter() - begin
                self.seconds[name] += spent
                if self._within:
                    self.seconds[self._within[-1]] -= spent

        return watched


def parts_of_one_process(shards: Path, output: Path, config: EncodeConfig) -> dict[str, Any]:
    """Rates of one inline process, and the share of each part in percent."""
    clock = Clock()
    warm_up("encode")
    for owner, attribute, name in _PARTS:
        setattr(owner, attribute, clock.watch(getattr(owner, attribute), name))
    encode([str(shards)], str(output), config, _INLINE)
    total = sum(manifest.seconds for manifest in read_manifests(open_storage(output)))
    shares = {name: round(100 * spent / total, 1) for name, spent in clock.seconds.items() if spent}
    return {**rates([output], total), "percent": {**shares, "other": round(100 - sum(shares.values()), 1)}}


def rates(outputs: list[Path], seconds: float) -> dict[str, float]:
    """Images and megapixels of outputs, per second, and what their files are on average."""
    done: Counter[str] = Counter()
    for output in outputs:
        for manifest in read_manifests(open_storage(output)):
            done.update(manifest.summary)
    return {
        "images": int(done["images"]),
        "seconds": round(seconds, 2),
        "images_per_s": round(done["images"] / seconds, 3),
        "megapixels_per_s": round(done["pixels"] / seconds / 1e6, 4),
        "bpp": round(8 * done["file_bytes"] / done["pixels"], 4),
        "psnr": round(done["psnr_sum"] / done["images"], 2),
    }


def deal_out(shards: Path, folders: list[Path]) -> None:
    """Links the shards' tars into the folders, one hand each."""
    tars = sorted((shards / "data").glob("*.tar"))
    for hand, folder in enumerate(folders):
        folder.mkdir()
        for tar in tars[hand :: len(folders)]:
            (folder / tar.name).symlink_to(tar)


def main() -> None:
    """Measures and prints a line of JSON per run, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="?", metavar="IMAGES", type=Path)
    parser.add_argument("--shards", type=int, default=32, help="without IMAGES")
    parser.add_argument("--images", type=int, default=4, help="in a shard")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--predictor", default="grow", help="as for air encode")
    parser.add_argument("--stored-steps", type=int, default=60)
    given = parser.parse_args()
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    options = ["--predictor", given.predictor, "--stored-steps", str(given.stored_steps)]

    def command(shards: Path, output: Path, *more: str) -> list[str]:
        return [sys.executable, "-m", "jobs.cli", "encode", str(shards), str(output), *options, *more]

    def report(executor: str, figures: dict[str, Any]) -> None:
        load = round(psutil.getloadavg()[0], 1)
        print(json.dumps({"executor": executor, **figures, "load_of_machine": load}), flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.pictures is None:
            make_images(folder, given.shards * given.images)
        shard([str(given.pictures or folder / "in")], str(folder / "all"), ShardConfig(max_count=given.images), _INLINE)
        halves = [folder / "half0", folder / "half1"]
        deal_out(folder / "all", halves)
        deal_out(folder / "all", [folder / f"eighth{hand}" for hand in range(8)])
        config = EncodeConfig(predictor=given.predictor, stored_steps=given.stored_steps)
        report("inline, 1 process", parts_of_one_process(folder / "eighth0", folder / "one", config))
        ratios = []
        for turn in range(given.repeat):
            rate = {}
            for executor in ("inline", "ray") if turn % 2 == 0 else ("ray", "inline"):
                if executor == "inline":
                    outputs = [folder / f"inline{turn}-{half}" for half in range(2)]
                    lines = [command(*pair, "--executor=inline") for pair in zip(halves, outputs, strict=True)]
                else:
                    outputs = [folder / f"ray{turn}"]
                    lines = [command(folder / "all", outputs[0], "--executor=ray", "--workers=2")]
                figures = rates(outputs, timed(lines, outputs)[1])
                rate[executor] = figures["images_per_s"]
                report("inline, 2 processes" if executor == "inline" else "ray, 2 workers", figures)
            ratios.append(rate["ray"] / rate["inline"])
        print(json.dumps({"ray_over_inline": [round(ratio, 3) for ratio in ratios]}))


if __name__ == "__main__":
    main()
