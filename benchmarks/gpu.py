"""Checks and times the cuda backend: steps per second of single images and of batches, beside a counted floor.

    python benchmarks/gpu.py [--json FILE] [--steps 1000] [--skip-checks]

Needs a CUDA device and triton. First come the GPU tests. Then, with scales as in a fitted image, whole optimiser
steps for the sizes of step.py, and for batches of 1, 8 and 32 images of the smallest, with Adam and with a learned
rule. Last, what distilling does:
images of that size through four stages of 50 steps, one after another and in batches, in images per second.

The floor is what the arithmetic and the memory traffic below would take at the speeds that this GPU reaches in the same
run: float32 matrix products, and copies within its cache and within its memory. It is counted, not a model of waiting.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from workload import PATCH_SIZE, SIZES, Size, count_support, workload

from air.optimization.config import OptimizeConfig
from air.optimization.optimize import optimize_batch
from air.optimization.problem import Problem
from air.optimization.rule import LearnedRule
from air.predictor.base import GridPredictor
from air.stages.loop import run_stages, run_stages_batch

BATCHES = (1, 8, 32)
BATCH_SIZE = SIZES["8k"]
STAGES = [OptimizeConfig(steps=50)] * 4

# Arithmetic per pair of Gaussian and pixel: distance, sheared distance, exponent, exponential, cut, three products; and
# to gather, three sums, the product with the colour, five moments.
DRAW_FLOP, GATHER_FLOP = 14, 34
# Bytes per pair: one pixel of four floats, added to or read.
PAIR_BYTES = 16
# Per pixel and channel: 11 taps along and 11 across for three maps, twice; products and formulas.
LOSS_FLOP = 306
# Four maps read and three written, then six read and two written; a fourth channel travels along.
LOSS_BYTES = 15 * 4 * 4 / 3


@dataclass(frozen=True)
class Speeds:
    """What this GPU reaches: flop/s and bytes/s."""

    arithmetic: float
    cache: float
    memory: float


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        images: In the batch.
        gaussians, height, width: Of each image.
        steps_per_second: Of the whole batch with Adam, graphs replayed, set-up excluded.
        learned_steps_per_second: The same with a learned rule.
        learned_over_adam: Time of a step with the learned rule over that with Adam.
        image_steps_per_second: Times the number of images.
        fit_seconds: A whole call of `optimize_batch` with 50 steps, set-up and results included.
        floor_microseconds: Counted floor of one step.
        share_of_floor: Floor over measured time of a step.
    """

    images: int
    gaussians: int
    height: int
    width: int
    steps_per_second: float
    learned_steps_per_second: float
    learned_over_adam: float
    image_steps_per_second: float
    fit_seconds: float
    floor_microseconds: float
    share_of_floor: float


@dataclass(frozen=True)
class StageRow:
    """The stage loop with one size of batch.

    Attributes:
        images: In the batch.
        gaussians: Of all stages and images, mean per image.
        batch_images_per_second: `run_stages_batch`, results moved to the CPU.
        single_images_per_second: `run_stages` for one image after another, the same.
    """

    images: int
    gaussians: float
    batch_images_per_second: float
    single_images_per_second: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything here, too")
    parser.add_argument("--steps", type=int, default=1000, help="steps per timing (default 1000)")
    parser.add_argument("--skip-checks", action="store_true", help="do not run the GPU tests first")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device, and torch finds none here")
    try:
        import triton
    except ImportError as error:
        sys.exit(f"benchmarks/gpu.py needs triton, which does not load here: {error}")
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if not arguments.skip_checks:
        check()
    speeds = measure_speeds()
    print(
        f"reached here: {speeds.arithmetic / 1e12:.1f} Tflop/s float32, {speeds.cache / 1e12:.2f} TB/s in the cache, "
        f"{speeds.memory / 1e12:.2f} TB/s in memory\n"
    )
    cases = [(1, size) for size in SIZES.values()] + [(images, BATCH_SIZE) for images in BATCHES]
    rows = [measure(images, size, arguments.steps, speeds) for images, size in cases]
    print_table(rows)
    kernels = {name: top_kernels(1, BATCH_SIZE, config(40)) for name, config in RULES.items()}
    for rule, microseconds in kernels.items():
        print(f"\nmost time on the device with {rule}, one image of {BATCH_SIZE}, microseconds a step:")
        for name, value in microseconds.items():
            print(f"  {value:8.1f}  {name}")
    stages = [measure_stages(detailed_images(count, BATCH_SIZE, "cuda"), STAGES) for count in BATCHES]
    print_stages(stages)
    if arguments.json:
        report = {"machine": machine, "speeds": asdict(speeds), "rows": [asdict(row) for row in rows]}
        report["stages"] = [asdict(row) for row in stages]
        arguments.json.write_text(json.dumps({**report, "kernels": kernels}, indent=2) + "\n")


