"""Choosing a backend and a device, and checking that this machine has them."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from air.errors import BackendUnavailableError

BACKENDS = ("auto", "reference", "cpu", "cuda")


def backend_for(tensor: Tensor, backend: str = "auto") -> str:
    """The backend that works on a tensor: "reference", "cpu" or "cuda".

    Args:
        tensor: Its dtype and device decide.
        backend: The caller's choice. "auto" is the compiled backend of the tensor's device for float32 (on CUDA if
            triton is installed), else "reference". Any other name is returned as it is.

    Raises:
        ValueError: There is no backend of that name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; use one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    if has_cpu_kernels(tensor):
        return "cpu"
    if tensor.dtype == torch.float32 and tensor.device.type == "cuda" and triton_is_installed():
        return "cuda"
    return "reference"


def has_cpu_kernels(*tensors: Tensor) -> bool:
    """Whether the compiled kernels of the "cpu" backend take these tensors: float32 on the CPU."""
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)


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


def choose_device(device: str, backend: str = "auto") -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:1" names for a backend.

    "auto" is CUDA if there is a GPU, triton is installed and the backend is "auto" or "cuda"; else it is the CPU.

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
