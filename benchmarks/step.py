"""Speed of one optimisation step: activate, render, loss and gradient, backward, Adam.

    python benchmarks/step.py [--threads 1 2] [--no-torch] [--prototype DIR]

Beside the fused CPU step stands the same step in plain torch: Gaussians in patches sorted by size, autograd, SSIM by
separable convolutions, torch's fused Adam. `--prototype DIR` also runs DIR/fullstep.py and shows what it prints.
Times are the best of many steps, since a shared machine can only make a step slower.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from air.gaussians import SUPPORT_CUTOFF, Gaussians, activate
from air.loss import loss as torch_loss
from air.optimize import OptimizeConfig, compile_kernels
from air.optimize_cpu import FusedOptimizer
from air.render.threads import Workers

HEIGHT, WIDTH, PATCH_SIZE = 512, 768, 7
PARTS = ("activate", "draw", "loss", "gather", "adam")


def workload(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Raw (N, 8), anchors in reading order, target; scales log-normal about 2.5 px, as in a fitted image."""
    generator = torch.Generator().manual_seed(0)
    anchor = torch.rand(count, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT]) - 0.5
    anchor = anchor[torch.argsort(torch.floor(anchor[:, 1] / 8) * 10_000 + anchor[:, 0])]
    scale = (2.5 * torch.exp(0.5 * torch.randn(count, 2, generator=generator))).clamp(0.55, 7.45)
    raw = torch.zeros(count, 8)
    raw[:, 2:4] = torch.logit((scale - 0.5) / PATCH_SIZE)
    raw[:, 4] = torch.randn(count, generator=generator)
    raw[:, 5:8] = torch.randn(count, 3, generator=generator) * 0.1
    coarse = torch.rand(1, 3, HEIGHT // 8, WIDTH // 8, generator=generator)
    target = torch.nn.functional.interpolate(coarse, size=(HEIGHT, WIDTH), mode="bicubic").clamp(0, 1)[0]
    return raw, anchor, target


def best_milliseconds(function: Callable[[], object], seconds: float = 2.0) -> float:
    function()
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def fused(count: int, threads: int) -> dict[str, float]:
    """Best milliseconds of each part and of whole steps."""
    raw, anchor, target = workload(count)
    config = OptimizeConfig(steps=10_000)
    with Workers(threads) as workers:
        state = FusedOptimizer(
            raw.numpy(), anchor.numpy(), target.numpy(), PATCH_SIZE, torch.zeros_like(target).numpy(), workers
        )
        state.evaluate()
        state.raw_gradient()
        parts = {
            "activate": best_milliseconds(lambda: workers.run(state._activate, state.raster.ranges), 0.3),
            "draw": best_milliseconds(lambda: state.raster.draw(state.image, state.background), 1),
            "loss": best_milliseconds(lambda: state.loss.evaluate(state.image), 1),
            "gather": best_milliseconds(lambda: state.raster.gather(state.loss.gradient), 1),
        }

        def step() -> None:
            state.evaluate()
            # No learning, so that every step has the same work.
            state.update(config.rates(0) * 0, config.beta1, config.beta2, config.eps)

        whole = best_milliseconds(step, 3)
    parts["adam"] = max(0.0, whole - sum(parts.values()))
    return {**parts, "step": whole}


def torch_render(gaussians: Gaussians) -> Tensor:
    """The image in plain torch: square patches of pixels, Gaussians of like size together, summed by index_add."""
    radius = (gaussians.scale.detach().amax(dim=1) * 3.33).ceil().long()
    image = torch.zeros(3, HEIGHT * WIDTH)
    for reach in radius.unique().tolist():
        chosen = (radius == reach).nonzero()[:, 0]
        part = gaussians[chosen]
        steps = torch.arange(-reach, reach + 1)
        columns = part.xy[:, 0].detach().round().long()[:, None, None] + steps[None, None, :]
        rows = part.xy[:, 1].detach().round().long()[:, None, None] + steps[None, :, None]
        dx, dy = columns - part.xy[:, 0, None, None], rows - part.xy[:, 1, None, None]
        a, b, c = (value[:, None, None] for value in part.conic().unbind(dim=1))
        weight = torch.exp(-0.5 * (a * dx * dx + 2 * b * dx * dy + c * dy * dy))
        inside = (columns >= 0) & (columns < WIDTH) & (rows >= 0) & (rows < HEIGHT)
        weight = torch.where((weight >= SUPPORT_CUTOFF) & inside, weight, 0)
        index = (rows.clamp(0, HEIGHT - 1) * WIDTH + columns.clamp(0, WIDTH - 1)).reshape(-1)
        values = part.colour.T[:, :, None, None] * weight
        image = image.index_add(1, index, values.reshape(3, -1))
    return image.reshape(3, HEIGHT, WIDTH)


def plain_torch(count: int, threads: int) -> float:
    """Best milliseconds of a step."""
    torch.set_num_threads(threads)
    raw, anchor, target = workload(count)
    raw.requires_grad_()
    adam = torch.optim.Adam([raw], lr=0.0, fused=True)

    def step() -> None:
        adam.zero_grad()
        torch_loss(torch_render(activate(raw, anchor, PATCH_SIZE)), target).backward()
        adam.step()

    return best_milliseconds(step, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gaussians", type=int, nargs="+", default=[8_140, 30_000])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--no-torch", action="store_true", help="skip the plain torch step")
    parser.add_argument("--prototype", type=Path, help="directory of another implementation's fullstep.py")
    arguments = parser.parse_args()
    compile_kernels()
    print(f"{WIDTH} x {HEIGHT} pixels; milliseconds, best of many")
    print(f"| Gaussians | threads | {' | '.join(PARTS)} | step | steps/s | plain torch step | ratio |")
    print("|" + " --- |" * (len(PARTS) + 6))
    for threads in arguments.threads:
        for count in arguments.gaussians:
            times = fused(count, threads)
            cells = [f"{times[part]:.2f}" for part in PARTS] + [f"{times['step']:.2f}", f"{1e3 / times['step']:.0f}"]
            if not arguments.no_torch:
                other = plain_torch(count, threads)
                cells += [f"{other:.0f}", f"{other / times['step']:.0f}"]
            print(f"| {count} | {threads} | {' | '.join(cells)} |", flush=True)
    if arguments.prototype is not None:
        print("prototype:")
        subprocess.run([sys.executable, "fullstep.py"], cwd=arguments.prototype, check=True)


if __name__ == "__main__":
    main()
