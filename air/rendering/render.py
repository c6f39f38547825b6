"""Rendering: Gaussians -> image, differentiable, one file per backend.

    from air.render import render
    image = render(gaussians, height, width)

Backends: "reference" is the definition in dense torch, for any dtype and device; "cpu" is compiled for this machine's
vector registers, float32 only; "cuda" is compiled for GPUs by triton, float32 only. Compiled code, numba and triton are
loaded at a backend's first use, not by importing this module.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from air.errors import BackendUnavailableError
from air.gaussians import Gaussians

BACKENDS = ("auto", "reference", "cpu", "cuda")


def render(gaussians: Gaussians, height: int, width: int, *, backend: str = "auto", threads: int = 1) -> Tensor:
    """The plain sum of the Gaussians (method.md section 1), an unclamped image of shape (3, height, width).

    Differentiable once with respect to xy, scale, angle and colour; the cut at 1/255 has no gradient. Gaussians may
    be of any number (none give zeros), off the image, or larger than it.

    The "cpu" backend agrees with float64 to about 1e-5 of the largest colour where scales are 0.05 px or more and
    coordinates below 1e4 px. Thinner Gaussians are limited by float32 itself: a centre near x = 1000 px is known to
    6e-5 px only. Its result does not depend on `threads`, bit for bit.

    The "cuda" backend is as precise. It draws the same bits every time where no gradient is asked for; where one is, it
    adds in no fixed order (docs/cuda.md).

    Args:
        gaussians: What to draw.
        height: Rows, at least 1.
        width: Columns, at least 1.
        backend: "auto" takes "cpu" for float32 on the CPU, "cuda" for float32 on CUDA where triton is installed, else
            "reference".
        threads: The most threads that "cpu" uses.

    Raises:
        InvalidGaussiansError: A number is not finite or a scale is not positive.
        ValueError: The size, the number of threads or the backend is not one of those allowed.
        BackendUnavailableError: The compiled renderer cannot be loaded here.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image needs at least one row and column, got height {height}, width {width}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; use one of {', '.join(BACKENDS)}")
    gaussians.validate()
    if backend == "auto":
        backend = _backend_for(gaussians.xy)
    if backend == "reference":
        from air.rendering.reference import render_reference

        return render_reference(gaussians, height, width)
    if backend == "cuda":
        require_cuda_kernels(gaussians.xy)
        from air.rendering.cuda import render_cuda

        return render_cuda(gaussians, height, width)
    if gaussians.xy.device.type != "cpu" or gaussians.xy.dtype != torch.float32:
        raise ValueError(
            f"the cpu backend draws float32 on the CPU, got {gaussians.xy.dtype} on {gaussians.xy.device}; "
            f"convert with .to() or use backend='reference'"
        )
    try:
        from air.rendering.cpu import render_cpu
    except ImportError as error:
        raise BackendUnavailableError(f"the cpu backend needs numba, which does not load here: {error}") from error
    return render_cpu(gaussians, height, width, threads)


def _backend_for(tensor: Tensor) -> str:
    """What "auto" means for Gaussians of this tensor's dtype and device."""
    if tensor.dtype == torch.float32 and tensor.device.type == "cpu":
        return "cpu"
    if tensor.dtype == torch.float32 and tensor.device.type == "cuda" and triton_is_installed():
        return "cuda"
    return "reference"


def triton_is_installed() -> bool:
    """Whether triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


def require_cuda_kernels(tensor: Tensor) -> None:
    """Checks that the cuda backend can work on tensors of this dtype and device.

    Raises:
        BackendUnavailableError: triton does not load here.
        ValueError: The tensor is not float32, or not on CUDA (or, in triton's interpreter, not on the CPU).
    """
    try:
        from air.compute.launch import runs_on
    except ImportError as error:
        raise BackendUnavailableError(
            f"the cuda backend needs triton, which does not load here: {error}; torch's CUDA wheels bring it"
        ) from error
    if tensor.dtype != torch.float32 or not runs_on(tensor.device):
        raise ValueError(
            f"the cuda backend works on float32 on CUDA, got {tensor.dtype} on {tensor.device}; "
            f"convert with .to() or use backend='reference'"
        )
