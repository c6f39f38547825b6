"""Short-horizon optimisation of raw Gaussians against an image (method.md section 5).

`optimize` is the inner loop of predict-optimise-distill and the refinement after a prediction: a fixed number of Adam
steps on 0.7 L1 + 0.3 (1 - SSIM), with earlier stages frozen in a canvas. `optimize_batch` does it for several images
at once, which is what fills a GPU. On a CPU and on CUDA the whole step runs in compiled kernels; the same loop in
plain torch is its definition (`air.optimization.reference`).

This module knows nothing of files, stages or networks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from air.compute.backends import backend_for, has_cpu_kernels, require_cuda_kernels
from air.errors import NonFiniteLossError
from air.gaussians import activate
from air.optimization.config import OptimizeConfig
from air.optimization.problem import OptimizeResult, Problem, Recorder, StepCallback
from air.optimization.reference import optimize_reference
from air.rendering.render import render


def optimize(
    raw: Tensor,
    anchor: Tensor,
    target: Tensor,
    patch_size: int,
    config: OptimizeConfig,
    *,
    canvas: Tensor | None = None,
    free: Tensor | None = None,
    backend: str = "auto",
    threads: int = 1,
    on_step: StepCallback | None = None,
) -> OptimizeResult:
    """Adam on the raw numbers of the free Gaussians, against 0.7 L1 + 0.3 (1 - SSIM) of their render plus a canvas.

    Args:
        raw: Where to start, shape (N, 8); not changed.
        anchor: Anchors in pixels, shape (N, 2).
        target: The image to approximate, shape (3, height, width), values in [0, 1].
        patch_size: The activations' range in pixels (method.md section 2).
        config: Steps, rates and schedule.
        canvas: What is already drawn and stays, shape (3, height, width); black if not given.
        free: Which Gaussians may change, boolean, shape (N,); all if not given. The others are drawn once.
        backend: "cpu" (compiled, float32), "cuda" (compiled, float32, needs triton), "reference" (plain torch), or
            "auto": for float32 the compiled one of the tensors' device, else "reference".
        threads: The most threads that "cpu" uses; its results do not depend on it.
        on_step: Called for every entry of the trajectory, in order; with "cuda" some steps at a time, waiting for them.

    Raises:
        InvalidGaussiansError: `raw` and `anchor` do not fit each other or are not finite.
        ValueError: An image, mask or option does not fit.
        NonFiniteLossError: The loss stopped being a number; the message names the step.
        BackendUnavailableError: The backend asked for cannot be loaded here.
    """
    backend = backend_for(raw, backend)
    _check_arguments(raw, anchor, target, patch_size, canvas, free, backend, threads)
    start = activate(raw.detach(), anchor, patch_size)
    start.validate()
    raw = raw.detach().clone()
    anchor = anchor.to(raw)
    _, height, width = target.shape
    background = torch.zeros_like(target) if canvas is None else canvas.detach().to(target)
    chosen = slice(None)
    if free is not None:
        chosen = free.nonzero()[:, 0]
        frozen = activate(raw[~free], anchor[~free], patch_size)
        background = background + render(frozen, height, width, backend=backend, threads=threads)
    recorder = Recorder(on_step)
    run = {"reference": optimize_reference, "cpu": _optimize_cpu, "cuda": _optimize_cuda}[backend]
    raw[chosen] = run(raw[chosen], anchor[chosen], target, patch_size, config, background, threads, recorder)
    return OptimizeResult(raw, recorder.trajectory())


def _check_arguments(
    raw: Tensor,
    anchor: Tensor,
    target: Tensor,
    patch_size: int,
    canvas: Tensor | None,
    free: Tensor | None,
    backend: str,
    threads: int,
) -> None:
    if target.ndim != 3 or target.shape[0] != 3 or 0 in target.shape:
        raise ValueError(f"the target must have shape (3, height, width), got {tuple(target.shape)}")
    if target.dtype != raw.dtype or target.device != raw.device:
        raise ValueError(
            f"raw and target must be of one dtype and device, got {raw.dtype} on {raw.device} and {target.dtype} on "
            f"{target.device}"
        )
    if canvas is not None and canvas.shape != target.shape:
        raise ValueError(f"the canvas must be shaped as the target {tuple(target.shape)}, got {tuple(canvas.shape)}")
    if free is not None and (free.shape != raw.shape[:1] or free.dtype != torch.bool):
        raise ValueError(f"free must be boolean of shape {tuple(raw.shape[:1])}, got {free.dtype} {tuple(free.shape)}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if backend == "cpu" and not has_cpu_kernels(raw):
        raise ValueError(f"the cpu backend optimises float32 on the CPU, got {raw.dtype} on {raw.device}")


def _optimize_cpu(
    raw: Tensor,
    anchor: Tensor,
    target: Tensor,
    patch_size: int,
    config: OptimizeConfig,
    background: Tensor,
    threads: int,
    recorder: Recorder,
) -> Tensor:
    from air.compute.threads import Workers
    from air.optimization.cpu import FusedOptimizer

    with Workers(threads) as workers:
        state = FusedOptimizer(raw.numpy(), anchor.numpy(), target.numpy(), patch_size, background.numpy(), workers)
        for step in range(config.steps + 1):
            values = state.evaluate()
            recorder.add(values.loss, values.squared_error)
            if step < config.steps:
                state.update(
                    config.learning_rates(step), config.beta1, config.beta2, config.eps, config.opposed_fraction
                )
        return torch.from_numpy(state.raw_rows())


def _optimize_cuda(
    raw: Tensor,
    anchor: Tensor,
    target: Tensor,
    patch_size: int,
    config: OptimizeConfig,
    background: Tensor,
    threads: int,
    recorder: Recorder,
) -> Tensor:
    """A batch of one. `threads` is of no use here."""
    return _run_batch([Problem(raw, anchor, target, background)], patch_size, config, [recorder])[0]


def _run_batch(
    problems: Sequence[Problem], patch_size: int, config: OptimizeConfig, recorders: Sequence[Recorder]
) -> list[Tensor]:
    """The optimised raw Gaussians of problems whose tensors were checked, by the cuda backend."""
    require_cuda_kernels(problems[0].raw)
    from air.optimization.cuda import BatchOptimizer

    state = BatchOptimizer(problems, patch_size, config)

    def record(first: int, last: int) -> None:
        losses, squared_errors = state.trajectories(first, last)
        for image, recorder in enumerate(recorders):
            with _named(image):
                for loss, squared_error in zip(losses[:, image], squared_errors[:, image], strict=True):
                    recorder.add(float(loss), float(squared_error))

    if any(recorder.on_step for recorder in recorders):
        state.run(record)
    else:  # nothing waits for the device before the end
        state.run()
        record(0, config.steps + 1)
    return [raw.clone() for raw in state.raw]


def optimize_batch(
    problems: Sequence[Problem | tuple[Tensor, Tensor, Tensor, Tensor | None]],
    patch_size: int,
    config: OptimizeConfig,
    *,
    backend: str = "auto",
    threads: int = 1,
) -> list[OptimizeResult]:
    """What `optimize` gives for each of several images (raw, anchor, target, canvas), in order.

    Sizes and numbers of Gaussians may differ; dtype and device may not. With "cuda" all images take each step together,
    in the same launches; otherwise they are optimised one after another.

    Raises:
        As `optimize`. The `image` of a NonFiniteLossError says which of the problems it was; other messages do not.
    """
    batch = [Problem(*problem) for problem in problems]
    if not batch:
        return []
    backend = backend_for(batch[0].raw, backend)
    if backend != "cuda":
        results = []
        for image, (raw, anchor, target, canvas) in enumerate(batch):
            with _named(image):
                results.append(
                    optimize(raw, anchor, target, patch_size, config, canvas=canvas, backend=backend, threads=threads)
                )
        return results
    ready = []
    for raw, anchor, target, canvas in batch:
        _check_arguments(raw, anchor, target, patch_size, canvas, None, backend, threads)
        if raw.device != batch[0].raw.device:
            raise ValueError(f"a batch must be on one device, got {batch[0].raw.device} and {raw.device}")
        activate(raw.detach(), anchor, patch_size).validate()
        ready.append(Problem(raw.detach(), anchor.to(raw), target, None if canvas is None else canvas.detach()))
    recorders = [Recorder(None) for _ in ready]
    optimized = _run_batch(ready, patch_size, config, recorders)
    return [OptimizeResult(raw, recorder.trajectory()) for raw, recorder in zip(optimized, recorders, strict=True)]


@contextmanager
def _named(image: int) -> Iterator[None]:
    """A loss that stops being a number within is that of this image of a batch."""
    try:
        yield
    except NonFiniteLossError as error:
        error.image = image
        raise
