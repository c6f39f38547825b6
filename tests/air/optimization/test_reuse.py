"""Optimisations of one target that share buffers: the results are those of optimisations that share nothing."""

import pytest
import torch

from air.fitting.grid import grid_initialization
from air.gaussians import activate, anchors
from air.optimization.config import OptimizeConfig
from air.optimization.optimize import optimize
from air.optimization.problem import Reuse
from air.rendering.render import render

PATCH = 6
SIZE = (40, 53)


@pytest.fixture
def start() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    target = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(1))
    return grid_initialization(target, PATCH), anchors(*SIZE, PATCH), target


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("squared_fraction", [0.0, 1.0])
def test_buffers_change_no_bit(
    start: tuple[torch.Tensor, torch.Tensor, torch.Tensor], backend: str, squared_fraction: float
) -> None:
    raw, anchor, target = start
    half = len(raw) // 2
    config = OptimizeConfig(steps=3, squared_fraction=squared_fraction)
    reuse = Reuse()
    for count, threads in ((len(raw), 1), (half, 2), (len(raw), 1)):  # other numbers of Gaussians
        alone = optimize(raw[:count], anchor[:count], target, PATCH, config, backend=backend)
        shared = optimize(
            raw[:count], anchor[:count], target, PATCH, config, backend=backend, reuse=reuse, threads=threads
        )
        assert torch.equal(alone.raw, shared.raw)
        assert (alone.trajectory.loss == shared.trajectory.loss).all()
        if backend == "cpu":
            picture = render(activate(shared.raw, anchor[:count], PATCH), *SIZE)
            assert reuse.picture is not None
            torch.testing.assert_close(reuse.picture, picture, rtol=0, atol=1e-5)
        else:
            assert reuse.picture is None


def test_a_shared_background_is_not_kept(start: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    raw, anchor, target = start
    config = OptimizeConfig(steps=2)
    reuse = Reuse()
    optimize(raw, anchor, target, PATCH, config, canvas=0.3 * torch.ones_like(target), reuse=reuse)
    shared = optimize(raw, anchor, target, PATCH, config, reuse=reuse)
    assert torch.equal(shared.raw, optimize(raw, anchor, target, PATCH, config).raw)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_end_that_is_not_measured_has_no_entry_and_the_same_numbers(
    start: tuple[torch.Tensor, torch.Tensor, torch.Tensor], backend: str
) -> None:
    raw, anchor, target = start
    seen: list[int] = []
    config = OptimizeConfig(steps=4)
    whole = optimize(raw, anchor, target, PATCH, config, backend=backend)
    short = optimize(
        raw,
        anchor,
        target,
        PATCH,
        config,
        backend=backend,
        measure_end=False,
        on_step=lambda step, loss, psnr: seen.append(step),
    )
    assert torch.equal(whole.raw, short.raw)
    assert (whole.trajectory.psnr[:-1] == short.trajectory.psnr).all()
    assert seen == [0, 1, 2, 3]


def test_buffers_of_another_target_are_refused(start: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    raw, anchor, target = start
    reuse = Reuse()
    optimize(raw, anchor, target, PATCH, OptimizeConfig(steps=0), reuse=reuse)
    with pytest.raises(ValueError, match="another target"):
        optimize(raw, anchor, target.clone(), PATCH, OptimizeConfig(steps=0), reuse=reuse)
