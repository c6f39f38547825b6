"""Compiling with numba: one cache for the package, and kernels that are compiled ahead of use.

This relies on private parts of numba: a dispatcher's `_cache`, the `_cache_file` of that, and the attributes
`_source_stamp`, `_cache_path` and `_load_index` of the cache file. `air.compute.simd`, `stencil` and `bits` rely on
`numba.core`. pyproject.toml therefore caps numba's version; whoever raises the cap runs tests/air/compute, which fail
where one of these parts has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from numba.extending import intrinsic as numba_intrinsic

_FORCED_LANES = os.environ.get("AIR_LANES")

LANES = int(_FORCED_LANES) if _FORCED_LANES else (16 if llvm.get_host_cpu_features().get("avx512f") else 8)
"""Numbers in a vector: 16 where the CPU has AVX-512, else 8; the environment variable AIR_LANES overrides it."""

LOCK = "compiling.lock"
"""The file in a cache's folder that a process locks while it compiles."""

KERNEL_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": False,
    # The cache has one place per function, so a forced number of lanes would evict the usual code.
    "cache": _FORCED_LANES is None,
}
INLINE_OPTIONS: dict[str, Any] = {**KERNEL_OPTIONS, "inline": "always", "cache": False}


def _source_fingerprint() -> str:
    """A hash of this package's sources and of the number of lanes."""
    digest = hashlib.sha256(str(LANES).encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


FINGERPRINT = _source_fingerprint()
"""Compiled code of another fingerprint is not loaded from disk."""


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator of a compiled function that is called from Python or by other kernels.

    numba discards its cached code when the file of the function changes, but not when a file that it imports does.
    The stamp that it compares is therefore replaced by one of all our sources.
    """
    dispatcher = numba.njit(**KERNEL_OPTIONS)(function)
    cache_file = _cache_file(dispatcher)
    if cache_file is not None:
        cache_file._source_stamp = FINGERPRINT
    return dispatcher


def inline(function: Callable[..., Any]) -> Any:
    """Decorator of a piece of a kernel that is copied into each caller."""
    return numba.njit(**INLINE_OPTIONS)(function)


def intrinsic(function: Callable[..., Any]) -> Any:
    """Decorator of a function that emits LLVM code. Callers leave out its first argument, the typing context."""
    return numba_intrinsic(function)


_used: set[Any] = set()  # kernels of sets that were compiled in this process


@dataclass(frozen=True)
class KernelSet:
    """Kernels that are compiled together, ahead of use.

    Attributes:
        kernels: All of them, as `kernel` made them.
        use: Calls each kernel with arguments of the types that it always has; they may be empty.
        seconds: About how long compiling takes, once per machine and version; loading takes under a second.

    Sets add up: `first + second` compiles both.
    """

    kernels: tuple[Any, ...]
    use: Callable[[], None]
    seconds: int

    def __add__(self, other: KernelSet) -> KernelSet:
        def use() -> None:
            self.use()
            other.use()

        return KernelSet((*self.kernels, *other.kernels), use, self.seconds + other.seconds)

    def is_compiled(self) -> bool:
        """Whether every kernel is loaded or lies in numba's cache on disk, so that `compile` is quick."""
        return all(map(is_compiled, self.kernels))

    def compile(self) -> None:
        """Compiles the kernels, or loads them from numba's cache on disk; does nothing once they are loaded.

        While one process compiles, others on this machine that want the same kernels wait, and then load them.
        """
        # A kernel that only others call has no signatures of its own when those come from the cache.
        if all(dispatcher.signatures or dispatcher in _used for dispatcher in self.kernels):
            return
        with _compiling(self.kernels):
            self.use()
        _used.update(self.kernels)


def is_compiled(dispatcher: Any) -> bool:
    """Whether a kernel is loaded, or compiled code for it lies on disk."""
    cache_file = _cache_file(dispatcher)
    return bool(dispatcher.signatures) or (cache_file is not None and bool(cache_file._load_index()))


@contextmanager
def _compiling(dispatchers: Iterable[Any]) -> Iterator[None]:
    """Holds the lock under which missing kernels are compiled by being used; waits for a process that holds it.

    Without a cache on disk, or where the cache lies on a file system without locks, nobody waits.
    """
    missing = [dispatcher for dispatcher in dispatchers if not is_compiled(dispatcher)]
    folder = cache_folder(missing[0]) if missing else None
    if folder is None:
        yield
        return
    with ExitStack() as stack:
        with suppress(OSError):
            lock = stack.enter_context((folder / LOCK).open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cache_folder(dispatcher: Any) -> Path | None:
    """The folder in which numba keeps the compiled versions of a function; None if it keeps none."""
    cache_file = _cache_file(dispatcher)
    return None if cache_file is None else Path(cache_file._cache_path)


def _cache_file(dispatcher: Any) -> Any:
    """The index that numba keeps of the compiled versions of a function on disk; None if it keeps none."""
    return getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
