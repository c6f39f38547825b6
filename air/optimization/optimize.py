"""Short-horizon optimisation of raw Gaussians against an image (method.md section 5).

`optimize` is the inner loop of predict-optimise-distill and the refinement after a prediction: a fixed number of Adam
steps on 0.7 L1 + 0.3 (1 - SSIM), with earlier stages frozen in a canvas. `optimize_batch` optimises several images at
once, to fill a GPU. On a CPU and on CUDA the whole step runs in compiled kernels (`cpu`, `cuda`). The same loop in
plain torch is its definition (`reference`).

This module knows nothing of files, stages or networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from air.compute.backends import backend_for, has_cpu_kernels, require_cuda_kernels
from air.gaussians import activate, check_raw
from air.optimization.config import OptimizeConfig
from air.optimization.problem import Moments, OptimizeResult, Problem, Recorder, Reuse, StepCallback, naming_image
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
    moments: Moments | None = None,
    backend: str = "auto",
    threads: int = 1,
    on_step: StepCallback | None = None,
    measure_end: bool = True,
    reuse: Reuse | None = None,
) -> OptimizeResult:
    """Optimises the raw numbers of the free Gaussians with Adam.

    The loss is 0.7 L1 + 0.3 (1 - SSIM) of canvas plus render against the target.

    Args:
        raw: The start, shape (N, 8); not changed.
        anchor: Anchors in pixels, shape (N, 2).
        target: The image to approximate, shape (3, height, width), values in [0, 1].
        patch_size: The activations' range in pixels (method.md section 2).
        config: Steps, rates and schedule.
        canvas: The fixed part of the picture, shape (3, height, width); black if not given.
        free: Gaussians that may change, boolean, shape (N,); all if not given. The others are drawn once.
        moments: Adam's moments of the free Gaussians, from an earlier optimisation; if not given, those of Gaussians
            that had no update.
        backend: "cpu" (compiled, float32), "cuda" (compiled, float32, needs triton), "reference" (plain torch), or
            "auto": for float32 the compiled one of the tensors' device, else "reference".
        threads: CPU threads at most, for "cpu"; the result does not depend on it.
        on_step: Called for every entry of the trajectory, in order. With "cuda", the entries of several steps come
            together, and each time the device is waited for.
        measure_end: Whether the trajectory has the entry after the last update. A caller that adds Gaussians and
            goes on measures soon again, and saves the time.
        reuse: Given to all optimisations of one target, it saves what each would make anew. The result is the same.

    Raises:
        InvalidGaussiansError: `raw` and `anchor` do not fit each other or are not finite.
        ValueError: An image, mask or option does not fit.
        NonFiniteLossError: The loss became NaN or infinite; the message names the step.
        BackendUnavailableError: The backend asked for cannot be loaded here.

    Example:
        >>> import torch
        >>> from air.gaussians import anchors
        >>> image = torch.full((3, 8, 8), 0.5)
        >>> result = optimize(torch.zeros(4, 8), anchors(8, 8, 4), image, 4, OptimizeConfig(steps=20))
        >>> result.raw.shape
        torch.Size([4, 8])
        >>> bool(result.trajectory.loss[-1] < result.trajectory.loss[0])
        True
    """
    backend = backend_for(raw, backend)
    _check_arguments(raw, anchor, target, patch_size, canvas, free, backend, threads)
    if reuse is not None:
        if reuse.target is not None and reuse.target is not target:
            raise ValueError("reuse is that of optimisations of another target; make a new one for this target")
        reuse.target = target
    check_raw(raw, anchor, patch_size)
    raw = raw.detach().clone()
    anchor = anchor.to(raw)
    _, height, width = target.shape
    background = None if canvas is None else canvas.detach().to(target)
    chosen = slice(None)
    if free is not None:
        chosen = free.nonzero()[:, 0]
        frozen = activate(raw[~free], anchor[~free], patch_size)
        drawn = render(frozen, height, width, backend=backend, threads=threads)
        background = drawn if background is None else background + drawn
    recorder = Recorder(on_step, None if measure_end else config.steps)
    run = _backend_loop(backend, raw, reuse)
    moments = Moments.fresh(raw[chosen]) if moments is None else moments.checked(raw[chosen])
    raw[chosen], moments = run(
        raw[chosen], anchor[chosen], target, patch_size, config, background, moments, threads, recorder
    )
    return OptimizeResult(raw, recorder.trajectory(), moments)


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


def _backend_loop(backend: str, raw: Tensor, reuse: Reuse | None) -> Callable[..., tuple[Tensor, Moments]]:
    """The optimiser's loop in a backend. Compiled ones load on first use.

    Raises:
        BackendUnavailableError: triton does not load here.
        ValueError: The cuda backend does not take tensors like `raw`.
    """
    match backend:
        case "cpu":
            from air.optimization.cpu import optimize_cpu

            return partial(optimize_cpu, reuse=reuse)
        case "cuda":
            require_cuda_kernels(raw)
            from air.optimization.cuda import optimize_cuda

            return optimize_cuda
        case _:
            return optimize_reference


def optimize_batch(
    problems: Sequence[Problem],
    patch_size: int,
    config: OptimizeConfig,
    *,
    backend: str = "auto",
    threads: int = 1,
) -> list[OptimizeResult]:
    """The results of `optimize` for several images, in order.

    Sizes and numbers of Gaussians may differ; dtype and device must be the same. With "cuda" all images take each step
    together, in the same launches. Otherwise they are optimised one after another.

    Raises:
        As `optimize`. A NonFiniteLossError gives the index of the problem in `image`; other errors do not name it.
    """
    batch = list(problems)
    if not batch:
        return []
    backend = backend_for(batch[0].raw, backend)
    if backend != "cuda":
        results = []
        for image, (raw, anchor, target, canvas, moments) in enumerate(batch):
            with naming_image(image):
                results.append(
                    optimize(
                        raw,
                        anchor,
                        target,
                        patch_size,
                        config,
                        canvas=canvas,
                        moments=moments,
                        backend=backend,
                        threads=threads,
                    )
                )
        return results
    ready = []
    for raw, anchor, target, canvas, moments in batch:
        _check_arguments(raw, anchor, target, patch_size, canvas, None, backend, threads)
        if raw.device != batch[0].raw.device:
            raise ValueError(f"a batch must be on one device, got {batch[0].raw.device} and {raw.device}")
        check_raw(raw, anchor, patch_size)
        background = None if canvas is None else canvas.detach()
        kept = None if moments is None else moments.checked(raw)
        ready.append(Problem(raw.detach(), anchor.to(raw), target, background, kept))
    require_cuda_kernels(ready[0].raw)
    from air.optimization.cuda import optimize_batch_cuda

    recorders = [Recorder(None) for _ in ready]
    optimized = optimize_batch_cuda(ready, patch_size, config, recorders)
    return [
        OptimizeResult(raw, recorder.trajectory(), moments)
        for (raw, moments), recorder in zip(optimized, recorders, strict=True)
    ]
