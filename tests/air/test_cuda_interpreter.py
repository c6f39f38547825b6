"""The cuda backend where there is no GPU: its kernels interpreted, its kernels compiled, and life without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from air.compute.backends import choose_device, triton_is_installed
from air.errors import BackendUnavailableError
from air.fitting.grid import grid_initialization
from air.gaussians import anchors
from air.optimization.config import OptimizeConfig
from air.optimization.optimize import optimize, optimize_batch
from air.optimization.problem import Problem
from air.rendering.render import render
from tests.support.cases import random_gaussians, smooth_image
from tests.support.paths import ROOT

needs_triton = pytest.mark.skipif(not triton_is_installed(), reason="triton is not installed")


def run(*command: str | Path, **environment: str) -> str:
    """The output of a Python process of its own: whether kernels are interpreted is settled when triton is imported."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_triton
@pytest.mark.parametrize(
    "tests",
    [
        "air/test_cuda.py",
        "air/test_cuda_rule.py",
        pytest.param("pipeline/bulk/test_distill_cuda.py", marks=pytest.mark.slow),
    ],
)
def test_the_kernels_pass_their_tests_in_the_interpreter(tests):
    options = ["-p", "no:cacheprovider", "-m", "gpu"]
    output = run("-m", "pytest", *options, ROOT / "tests" / tests, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert "." in output.splitlines()[0]  # some ran, and were not skipped


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles_for_gpus_of_two_generations(tmp_path):
    output = run(
        ROOT / "tests" / "support" / "compile_cuda_kernels.py", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0"
    )
    sizes = [int(line.split()[-1]) for line in output.splitlines() if line.startswith(("sm_80 ", "sm_90 "))]
    assert len(sizes) == 22
    assert min(sizes) > 1000


def test_without_triton_everything_else_works():
    code = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
sys.modules["gsplat"] = None
import air, torch
from air.errors import BackendUnavailableError
result = air.fit(torch.full((3, 8, 8), 0.5), steps=1)
print(tuple(air.render(result.gaussians, 8, 8).shape))
try:
    air.render(result.gaussians, 8, 8, backend="cuda")
except BackendUnavailableError as error:
    print(error)
"""
    shape, message = run("-c", code).splitlines()
    assert shape == "(3, 8, 8)"
    assert "needs triton" in message


def test_cpu_work_imports_neither_triton_nor_gsplat():
    code = """
import sys, air, torch
result = air.fit(torch.full((3, 8, 8), 0.5), steps=1)
air.render(result.gaussians, 8, 8)
print([name for name in ("triton", "gsplat") if name in sys.modules])
"""
    assert run("-c", code, CUDA_VISIBLE_DEVICES="").strip() == "[]"


@needs_triton
def test_cpu_tensors_are_refused():
    with pytest.raises(ValueError, match=r"float32 on CUDA, got .* on cpu"):
        render(random_gaussians(5, 9, 9, 1), 9, 9, backend="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_auto_is_the_cpu_and_cuda_is_refused_without_a_gpu():
    assert choose_device("auto").type == "cpu"
    with pytest.raises(BackendUnavailableError, match="no CUDA device"):
        choose_device("cuda")


def test_a_batch_on_the_cpu_gives_what_single_images_give():
    batch = []
    for seed, size in enumerate([(20, 30), (9, 14)]):
        target = smooth_image(*size, seed)
        batch.append(Problem(grid_initialization(target, 5), anchors(*size, 5), target, 0.1 * target))
    config = OptimizeConfig(steps=3)
    for one, result in zip(batch, optimize_batch(batch, 5, config), strict=True):
        expected = optimize(one.raw, one.anchor, one.target, 5, config, canvas=one.canvas)
        assert torch.equal(result.raw, expected.raw)
        assert result.trajectory.loss.tolist() == expected.trajectory.loss.tolist()
