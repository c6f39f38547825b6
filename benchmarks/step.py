"""Speed of one optimisation step, the share of each part, and how near it comes to a counted floor.

    python benchmarks/step.py [--sizes 8k 30k 100k] [--threads 1 2] [--no-torch] [--prototype DIR] [--json FILE]

A step is: activate the raw numbers, draw, loss and its gradient, gather the gradient of the Gaussians, update. For each
size and number of threads these take turns in one run, so that other work on the machine meets all alike:

- *cpu*: `air.optimization.cpu.FusedOptimizer`, what `air.optimization.optimize` runs.
- *learned*: the same with a learned rule's update in place of Adam's, and the squared error's gradient.
- *torch*: the same step in plain torch: Gaussians in patches sorted by size, autograd, SSIM by separable
  convolutions, torch's fused Adam.
- *prototype*: an earlier one, the modules raster_numba, ssim_l1_numba and common in DIR, put together as its own
  fullstep.py does: kernels draw, gather and take the loss; torch activates and does the rest, under "update" here.
- *cuda*: `air.optimization.cuda.BatchOptimizer`, a batch of one; only where there is a GPU.

Times are the best of many steps, since other work on a machine can only make a step slower. With one thread they are
CPU time, which does not count waiting for a core; with more they are wall time. Every other step runs with clocks
around its parts. The time of a step is that of the fastest without clocks; parts, their shares and "other" are
those of the fastest with clocks, which they add up to. Clocks run in the calling thread, which takes part in all
work: "other" is the Python between the parts, and waiting for the other threads at the end of an update.

The floor is the least that the method's arithmetic and memory traffic would take at the speeds that this machine
reaches in the same run. `floor.py` counts and explains it: per pixel inside the support of a Gaussian 5 operations to
draw and 12 to gather, two exponentials per column of it and pass; per pixel and channel 175 operations for the loss; 24
bytes per raw number for Adam. The share reached says how much of a measured time is work that the method cannot avoid.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numba
import torch
from backends import PARTS, Backend, Clock, FusedStep, LearnedStep, PrototypeStep, TorchStep
from floor import Speedometer, count_needs
from workload import SIZES, Size, count_support

from air.compute.backends import triton_is_installed
from air.compute.compile import LANES
from air.compute.threads import Workers
from air.warmup import warm_up

SLICE_SECONDS = 0.2
"""How long a backend runs before it is the next one's turn."""


@dataclass
class Timing:
    """Milliseconds of a backend's step, best of many.

    Attributes:
        step: The fastest without clocks.
        clocked_step: The fastest with clocks.
        parts: Of that step; empty where parts cannot be told apart.
        steps: How many were timed.
    """

    step: float = math.inf
    clocked_step: float = math.inf
    parts: dict[str, float] = field(default_factory=dict)
    steps: int = 0

    def add_steps(self, backend: Backend, timer: Callable[[], float]) -> None:
        """Times two more steps, one of them with clocks."""
        start = timer()
        backend.step(None)
        middle = timer()
        clock = Clock(timer)
        backend.step(clock)
        end = timer()
        self.step = min(self.step, (middle - start) * 1e3)
        self.steps += 2
        if (end - middle) * 1e3 < self.clocked_step:
            self.clocked_step = (end - middle) * 1e3
            self.parts = {part: clock.seconds[part] * 1e3 for part in PARTS if part in clock.seconds}


def take_turns(
    backends: dict[str, Backend], speedometer: Speedometer, seconds: float, timer: Callable[[], float]
) -> dict[str, Timing]:
    """Times backends and the machine's speeds in turns; each backend has its seconds, and two steps at least."""
    timings = {name: Timing() for name in backends}
    left = dict.fromkeys(backends, seconds)
    for backend in backends.values():
        backend.step(None)  # compiles, allocates
    while any(left[name] > 0 or not timings[name].steps for name in backends):
        speedometer.sample()
        for name, backend in backends.items():
            begin = time.perf_counter()
            while not timings[name].steps or (left[name] > 0 and time.perf_counter() < begin + SLICE_SECONDS):
                timings[name].add_steps(backend, timer)
            left[name] -= time.perf_counter() - begin
    return timings


@dataclass
class Case:
    """What was measured for one size and number of threads.

    Attributes:
        speeds: What the machine reached: operations a second and bytes a second.
        floor: Counted milliseconds of each part.
        timings: Of each backend.
    """

    size: Size
    threads: int
    speeds: dict[str, float]
    floor: dict[str, float]
    timings: dict[str, Timing]


