"""Short-horizon optimisation of raw Gaussians against an image (method.md section 5), and `fit`.

`optimize` is the inner loop of predict-optimise-distill and the refinement after a prediction: a fixed number of Adam
steps on 0.7 L1 + 0.3 (1 - SSIM), with earlier stages frozen in a canvas. `optimize_batch` does it for several images
at once, which is what fills a GPU. `fit` starts it from a plain grid. On a CPU and on CUDA the whole step runs in
compiled kernels; the same loop in plain torch is its definition.

    result = fit(image, steps=100)
    print(result.trajectory.psnr[-1], "dB")

This module knows nothing of files, stages or networks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from air.errors import BackendUnavailableError, NonFiniteLossError
from air.fitting.grid import grid_initialization
from air.gaussians import RAW_CHANNELS, Gaussians, activate, anchors
from air.loss.reference import loss as torch_loss
from air.metrics import psnr_of
from air.optimization.config import GROUPS, OptimizeConfig
from air.rendering.render import render, require_cuda_kernels, triton_is_installed

StepCallback = Callable[[int, float, float], None]
"""Called with (number of updates done, loss, PSNR in dB)."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What every step reached: entry k is the state after k updates, so there are steps + 1 entries.

    Attributes:
        loss: 0.7 L1 + 0.3 (1 - SSIM), float64.
        psnr: Peak signal-to-noise ratio in dB of the image clamped to [0, 1], float64.
    """

    loss: NDArray[np.float64]
    psnr: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class OptimizeResult:
    """The optimised raw Gaussians (N, 8), frozen ones unchanged, and the way there."""

    raw: Tensor
    trajectory: Trajectory

    def unless_worse(self, start: Tensor) -> OptimizeResult:
        """This, or where its loss ended above the first: the Gaussians it started from, (N, 8), with no way at all.

        Adam's first steps are of full size however good the start is, so a few of them can spoil a good prediction.
        """
        loss, psnr = self.trajectory.loss, self.trajectory.psnr
        return OptimizeResult(start, Trajectory(loss[:1], psnr[:1])) if loss[-1] > loss[0] else self


class Problem(NamedTuple):
    """One image of a batch; see `optimize` for the fields."""

    raw: Tensor
    anchor: Tensor
    target: Tensor
    canvas: Tensor | None = None


@dataclass(frozen=True, eq=False)
class FitResult:
    """One fitted image.

    Attributes:
        gaussians: What to render.
        raw: Their raw form (N, 8) at the anchors of the image's patches.
        trajectory: Loss and PSNR of every step.
        seconds: Wall time, compilation excluded.
        height, width: The image's size in pixels.
    """

    gaussians: Gaussians
    raw: Tensor
    trajectory: Trajectory
    seconds: float
    height: int
    width: int


@dataclass
class _Recorder:
    """Collects a trajectory and refuses a loss that is not a number."""

    on_step: StepCallback | None
    loss: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)

    def add(self, loss: float, squared_error: float) -> None:
        step = len(self.loss)
        if not np.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss is {loss} after {step} updates; "
                + ("check that image and canvas are finite" if step == 0 else "lower the learning rates")
            )
        self.loss.append(loss)
        self.psnr.append(psnr_of(squared_error))
        if self.on_step is not None:
            self.on_step(step, loss, self.psnr[-1])

    def trajectory(self) -> Trajectory:
        return Trajectory(np.array(self.loss), np.array(self.psnr))


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
    backend = _choose_backend(backend, raw)
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
    recorder = _Recorder(on_step)
    run = {"reference": _optimize_torch, "cpu": _optimize_cpu, "cuda": _optimize_cuda}[backend]
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
    if backend == "cpu" and (raw.dtype != torch.float32 or raw.device.type != "cpu"):
        raise ValueError(f"the cpu backend optimises float32 on the CPU, got {raw.dtype} on {raw.device}")


def _choose_backend(backend: str, raw: Tensor) -> str:
    """The backend that `optimize` uses for such tensors: "cpu", "cuda" or "reference"."""
    if backend not in ("auto", "cpu", "cuda", "reference"):
        raise ValueError(f"unknown backend {backend!r}; use auto, cpu, cuda or reference")
    if backend != "auto":
        return backend
    if raw.dtype != torch.float32:
        return "reference"
    if raw.device.type == "cuda":
        return "cuda" if triton_is_installed() else "reference"
    return "cpu" if raw.device.type == "cpu" else "reference"


def _optimize_torch(
    raw: Tensor,
    anchor: Tensor,
    target: Tensor,
    patch_size: int,
    config: OptimizeConfig,
    background: Tensor,
    threads: int,
    recorder: _Recorder,
) -> Tensor:
    """The definition: reference renderer, torch's autograd, torch's Adam. `threads` is torch's own business here."""
    _, height, width = target.shape
    groups = [raw[:, columns].clone().requires_grad_() for columns in GROUPS.values()]
    adam = torch.optim.Adam(
        [{"params": [group]} for group in groups], betas=(config.beta1, config.beta2), eps=config.eps
    )
    for step in range(config.steps + 1):
        gaussians = activate(torch.cat(groups, dim=1), anchor, patch_size)
        image = background + render(gaussians, height, width, backend="reference")
        loss = torch_loss(image, target)
        squared_error = (image.detach().clamp(0, 1) - target).square().mean()
        recorder.add(loss.item(), squared_error.item())
        if step == config.steps:
            break
        rates = config.rates(step)
        for options, columns in zip(adam.param_groups, GROUPS.values(), strict=True):
            options["lr"] = float(rates[columns][0])
        adam.zero_grad()
        loss.backward()
        before = [group.detach().clone() for group in groups]
        adam.step()
        for group, old in zip(groups, before, strict=True):
            assert group.grad is not None
            opposed = adam.state[group]["exp_avg"] * group.grad < 0
            kept = torch.where(opposed, config.opposed_share, 1.0)
            group.data.copy_(old + kept * (group.data - old))
    return torch.cat(groups, dim=1).detach()


