"""Rendering: Gaussians -> image, differentiable, one file per backend.

    from air.render import render
    image = render(gaussians, height, width)

Backends: "reference" is the definition in dense torch, for any dtype and device; "cpu" is compiled for this machine's
vector registers, float32 only; "cuda" is compiled for GPUs by triton, float32 only. Compiled code, numba and triton are
loaded at a backend's first use, not by importing this module.
"""

from __future__ import annotations

from torch import Tensor

from air.compute.backends import backend_for, has_cpu_kernels, require_cuda_kernels
from air.errors import BackendUnavailableError
from air.gaussians import Gaussians


def render(gaussians: Gaussians, height: int, width: int, *, backend: str = "auto", threads: int = 1) -> Tensor:
    """The plain sum of the Gaussians (method.md section 1), an unclamped image of shape (3, height, width).

    Differentiable once with respect to xy, scale, angle and colour; the cut at 1/255 has no gradient. There may be any
    number of Gaussians, also none, which give zeros; they may be off the image or larger than it.

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
        threads: CPU threads at most.

    Raises:
        InvalidGaussiansError: A number is not finite or a scale is not positive.
        ValueError: The size, the number of threads or the backend is not one of those allowed.
        BackendUnavailableError: The compiled renderer cannot be loaded here.

    Example:
        >>> white = Gaussians(torch.tensor([[2.0, 1.0]]), torch.ones(1, 2), torch.zeros(1), torch.ones(1, 3))
        >>> image = render(white, height=3, width=5)
        >>> image.shape
        torch.Size([3, 3, 5])
        >>> [round(value, 3) for value in image[0, 1].tolist()]  # exp(-½ dx²) along the middle row
        [0.135, 0.607, 1.0, 0.607, 0.135]
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image needs at least one row and column, got height {height}, width {width}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    backend = backend_for(gaussians.xy, backend)
    gaussians.validate()
    if backend == "reference":
        from air.rendering.reference import render_reference

        return render_reference(gaussians, height, width)
    if backend == "cuda":
        require_cuda_kernels(gaussians.xy)
        from air.rendering.cuda import render_cuda

        return render_cuda(gaussians, height, width)
    if not has_cpu_kernels(gaussians.xy):
        raise ValueError(
            f"the cpu backend draws float32 on the CPU, got {gaussians.xy.dtype} on {gaussians.xy.device}; "
            f"convert with .to() or use backend='reference'"
        )
    try:
        from air.rendering.cpu import render_cpu
    except ImportError as error:
        raise BackendUnavailableError(f"the cpu backend needs numba, which does not load here: {error}") from error
    return render_cpu(gaussians, height, width, threads)
