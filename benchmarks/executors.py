"""Throughput of the Ray executor beside inline processes that share the same images, in one run.

    python benchmarks/executors.py [--shards 40] [--images 4] [--processes 2] [--repeat 2]

The pictures are those of `air demo`, several renditions of each, so that nothing is downloaded. N inline processes
get the shards dealt out between them; then one Ray job gets them all with N workers. Both are timed from the first
sample to the last commit (work) and from start to exit (total): start-up is a fixed cost, the rate is for large jobs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.shard import shard
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.formats import images
from pipeline.inputs.packaged import collect_pictures
from pipeline.storage.open import open_storage
from pipeline.work.manifest import read_manifests

OPTIONS = [
    "--predictor",
    "grid",
    "--patch-size",
    "7",
    "--stages",
    "4",
    "--steps",
    "50",
    "--min-view-pixels",
    "150000",
    "--max-view-pixels",
    "150000",
]


def make_images(folder: Path, count: int) -> None:
    """`count` pictures of one size, flipped and turned from the demo's photographs, so that shards weigh alike."""
    originals = folder / "originals"
    collect_pictures(originals, 12)
    sources = [Image.open(path).convert("RGB").resize((480, 320)) for path in sorted(originals.iterdir())]
    (folder / "in").mkdir()
    turns = [None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180]
    for number in range(count):
        turn = turns[number // len(sources) % len(turns)]
        picture = sources[number % len(sources)]
        turned = picture if turn is None else picture.transpose(turn)
        (folder / "in" / f"{number:04d}.png").write_bytes(images.encode_png(np.asarray(turned)))


def command(shards: Path, output: Path, *options: str) -> list[str]:
    """An `air distill`."""
    return [sys.executable, "-m", "jobs.cli", "distill", str(shards), str(output), *OPTIONS, *options]


def timed(commands: list[list[str]], outputs: list[Path]) -> tuple[float, float]:
    """Runs commands side by side; (seconds in all, seconds of the busiest worker's share of work)."""
    begin = time.perf_counter()
    processes = [subprocess.Popen(line, stdout=subprocess.DEVNULL) for line in commands]
    for process in processes:
        if process.wait() != 0:
            raise SystemExit(f"failed: {' '.join(process.args)}")  # type: ignore[arg-type]
    total = time.perf_counter() - begin
    times = [
        (path.stat().st_mtime, manifest.seconds)
        for output in outputs
        for path, manifest in zip(
            sorted((output / "manifest").glob("*.json")), read_manifests(open_storage(output)), strict=True
        )
    ]
    first = min(end - seconds for end, seconds in times)
    return total, max(end for end, _ in times) - first


def main() -> None:
    """Measures and prints a line of JSON per run, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--images", type=int, default=4, help="per shard")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    given = parser.parse_args()
    count = given.shards * given.images
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder, count)
        runner = RunnerConfig(executor="inline")
        shard([str(folder / "in")], str(folder / "all"), ShardConfig(max_count=given.images), runner)
        tars = sorted((folder / "all" / "data").glob("*.tar"))
        parts = [folder / f"part{part}" for part in range(given.processes)]
        for part, place in enumerate(parts):
            place.mkdir()
            for tar in tars[part :: given.processes]:
                (place / tar.name).symlink_to(tar)
        ratios = []
        for round_number in range(given.repeat):
            seconds = {}
            for name in ("inline", "ray") if round_number % 2 == 0 else ("ray", "inline"):
                if name == "inline":
                    outputs = [folder / f"inline{round_number}-{part}" for part in range(given.processes)]
                    lines = [command(*pair, "--executor", "inline") for pair in zip(parts, outputs, strict=True)]
                else:
                    outputs = [folder / f"ray{round_number}"]
                    lines = [
                        command(folder / "all", outputs[0], "--executor", "ray", "--workers", str(given.processes))
                    ]
                total, work = timed(lines, outputs)
                seconds[name] = work
                figures = {"images": count, "work_s": round(work, 2), "total_s": round(total, 2)}
                print(json.dumps({"executor": name, **figures, "images_per_s": round(count / work, 3)}), flush=True)
            ratios.append(seconds["inline"] / seconds["ray"])
        print(json.dumps({"ray_over_inline": [round(ratio, 3) for ratio in ratios]}))


if __name__ == "__main__":
    main()