def measure_case(size: Size, threads: int, use_torch: bool, prototype: Path | None, seconds: float) -> Case:
    with Workers(threads) as workers:
        backends: dict[str, Backend] = {"cpu": FusedStep(size, workers), "learned": LearnedStep(size, workers)}
        if prototype is not None:
            backends["prototype"] = PrototypeStep(prototype, size, threads)
        if use_torch:
            backends["torch"] = TorchStep(size)
        # Last, since numba's own threads, which the prototype starts, change the number for all of OpenMP.
        torch.set_num_threads(threads)
        speedometer = Speedometer(workers, size)
        timer = time.thread_time if threads == 1 else time.perf_counter
        timings = take_turns(backends, speedometer, seconds, timer)
        speeds = speedometer.speeds()
    floor = {part: speeds.seconds(need) * 1e3 for part, need in count_needs(size, count_support(size)).items()}
    return Case(size, threads, asdict(speeds), floor, timings)


def add_cuda(cases: list[Case]) -> None:
    """Measures the cuda backend for each size and puts it into the size's first case."""
    import gpu

    speeds = gpu.measure_speeds()
    for case in {case.size: case for case in reversed(cases)}.values():
        row = gpu.measure(1, case.size, 1000, speeds)
        print(
            f"cuda, {case.size}: {row.steps_per_second:,.0f} steps/s, floor {row.floor_microseconds:.0f} µs, "
            f"{row.share_of_floor:.0%} of it reached"
        )
        case.timings["cuda"] = Timing(1e3 / row.steps_per_second, steps=1000)


def step_row(case: Case, name: str) -> str:
    """A backend's line of the table: the step, its parts with their share, the floor, the ratio to cpu."""
    timing = case.timings[name]
    parts = [timing.parts.get(part, math.nan) for part in PARTS]
    shares = [
        "-" if math.isnan(part) else f"{part:.2f} ({part / timing.clocked_step:.0%})"
        for part in (*parts, timing.clocked_step - sum(parts))
    ]
    floor = sum(case.floor.values())
    ratio = timing.step / case.timings["cpu"].step
    return row(
        f"{case.size.gaussians:,}",
        f"{case.size.width} x {case.size.height}",
        case.threads,
        name,
        f"{timing.step:.2f}",
        f"{1e3 / timing.step:.3g}",
        *shares,
        f"{floor:.2f}",
        f"{floor / timing.step:.1%}",
        f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}",
    )


def floor_row(case: Case) -> str:
    """The cpu backend's parts beside their floors, and the speeds that those come from."""
    timing = case.timings["cpu"]
    floors = [*(case.floor[part] for part in PARTS), sum(case.floor.values())]
    times = [*(timing.parts[part] for part in PARTS), timing.step]
    return row(
        f"{case.size.gaussians:,}",
        case.threads,
        *(f"{floor:.2f} of {time:.2f} ({floor / time:.0%})" for floor, time in zip(floors, times, strict=True)),
        *(f"{speed / 1e9:.0f}" for speed in case.speeds.values()),
    )


def row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def header(*cells: str) -> str:
    return row(*cells) + "\n" + row(*["---"] * len(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="which workloads (default: all)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="numbers of threads, one after another")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each backend, size and number of threads")
    parser.add_argument("--no-torch", action="store_true", help="skip the plain torch step")
    parser.add_argument("--prototype", type=Path, metavar="DIR", help="measure the prototype in DIR, if it is there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here, too")
    arguments = parser.parse_args()
    prototype = arguments.prototype
    if prototype is not None and not (prototype / "raster_numba.py").is_file():
        print(f"no prototype: {prototype} has no raster_numba.py")
        prototype = None
    warm_up("fit")
    machine = {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "lanes": LANES,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("milliseconds, best of many; shares of the step; floor, and floor over step; step over that of cpu\n")
    columns = ["Gaussians", "pixels", "threads", "backend", "step", "steps/s", *PARTS, "other"]
    print(header(*columns, "floor", "reached", "times cpu"))
    cases = []
    for size in arguments.sizes:
        for threads in arguments.threads:
            case = measure_case(SIZES[size], threads, not arguments.no_torch, prototype, arguments.seconds)
            print("\n".join(step_row(case, name) for name in case.timings), flush=True)
            cases.append(case)
    print("\nparts of the cpu backend: floor of measured (reached), milliseconds; speeds that this machine reached\n")
    print(header("Gaussians", "threads", *PARTS, "step", "Gop/s", "nearest cache, GB/s", "buffers, GB/s"))
    print("\n".join(floor_row(case) for case in cases) + "\n")
    if torch.cuda.is_available() and triton_is_installed():
        add_cuda(cases)
    else:
        print("no cuda rows: torch finds no GPU here, or triton is not installed")
    if arguments.json is not None:
        report = {"machine": machine, "cases": [asdict(case) for case in cases]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
