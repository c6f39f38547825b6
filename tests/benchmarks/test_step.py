"""The speed benchmark's counting and clocks: what it prints must mean what its docstring says."""

import math

import pytest
import torch

from air.compute.threads import Workers
from air.gaussians import activate
from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def _import_from_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_the_pixels_inside_supports_are_counted_by_their_definition():
    from workload import PATCH_SIZE, Size, count_support, workload

    size = Size(60, 48, 80)
    raw, anchor, _ = workload(size)
    gaussians = activate(raw.double(), anchor.double(), PATCH_SIZE)
    a, b, c = (value[:, None, None] for value in gaussians.conic().unbind(dim=1))
    dx = torch.arange(size.width) - gaussians.xy[:, 0, None, None]
    dy = torch.arange(size.height)[:, None] - gaussians.xy[:, 1, None, None]
    inside = a * dx * dx + 2 * b * dx * dy + c * dy * dy <= 2 * math.log(255)
    support = count_support(size)
    assert support.pixels == inside.sum()
    assert support.columns == inside.any(dim=1).sum()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_clocks_cover_every_part_and_no_more_than_the_step(threads):
    from backends import PARTS, Clock, FusedStep
    from workload import Size

    with Workers(threads) as workers:
        backend = FusedStep(Size(500, 128, 96), workers)
        clock = Clock()
        with clock.part("step"):
            backend.step(clock)
    step = clock.seconds.pop("step")
    assert set(clock.seconds) == set(PARTS)
    assert all(seconds > 0 for seconds in clock.seconds.values())
    assert sum(clock.seconds.values()) <= step


@pytest.mark.parametrize("step", ["FusedStep", "LearnedStep"])
def test_a_step_of_the_benchmark_moves_no_number_that_counts(step: str):
    import backends
    from workload import Size

    with Workers(1) as workers:
        backend = getattr(backends, step)(Size(100, 32, 48), workers)
        before = backend.state.raw_rows()
        backend.step(None)
        assert abs(backend.state.raw_rows() - before).max() < 1e-13
