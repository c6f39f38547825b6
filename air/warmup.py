"""Compiles kernels ahead of use, by the name of the task that will run.

    warm_up("encode", say=print)

Library functions compile their kernels themselves. Jobs call `warm_up` first, to tell their users what takes long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from air.compute.compile import KernelSet

Task = Literal["fit", "predict", "decode", "encode"]
"""In order: `air.fit`; stages, predictors and training; `air.decode` and drawing; `air.encode`."""


def kernels_of(task: Task) -> KernelSet:
    """Every kernel that a task runs on the CPU. Loads numba."""
    from air.codec import file
    from air.encoding.encode import encoder_kernels
    from air.fitting.fit import fit_kernels
    from air.stages.loop import stage_kernels

    match task:
        case "fit":
            return fit_kernels()
        case "predict":
            return stage_kernels()
        case "decode":
            return file.KERNELS
        case "encode":
            return encoder_kernels()


def warm_up(task: Task, say: Callable[[str], None] | None = None) -> None:
    """Compiles the kernels of a task, or loads them from numba's cache on disk.

    Args:
        task: The task that will run.
        say: Called with a sentence if compiling takes long, which happens once per machine and version.
    """
    kernels = kernels_of(task)
    if say is not None and not kernels.is_compiled():
        say(f"compiling kernels, once on this machine: about {kernels.seconds} s")
    kernels.compile()