def check() -> None:
    """Runs the GPU tests; ends the benchmark if one fails."""
    folder = Path(__file__).parent.parent / "tests"
    names = ("air/test_cuda.py", "air/test_cuda_rule.py", "pipeline/bulk/test_distill_cuda.py")
    tests = [str(folder / name) for name in names]
    result = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-rs", *tests], check=False)
    if result.returncode:
        sys.exit("the GPU tests fail, so the times would mean nothing")


def seconds_of(function: Callable[[], object], repeats: int = 5) -> float:
    """Least seconds of a call, the device waited for."""
    function()
    best = math.inf
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def measure_speeds() -> Speeds:
    size = 4096
    matrix = torch.randn(size, size, device="cuda")
    arithmetic = 2 * size**3 / seconds_of(lambda: matrix @ matrix)

    def copy_speed(megabytes: int, copies: int) -> float:
        source = torch.zeros(megabytes << 18, device="cuda")
        target = torch.empty_like(source)

        def copy() -> None:
            for _ in range(copies):
                target.copy_(source)

        return copies * 8 * source.numel() / seconds_of(copy)

    return Speeds(arithmetic, cache=copy_speed(8, 200), memory=copy_speed(1024, 5))


def problems(images: int, size: Size) -> list[Problem]:
    raw, anchor, target = (part.cuda() for part in workload(size))
    return [Problem(raw, anchor, target) for _ in range(images)]


def floor_seconds(images: int, size: Size, speeds: Speeds) -> float:
    """The counted floor of one step."""
    pairs = images * count_support(size).pixels
    values = images * 3 * size.height * size.width
    # Pixels are used again and again by neighbours, so pairs meet them in the cache. The loss streams through eight
    # buffers, which neither a batch nor a larger image leaves in the cache.
    streams = speeds.cache if values <= 3 * BATCH_SIZE.height * BATCH_SIZE.width else speeds.memory
    draw = max(pairs * DRAW_FLOP / speeds.arithmetic, pairs * PAIR_BYTES / speeds.cache)
    gather = max(pairs * GATHER_FLOP / speeds.arithmetic, pairs * PAIR_BYTES / speeds.cache)
    loss = max(values * LOSS_FLOP / speeds.arithmetic, values * LOSS_BYTES / streams)
    return draw + gather + loss


def with_adam(steps: int) -> OptimizeConfig:
    return OptimizeConfig(steps=steps)


def with_learned_rule(steps: int) -> OptimizeConfig:
    """A new rule makes all steps: it fits as the cautious Adam does, and costs what a trained rule costs."""
    rule = LearnedRule()
    return OptimizeConfig(steps=steps, learned=rule, beta1=rule.beta1, beta2=rule.beta2)


RULES = {"Adam": with_adam, "a learned rule": with_learned_rule}


