"""Peak memory of the driver and of each worker while many images go through `air shard` and `air distill`.

    python benchmarks/memory.py [--images 2000] [--height 427] [--width 640] [--steps 2] [--predictor grid]

Memory is the resident set of each process, sampled ten times a second: the driver is the command's own process, workers
are the processes of its Ray that run tasks. Ray's own services (GCS, raylet, agents) are listed apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

_INTERVAL_SECONDS = 0.1


def make_images(folder: Path, count: int, height: int, width: int) -> None:
    """Generated JPEGs: smooth colours with fine noise, so that no patch is trivial."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (height // 32 + 1, width // 32 + 1, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noise = random.integers(-12, 13, (height, width, 1), dtype=np.int16)
        Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{number:05d}.jpg", quality=92)


def peaks(command: list[str]) -> dict[str, object]:
    """Runs a command and watches it and all below it."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    watched = psutil.Process(process.pid)
    highest: dict[str, int] = defaultdict(int)
    while process.poll() is None:
        for child in [watched, *_children(watched)]:
            try:
                role, size = _role(child, process.pid), child.memory_info().rss
            except psutil.Error:
                continue
            highest[role] = max(highest[role], size)
        time.sleep(_INTERVAL_SECONDS)
    if process.returncode != 0:
        raise SystemExit(f"failed: {' '.join(command)}")
    peak_mb = {role: round(size / 1e6) for role, size in sorted(highest.items())}
    return {"seconds": round(time.perf_counter() - begin, 1), "peak_mb": peak_mb}


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _role(process: psutil.Process, driver: int) -> str:
    if process.pid == driver:
        return "driver"
    title = " ".join(process.cmdline())
    # A Ray worker carries its task's name while it runs one, and "IDLE" between tasks.
    return "worker" if "ray::_work" in title or "ray::IDLE" in title else "ray services"


def main() -> None:
    """Measures both jobs and prints a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--height", type=int, default=427)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--predictor", default="grid")
    given = parser.parse_args()
    air = [sys.executable, "-m", "jobs.cli"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder / "in", given.images, given.height, given.width)
        shard = [*air, "shard", str(folder / "in"), str(folder / "shards")]
        print(json.dumps({"job": "shard", "images": given.images, **peaks(shard)}), flush=True)
        options = {"steps": given.steps, "predictor": given.predictor}
        distill = [*air, "distill", str(folder / "shards"), str(folder / "targets")]
        distill += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        print(json.dumps({"job": "distill", "images": given.images, **options, **peaks(distill)}), flush=True)


if __name__ == "__main__":
    main()
