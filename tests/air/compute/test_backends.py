"""Which backend and device are taken, and what is said where one cannot be had."""

import sys

import pytest
import torch

from air.compute import backends
from air.compute.backends import backend_for, choose_device, has_cpu_kernels, require_cuda_kernels
from air.errors import BackendUnavailableError

SINGLE, DOUBLE = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
ELSEWHERE = torch.zeros(1, device="meta")


class OnCuda:
    """As much of a float32 CUDA tensor as choosing looks at."""

    dtype = torch.float32
    device = torch.device("cuda")


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [(SINGLE, "cpu"), (DOUBLE, "reference"), (SINGLE.half(), "reference"), (ELSEWHERE, "reference")],
)
def test_auto_takes_what_the_tensor_allows(tensor: torch.Tensor, expected: str) -> None:
    assert backend_for(tensor) == expected
    assert backend_for(tensor, "auto") == expected


@pytest.mark.parametrize(("has_triton", "expected"), [(True, "cuda"), (False, "reference")])
def test_auto_takes_cuda_where_triton_is_installed(monkeypatch, has_triton: bool, expected: str) -> None:
    monkeypatch.setattr(backends, "triton_is_installed", lambda: has_triton)
    assert backend_for(OnCuda()) == expected  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
def test_a_named_backend_is_taken_as_it_is(backend: str) -> None:
    assert backend_for(DOUBLE, backend) == backend


def test_an_unknown_backend_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(ValueError, match="unknown backend 'gpu'; use one of auto, reference, cpu, cuda"):
        backend_for(SINGLE, "gpu")


def test_cpu_kernels_take_float32_on_the_cpu() -> None:
    assert has_cpu_kernels(SINGLE)
    assert has_cpu_kernels(SINGLE, SINGLE)
    assert not has_cpu_kernels(SINGLE, DOUBLE)
    assert not has_cpu_kernels(ELSEWHERE)


@pytest.mark.parametrize(
    ("device", "backend", "has_gpu", "has_triton", "expected"),
    [
        ("auto", "auto", True, True, "cuda"),
        ("auto", "cuda", True, True, "cuda"),
        ("auto", "cpu", True, True, "cpu"),
        ("auto", "reference", True, True, "cpu"),
        ("auto", "auto", True, False, "cpu"),
        ("auto", "auto", False, True, "cpu"),
        ("cpu", "auto", True, True, "cpu"),
        ("cuda:1", "auto", True, True, "cuda:1"),
        ("cuda", "reference", True, False, "cuda"),
    ],
)
def test_devices(monkeypatch, device: str, backend: str, has_gpu: bool, has_triton: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(backends, "triton_is_installed", lambda: has_triton)
    assert choose_device(device, backend) == torch.device(expected)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_where_there_is_none_is_refused_with_the_way_out(monkeypatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="no CUDA device here; use device='cpu' or 'auto'"):
        choose_device(device)


def test_cuda_kernels_refuse_tensors_that_are_not_theirs() -> None:
    pytest.importorskip("triton", reason="without triton there is another error")
    with pytest.raises(ValueError, match=r"works on float32 on CUDA, got torch\.float64 on cpu"):
        require_cuda_kernels(DOUBLE)


def test_cuda_kernels_without_triton_are_refused_with_the_way_out(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "air.compute.launch", None)
    with pytest.raises(BackendUnavailableError, match="needs triton"):
        require_cuda_kernels(SINGLE)