def measure(images: int, size: Size, steps: int, speeds: Speeds) -> Row:
    from air.optimization.cuda import BatchOptimizer

    batch = problems(images, size)
    adam, learned = (
        seconds_of(BatchOptimizer(batch, PATCH_SIZE, config(steps)).run, repeats=3) / steps for config in RULES.values()
    )
    whole = seconds_of(lambda: optimize_batch(batch, PATCH_SIZE, OptimizeConfig(steps=50)), repeats=3)
    floor = floor_seconds(images, size, speeds)
    return Row(
        images=images,
        gaussians=size.gaussians,
        height=size.height,
        width=size.width,
        steps_per_second=1 / adam,
        learned_steps_per_second=1 / learned,
        learned_over_adam=learned / adam,
        image_steps_per_second=images / adam,
        fit_seconds=whole,
        floor_microseconds=floor * 1e6,
        share_of_floor=floor / adam,
    )


def print_table(rows: list[Row]) -> None:
    columns = ["images", "Gaussians each", "pixels each", "steps/s", "with the learned rule", "image-steps/s"]
    columns += ["50 steps, whole call", "floor of a step", "of the floor"]
    print(f"| {' | '.join(columns)} |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print(
            f"| {row.images} | {row.gaussians:,} | {row.width} x {row.height} | {row.steps_per_second:,.0f} | "
            f"{row.learned_steps_per_second:,.0f} ({row.learned_over_adam:.2f} times Adam's step) | "
            f"{row.image_steps_per_second:,.0f} | {row.fit_seconds * 1e3:.1f} ms | {row.floor_microseconds:.0f} µs | "
            f"{row.share_of_floor:.0%} |"
        )


def top_kernels(images: int, size: Size, config: OptimizeConfig) -> dict[str, float]:
    """Microseconds per step of the five kernels that take the most time on the device."""
    from air.optimization.cuda import BatchOptimizer

    state = BatchOptimizer(problems(images, size), PATCH_SIZE, config)
    state.run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        state.run()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: event.self_device_time_total, reverse=True)
    return {event.key: event.self_device_time_total / config.steps for event in events[:5]}


def detailed_images(count: int, size: Size, device: str) -> list[Tensor]:
    """Noise in octaves, the finer the fainter, so that all stages have patches to add to, as with photographs."""
    images = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        image = torch.zeros(1, 3, size.height, size.width)
        for octave in range(7):
            shape = (size.height >> octave, size.width >> octave)
            noise = torch.randn(1, 3, max(2, shape[0]), max(2, shape[1]), generator=generator)
            image += 0.1 * 0.75 ** (6 - octave) * F.interpolate(noise, size=(size.height, size.width), mode="bicubic")
        images.append((0.5 + image[0]).clamp(0, 1).to(device))
    return images


def measure_stages(images: list[Tensor], optimization: list[OptimizeConfig]) -> StageRow:
    """The stage loop, once with all images together and once with each alone."""
    predictor = GridPredictor(PATCH_SIZE)

    def together() -> list[int]:
        results = run_stages_batch(images, predictor, optimization)
        return [len(stage.to("cpu")) for stages in results for stage in stages]

    def alone() -> None:
        for image in images:
            for stage in run_stages(image, predictor, optimization):
                stage.to("cpu")

    count = len(images)
    gaussians = sum(together()) / count
    return StageRow(count, gaussians, count / seconds_of(together, repeats=3), count / seconds_of(alone, repeats=3))


def print_stages(rows: list[StageRow]) -> None:
    steps = sum(config.steps for config in STAGES)
    print(
        f"\ndistilling {BATCH_SIZE.width} x {BATCH_SIZE.height} pixels in {len(STAGES)} stages, {steps} steps in all:"
    )
    print("| images together | Gaussians each | images/s | images/s, one by one | ratio |")
    print("|" + " --- |" * 5)
    for row in rows:
        batch, single = row.batch_images_per_second, row.single_images_per_second
        print(f"| {row.images} | {row.gaussians:,.0f} | {batch:.1f} | {single:.1f} | {batch / single:.2f} |")


if __name__ == "__main__":
    main()
