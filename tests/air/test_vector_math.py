"""Elementary functions are settled by one thread before others use them."""

import subprocess
import sys

import torch

from air.vector_math import FUNCTIONS

# A fresh process: the first call of a function in a process decides.
SCRIPT = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

largest_first = {}

class FirstCalls(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        for tensor in arguments[:1]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                largest_first.setdefault((function.__name__.split(".")[0], tensor.dtype), tensor.numel())
        return function(*arguments, **(options or {}))

with FirstCalls():
    from air.gaussians import Gaussians, activate, anchors, deactivate

    anchor = anchors(400, 600, 4)
    gaussians = activate(torch.randn(len(anchor), 8), anchor, 4)
    deactivate(gaussians, anchor, 4)
    gaussians.rescaled(0.5)
    for dtype in (torch.float32, torch.float64):
        for name in NAMES:
            getattr(torch, name)(torch.full((5000,), 0.5, dtype=dtype))
late = {key: size for key, size in largest_first.items() if key[0] in NAMES and size != 1}
assert not late, late
assert len([key for key in largest_first if key[0] in NAMES]) == 2 * len(NAMES), largest_first
"""


def test_the_first_call_of_each_function_has_one_number() -> None:
    names = [function.__name__ for function in FUNCTIONS]
    script = f"NAMES = {names}\n" + SCRIPT
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_settling_leaves_the_generator_of_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    script = "import torch; torch.manual_seed(3); import air.gaussians; print(torch.rand(4).tolist())"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(expected.tolist())
