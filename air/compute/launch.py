"""Launching Triton kernels on the device of their tensors.

Importing this module needs triton.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

_WARPS = 4


@triton.jit
def _nothing() -> None:
    pass


INTERPRETED = not isinstance(_nothing, triton.JITFunction)
"""Whether kernels run in Triton's interpreter, on CPU tensors. Decided when triton was first imported."""


def runs_on(device: torch.device) -> bool:
    """Whether kernels can work on tensors of this device."""
    return device.type == ("cpu" if INTERPRETED else "cuda")


def selected(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which kernels are launched on this device: it is made the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch(kernel: Any, programs: int, *arguments: Any, warps: int = _WARPS, **constants: int) -> None:
    """Launches `programs` programs of a kernel, each of `warps` warps; with 0 programs, nothing."""
    if programs:
        # Products and sums fuse into one instruction; stated here, since the default depends on triton's version.
        kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=True, **constants)