def _optimize_cpu(
    raw: Tensor,
    anchor: Tensor,
    target: Tensor,
    patch_size: int,
    config: OptimizeConfig,
    background: Tensor,
    threads: int,
    recorder: _Recorder,
) -> Tensor:
    from air.compute.threads import Workers
    from air.optimization.cpu import FusedOptimizer

    with Workers(threads) as workers:
        state = FusedOptimizer(raw.numpy(), anchor.numpy(), target.numpy(), patch_size, background.numpy(), workers)
        for step in range(config.steps + 1):
            values = state.evaluate()
            recorder.add(values.loss, values.squared_error)
            if step < config.steps:
                state.update(config.rates(step), config.beta1, config.beta2, config.eps, config.opposed_share)
        return torch.from_numpy(state.raw_rows())


def _optimize_cuda(
    raw: Tensor,
    anchor: Tensor,
    target: Tensor,
    patch_size: int,
    config: OptimizeConfig,
    background: Tensor,
    threads: int,
    recorder: _Recorder,
) -> Tensor:
    """A batch of one. `threads` is of no use here."""
    return _run_batch([Problem(raw, anchor, target, background)], patch_size, config, [recorder])[0]


def _run_batch(
    problems: Sequence[Problem], patch_size: int, config: OptimizeConfig, recorders: Sequence[_Recorder]
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
    backend = _choose_backend(backend, batch[0].raw)
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
    recorders = [_Recorder(None) for _ in ready]
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


def choose_device(device: str, backend: str = "auto") -> torch.device:
    """The device that "auto", "cpu" or "cuda" (or "cuda:1") means for a backend.

    "auto" is CUDA where there is a GPU and triton is installed, unless the backend is one of the CPU.

    Raises:
        BackendUnavailableError: CUDA was asked for and there is none.
    """
    if device == "auto":
        has_cuda = torch.cuda.is_available() and triton_is_installed()
        return torch.device("cuda" if has_cuda and backend in ("auto", "cuda") else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError("torch finds no CUDA device here; use device='cpu' or 'auto'")
    return chosen


def fit(
    image: Any,
    steps: int = 100,
    patch_size: int = 4,
    *,
    config: OptimizeConfig | None = None,
    backend: str = "auto",
    device: str = "auto",
    threads: int = 1,
    on_step: StepCallback | None = None,
) -> FitResult:
    """Fits Gaussians to one image, starting from a plain grid: one Gaussian per patch.

    Args:
        image: uint8 array (height, width, 3), a PIL image, or a tensor (3, height, width) with values in [0, 1].
        steps: Adam updates; overrides that of `config`.
        patch_size: Pixels between anchors; the number of Gaussians is ceil(height/p) · ceil(width/p).
        config: Rates and schedule.
        backend: As for `optimize`.
        device: Where to compute: "cpu", "cuda", or "auto", which is "cuda" where there is a GPU and triton. An image
            tensor that is on a GPU stays there. The result is on the image's device, which for arrays is the CPU.
        threads: As for `optimize`.
        on_step: As for `optimize`.

    Raises:
        ValueError: The image is none of these, or an option does not fit.
        NonFiniteLossError: As for `optimize`.

    Example:
        >>> fit(torch.full((3, 8, 8), 0.5), steps=0).raw.shape
        torch.Size([4, 8])
    """
    check_counts(steps=(steps, 0), patch_size=(patch_size, 1), threads=(threads, 1))
    target, home = place_image(image, device, backend)
    config = replace(config or OptimizeConfig(), steps=steps)
    _, height, width = target.shape
    start = time.perf_counter()
    anchor = anchors(height, width, patch_size, target.dtype).to(target.device)
    raw = grid_initialization(target, patch_size)
    result = optimize(raw, anchor, target, patch_size, config, backend=backend, threads=threads, on_step=on_step)
    gaussians = activate(result.raw, anchor, patch_size).to(home)
    seconds = time.perf_counter() - start
    return FitResult(gaussians, result.raw.to(home), result.trajectory, seconds, height, width)


def check_counts(**counts: tuple[int, int]) -> None:
    """Raises ValueError for the first of the named (count, least) that is no whole number or below its least."""
    for name, (count, least) in counts.items():
        if not isinstance(count, int) or count < least:
            raise ValueError(f"{name} must be a whole number, at least {least}, got {count}")


def place_image(image: Any, device: str, backend: str) -> tuple[Tensor, torch.device]:
    """An image for `fit` as a tensor where it is to be computed, kernels ready; and the device of the result.

    Raises:
        ValueError: It is no image.
        BackendUnavailableError: As `choose_device`.
    """
    target = image_tensor(image)
    home = target.device
    if home.type == "cpu" and target.dtype == torch.float32:
        target = target.to(choose_device(device, backend))
    if _choose_backend(backend, target) == "cpu":
        compile_kernels()
    return target, home


def image_tensor(image: Any) -> Tensor:
    """An image as a tensor (3, height, width) with values in [0, 1], float32 unless it is a floating tensor already.

    Accepts a uint8 array (height, width, 3), a PIL image (converted to RGB), or such a tensor.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape or not image.is_floating_point():
            raise ValueError(f"an image tensor must be floating, (3, height, width), got {image.dtype} {image.shape}")
        image = image.detach()
        low, high = image.min().item(), image.max().item()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"an image tensor's values must be in [0, 1], got {low} to {high}")
        return image.contiguous()
    if hasattr(image, "convert"):
        image = np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        described = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"an image must be uint8 (height, width, 3), a PIL image or a tensor, got {described}")
    if 0 in image.shape:
        raise ValueError(f"an image must have pixels, got shape {image.shape}")
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(torch.float32) / 255


COMPILE_SECONDS = 15
"""About how long `compile_kernels` takes once per machine and version; from then on, under a second."""


def kernels_are_compiled() -> bool:
    """Whether the compiled kernels are in numba's cache on disk (or loaded), so that `compile_kernels` is quick."""
    from air.compute.simd import is_compiled

    return all(map(is_compiled, _all_kernels()))


def compile_kernels() -> None:
    """Compiles the kernels that optimise, run stages and predict, or loads them from numba's cache on disk.

    Each is used once. Another process of this machine that wants the same waits meanwhile.
    """
    from air.compute.simd import compiling
    from air.predictor.compact import trunk_cpu
    from air.stages import patches_cpu

    raw, anchor = torch.zeros(1, RAW_CHANNELS), torch.zeros(1, 2)
    target = torch.zeros(3, 1, 1)
    with compiling(_all_kernels()):
        _optimize_cpu(raw, anchor, target, 1, OptimizeConfig(steps=1), target, 1, _Recorder(None))
        patches_cpu.use_each()
        trunk_cpu.use_each()


def _all_kernels() -> tuple[Any, ...]:
    from air.optimization import cpu
    from air.predictor.compact import trunk_cpu
    from air.stages import patches_cpu

    return (*cpu.ALL_KERNELS, *patches_cpu.ALL_KERNELS, *trunk_cpu.ALL_KERNELS)
