"""Kernels that are compiled ahead of use: once per process, once per machine, and with those of other sets."""

import fcntl
import importlib.util
import threading
from pathlib import Path
from types import ModuleType

import pytest

from air.compute import compile
from air.compute.compile import KERNEL_OPTIONS, LOCK, KernelSet, cache_folder, is_compiled

SOURCE = """
from air.compute.compile import inline, kernel

@inline
def add_one(number):
    return number + 1

@kernel
def double(number):
    return 2 * number

@kernel
def double_next(number):
    return double(add_one(number))
"""

needs_cache = pytest.mark.skipif(not KERNEL_OPTIONS["cache"], reason="AIR_LANES turns the cache on disk off")


def load_kernels(folder: Path) -> ModuleType:
    """A module of two kernels, whose cache lies beside it; loaded anew, as by another process, at every call."""
    path = folder / "kernels.py"
    if not path.exists():
        path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_set(kernel: object, used: list[object], seconds: int = 1) -> KernelSet:
    def use() -> None:
        used.append(kernel)
        assert callable(kernel)
        kernel(3)

    return KernelSet((kernel,), use, seconds)


def make_set_of_two(module: ModuleType, used: list[object]) -> KernelSet:
    """A kernel, and another that only the first calls."""
    return KernelSet((module.double_next, module.double), lambda: used.append(module.double_next(3)), 1)


def test_kernels_compute(tmp_path: Path) -> None:
    assert load_kernels(tmp_path).double_next(3) == 8


def test_a_set_compiles_its_kernels_once(tmp_path: Path) -> None:
    used: list[object] = []
    kernels = make_set(load_kernels(tmp_path).double, used)
    assert not kernels.is_compiled()
    kernels.compile()
    assert kernels.is_compiled()
    kernels.compile()
    assert len(used) == 1


@needs_cache
def test_another_process_loads_what_was_compiled(tmp_path: Path) -> None:
    make_set(load_kernels(tmp_path).double, []).compile()
    again = load_kernels(tmp_path)
    used: list[object] = []
    kernels = make_set(again.double, used)
    assert kernels.is_compiled()
    assert not again.double.signatures
    kernels.compile()
    assert used == [again.double]
    assert sum(again.double.stats.cache_hits.values()) == 1
    assert not again.double.stats.cache_misses


@needs_cache
def test_code_of_other_sources_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_set(load_kernels(tmp_path).double, []).compile()
    assert is_compiled(load_kernels(tmp_path).double)
    monkeypatch.setattr(compile, "FINGERPRINT", "sources of another version")
    assert not is_compiled(load_kernels(tmp_path).double)


def test_sets_add_up(tmp_path: Path) -> None:
    module = load_kernels(tmp_path)
    used: list[object] = []
    first, second = make_set(module.double, used, 2), make_set(module.double_next, used, 3)
    both = first + second
    assert both.kernels == (module.double, module.double_next)
    assert both.seconds == 5
    first.compile()
    assert not both.is_compiled()
    both.compile()
    assert used == [module.double, module.double, module.double_next]
    assert both.is_compiled()
    assert second.is_compiled()


@needs_cache
def test_who_wants_kernels_that_another_process_compiles_waits(tmp_path: Path) -> None:
    module = load_kernels(tmp_path)
    used: list[object] = []
    folder = cache_folder(module.double)
    assert folder is not None
    thread = threading.Thread(target=make_set(module.double, used).compile)
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert not used
    thread.join(60)
    assert used == [module.double]


def test_a_set_with_a_kernel_that_only_others_call_is_used_once(tmp_path: Path) -> None:
    """Loaded from the cache, such a kernel has no signatures, however often the set was used."""
    used: list[object] = []
    for _ in range(2):
        module = load_kernels(tmp_path)
        used.clear()
        for _ in range(2):
            make_set_of_two(module, used).compile()
    assert used == [8]
