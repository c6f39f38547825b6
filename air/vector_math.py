"""Elementary functions of torch that give the same bits in every process.

torch takes square roots, exponentials and the like of large tensors from oneMKL, a part on each of its threads. oneMKL
chooses the code of a function at its first call in a process. Two threads that make this call together may get code
of low accuracy for one of them (pytorch issue 188792, oneMKL 2024.2): one process in ten then draws other bits. This
module makes the first calls, on one number each.
"""

from __future__ import annotations

import torch

FUNCTIONS = (
    torch.acos,
    torch.asin,
    torch.asinh,
    torch.atan,
    torch.atanh,
    torch.cos,
    torch.erf,
    torch.exp,
    torch.expm1,
    torch.log,
    torch.log10,
    torch.log1p,
    torch.log2,
    torch.logit,
    torch.rsqrt,
    torch.sigmoid,
    torch.sin,
    torch.sqrt,
    torch.tan,
    torch.tanh,
)
"""Functions of one number that torch may take from oneMKL."""


def settle() -> None:
    """Calls each function on one number of each precision, on the calling thread. The first time takes about 10 ms."""
    for dtype in (torch.float32, torch.float64):
        half = torch.full((1,), 0.5, dtype=dtype)
        for function in FUNCTIONS:
            function(half)
