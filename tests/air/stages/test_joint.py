"""Joint optimisation of all stages: what moves, what the figures mean, and that it buys decibels at equal Gaussians."""

import math

import numpy as np
import pytest
import torch

from air.errors import NonFiniteLossError
from air.gaussians import activate
from air.loss.reference import loss as reference_loss
from air.optimization.config import OptimizeConfig
from air.optimization.settings import refinement
from air.predictor.base import GridPredictor
from air.rendering.render import render
from air.stages.joint import optimize_jointly
from air.stages.loop import Canvas, StageResult, all_gaussians, run_stages, run_stages_batch

PATCH = 7
ALONE = [OptimizeConfig(steps=8)] * 3
JOINTLY = refinement(40)


@pytest.fixture(scope="module")
def photograph() -> torch.Tensor:
    """A crop of a photograph, 3 x 70 x 84: ten by twelve patches of 7."""
    data = pytest.importorskip("skimage.data", reason="the photograph comes with scikit-image")
    return torch.from_numpy(data.astronaut()[60:130, 180:264].astype(np.float32) / 255).permute(2, 0, 1).contiguous()


def stages_of(image: torch.Tensor, canvas: Canvas) -> list[StageResult]:
    return list(run_stages(image, GridPredictor(PATCH), ALONE, canvas=canvas))


@pytest.mark.parametrize("canvas", ["target", "predicted"])
def test_only_targets_move_and_the_picture_of_all_stages_is_better(photograph: torch.Tensor, canvas: Canvas) -> None:
    before = stages_of(photograph, canvas)
    (after,) = optimize_jointly([photograph], [before], PATCH, JOINTLY, canvas=canvas)
    assert len(after) == len(before) == 3
    for old, new in zip(before, after, strict=True):
        assert (new.stage, new.steps) == (old.stage, old.steps)
        for name in ("patch", "anchor", "predicted"):
            assert torch.equal(getattr(new, name), getattr(old, name))
        assert not torch.equal(new.target, old.raw(canvas))
        assert (new.loss[0], new.psnr[0]) == (old.loss[0], old.psnr[0])
    _, height, width = photograph.shape
    start = render(all_gaussians(before, PATCH, canvas), height, width)
    gain = after[-1].psnr[1] + 10 * math.log10((start.clamp(0, 1) - photograph).square().mean())
    # From the grid's predictions 40 joint steps are worth ten decibels; after steps of each stage, two.
    assert gain > (5 if canvas == "predicted" else 1)


def test_loss_and_psnr_are_of_the_targets_of_all_stages_so_far(photograph: torch.Tensor) -> None:
    """Held against the reference renderer and the reference loss in float64."""
    before = stages_of(photograph, "predicted")
    (after,) = optimize_jointly([photograph], [before], PATCH, JOINTLY, canvas="predicted")
    _, height, width = photograph.shape
    drawn, wanted = torch.zeros_like(photograph, dtype=torch.float64), photograph.double()
    for stage in after:
        gaussians = activate(stage.target.double(), stage.anchor.double(), PATCH)
        drawn = drawn + render(gaussians, height, width, backend="reference")
        assert stage.loss[1] == pytest.approx(reference_loss(drawn, wanted).item(), abs=1e-5)
        error = (drawn.clamp(0, 1) - wanted).square().mean().item()
        assert stage.psnr[1] == pytest.approx(-10 * math.log10(error), abs=1e-3)


def test_steps_that_make_the_picture_worse_are_not_kept(photograph: torch.Tensor) -> None:
    before = stages_of(photograph, "target")
    wild = OptimizeConfig(steps=2).scaled(40)
    (after,) = optimize_jointly([photograph], [before], PATCH, wild)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new.target, old.target)
        assert new.psnr[1] == pytest.approx(old.psnr[1], abs=1e-3)


def test_images_together_give_the_bits_of_each_alone(photograph: torch.Tensor) -> None:
    """Also beside an image that has no bad patch, and so no stage."""
    images = [photograph, torch.zeros_like(photograph), photograph[:, :35, :49].contiguous()]
    stages = run_stages_batch(images, GridPredictor(PATCH), ALONE)
    assert [len(of_image) for of_image in stages] == [3, 0, 3]
    together = optimize_jointly(images, stages, PATCH, JOINTLY)
    for image, of_image, found in zip(images, stages, together, strict=True):
        (alone,) = optimize_jointly([image], [of_image], PATCH, JOINTLY)
        assert [stage.psnr for stage in found] == [stage.psnr for stage in alone]
        assert all(torch.equal(a.target, b.target) for a, b in zip(found, alone, strict=True))


def test_an_error_names_the_image(photograph: torch.Tensor) -> None:
    """The second of the images with stages is the third of all."""
    images = [photograph, torch.zeros_like(photograph), photograph.clone()]
    stages = run_stages_batch(images, GridPredictor(PATCH), ALONE)
    images[2][0, 3, 4] = torch.nan
    with pytest.raises(NonFiniteLossError) as raised:
        optimize_jointly(images, stages, PATCH, JOINTLY)
    assert raised.value.image == 2
