"""The stage loop: which patches are active, what is frozen, that stages buy quality; and batches of images."""

import numpy as np
import pytest
import torch

from air.errors import NonFiniteLossError
from air.fitting.residual import residual_initialization
from air.gaussians import activate, anchors
from air.optimization.config import OptimizeConfig
from air.optimization.optimize import optimize
from air.predictor.base import GridPredictor, Prediction
from air.rendering.render import render
from air.stages.control import StageControl, active_patches, largest_errors, patch_errors
from air.stages.loop import all_gaussians, all_predicted, run_stages, run_stages_batch
from air.stages.predict import predict


@pytest.fixture(scope="module")
def photograph() -> torch.Tensor:
    """A crop of a photograph, 3 x 70 x 84: ten by twelve patches of 7."""
    data = pytest.importorskip("skimage.data", reason="the photograph comes with scikit-image")
    return torch.from_numpy(data.astronaut()[60:130, 180:264].astype(np.float32) / 255).permute(2, 0, 1).contiguous()


def naive_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Of one patch (3, p, p), from the formula in method.md section 3."""
    scores = []
    for a, b in zip(x.astype(np.float64), y.astype(np.float64), strict=True):
        covariance = ((a - a.mean()) * (b - b.mean())).mean()
        above = (2 * a.mean() * b.mean() + 0.01**2) * (2 * covariance + 0.03**2)
        scores.append(above / ((a.mean() ** 2 + b.mean() ** 2 + 0.01**2) * (a.var() + b.var() + 0.03**2)))
    return float(np.mean(scores))


@pytest.mark.parametrize(("height", "width"), [(21, 28), (20, 25), (7, 7), (1, 1), (3, 40)])
def test_a_patch_is_active_exactly_when_one_error_is_above_its_bound(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(height * 100 + width)
    image = torch.rand(3, height, width, generator=generator)
    # Noise that grows from left to right, so that patches fall on both sides of both bounds.
    noise = torch.randn(3, height, width, generator=generator) * torch.linspace(0, 0.05, width)
    canvas = image + noise
    control = StageControl(max_mse=3e-4, max_dssim=0.01)
    active = active_patches(canvas, image, 7, control).numpy()

    rows, columns = -(-height // 7), -(-width // 7)
    padding = ((0, 0), (0, rows * 7 - height), (0, columns * 7 - width))
    x, y = (np.pad(picture.numpy(), padding, mode="edge") for picture in (canvas, image))
    expected = []
    for row in range(rows):
        for column in range(columns):
            tile = np.s_[:, row * 7 : row * 7 + 7, column * 7 : column * 7 + 7]
            mse = np.square(x[tile].astype(np.float64) - y[tile]).mean()
            expected.append(mse > control.max_mse or 1 - naive_ssim(x[tile], y[tile]) > control.max_dssim)
    assert active.tolist() == expected


def test_a_perfect_canvas_has_no_active_patch_and_ends_the_loop(photograph: torch.Tensor) -> None:
    assert not active_patches(photograph, photograph, 7, StageControl()).any()
    black = torch.zeros(3, 14, 14)
    assert list(run_stages(black, GridPredictor(7), [OptimizeConfig(steps=1)] * 3)) == []


def test_each_stage_adds_only_to_bad_patches_and_improves_the_picture(photograph: torch.Tensor) -> None:
    stages = list(run_stages(photograph, GridPredictor(7), [OptimizeConfig(steps=40)] * 3))
    _, height, width = photograph.shape
    canvas = torch.zeros_like(photograph)
    for number, stage in enumerate(stages):
        assert stage.stage == number
        active = active_patches(canvas, photograph, 7, StageControl()).nonzero()[:, 0]
        assert torch.equal(stage.patch, active)
        assert torch.equal(stage.anchor, anchors(height, width, 7)[active])
        assert stage.loss[1] < stage.loss[0]
        canvas = canvas + render(activate(stage.target, stage.anchor, 7), height, width)
    psnr = [stage.psnr[1] for stage in stages]
    # A later stage is worth more than a decibel here; a start that does not fit the residual is not.
    assert psnr[1] > psnr[0] + 1
    assert psnr[2] > psnr[1] + 0.5


def test_the_recorded_psnr_is_that_of_the_sum_of_all_gaussians(photograph: torch.Tensor) -> None:
    stages = list(run_stages(photograph, GridPredictor(7), [OptimizeConfig(steps=10)] * 3))
    _, height, width = photograph.shape
    image = render(all_gaussians(stages, 7, "target").to(torch.float64), height, width)
    mse = (image.clamp(0, 1) - photograph).square().mean().item()
    assert -10 * np.log10(mse) == pytest.approx(stages[-1].psnr[1], abs=2e-3)


def test_a_budget_goes_to_the_patches_with_the_largest_squared_error(photograph: torch.Tensor) -> None:
    _, height, width = photograph.shape
    config = [OptimizeConfig(steps=0)] * 4
    free = list(run_stages(photograph, GridPredictor(7), config))
    budget = len(free[0]) + len(free[1]) // 2
    first, second = run_stages(photograph, GridPredictor(7), config, budget=budget)
    assert torch.equal(first.target, free[0].target)
    assert len(first) + len(second) == budget
    left = photograph - render(activate(first.target, first.anchor, 7), height, width)
    tiles = left.reshape(3, height // 7, 7, width // 7, 7).double().square().mean(dim=(0, 2, 4)).flatten()
    assert set(second.patch.tolist()) < set(free[1].patch.tolist())
    left_out = sorted(set(free[1].patch.tolist()) - set(second.patch.tolist()))
    assert tiles[second.patch].min() >= tiles[left_out].max()


def test_a_budget_below_the_first_stage_bounds_that_stage(photograph: torch.Tensor) -> None:
    (only,) = run_stages(photograph, GridPredictor(7), [OptimizeConfig(steps=0)] * 4, budget=5)
    assert len(only) == 5
    with pytest.raises(ValueError, match="budget"):
        list(run_stages(photograph, GridPredictor(7), [OptimizeConfig(steps=0)], budget=0))


def test_every_image_of_a_batch_has_the_budget_to_itself(photograph: torch.Tensor) -> None:
    config = [OptimizeConfig(steps=0)] * 3
    pictures = [photograph, photograph[:, :35]]
    for stages in run_stages_batch(pictures, GridPredictor(7), config, budget=61):
        assert sum(map(len, stages)) == 61


def test_among_equals_the_first_patches_are_the_worst() -> None:
    image = torch.zeros(3, 7, 35)
    canvas = torch.full_like(image, 0.5)
    among = torch.tensor([False, True, True, True, False])
    mse, _ = patch_errors(canvas, image, 7)
    assert largest_errors(mse, among, 2).tolist() == [False, True, True, False, False]
    assert largest_errors(mse, among, 9).tolist() == among.tolist()


def test_canvas_predicted_builds_on_predictions(photograph: torch.Tensor) -> None:
    config = [OptimizeConfig(steps=20)] * 2
    first, second = run_stages(photograph, GridPredictor(7), config, canvas="predicted")
    _, height, width = photograph.shape
    canvas = render(activate(first.predicted, first.anchor, 7), height, width)
    expected = residual_initialization(photograph - canvas, 7)[second.patch]
    torch.testing.assert_close(second.predicted, expected, rtol=1e-4, atol=1e-5)


def test_without_steps_targets_are_the_predictions(photograph: torch.Tensor) -> None:
    for stage in run_stages(photograph, GridPredictor(7), [OptimizeConfig(steps=0)] * 2):
        torch.testing.assert_close(stage.target, stage.predicted)
        assert stage.psnr[0] == stage.psnr[1]


def test_a_target_is_never_worse_than_what_was_predicted(photograph: torch.Tensor) -> None:
    """Beside an image that gains from a stride, one that such strides only harm, as they are far too long for it."""
    flat = torch.full_like(photograph, 0.5)
    config = [OptimizeConfig(steps=3)]
    (gains,), (harmed,) = run_stages_batch([photograph, flat], GridPredictor(7), config)
    assert optimize(harmed.predicted, harmed.anchor, flat, 7, config[0]).trajectory.loss[-1] > harmed.loss[0]
    assert torch.equal(harmed.target, harmed.predicted)
    assert harmed.loss[1] == harmed.loss[0]
    assert harmed.psnr[1] == harmed.psnr[0]
    assert not torch.equal(gains.target, gains.predicted)
    assert gains.loss[1] < gains.loss[0]


@pytest.mark.parametrize(("height", "width", "patch_size"), [(1, 1, 4), (5, 3, 7), (20, 31, 6), (14, 14, 7)])
def test_a_residuals_start_lies_inside_the_image_and_takes_some_of_it_away(
    height: int, width: int, patch_size: int
) -> None:
    residual = 0.3 * torch.randn(3, height, width, generator=torch.Generator().manual_seed(4))
    anchor = anchors(height, width, patch_size)
    gaussians = activate(residual_initialization(residual, patch_size), anchor, patch_size)
    assert (gaussians.xy > -0.5).all()
    assert (gaussians.xy < torch.tensor([width - 0.5, height - 0.5])).all()
    left = residual - render(gaussians, height, width)
    assert left.square().sum() < residual.square().sum()


@pytest.fixture(scope="module")
def pictures(photograph: torch.Tensor) -> list[torch.Tensor]:
    """Of several sizes; the black one never has a bad patch, the flat one soon has none any more."""
    flat = torch.full((3, 21, 14), 0.1)
    return [photograph, torch.zeros(3, 9, 9), photograph[:, 5:40, :30].contiguous(), flat, photograph[:, 30:, 44:]]


@pytest.mark.parametrize("canvas", ["target", "predicted"])
def test_images_that_go_together_come_out_as_if_alone(pictures: list[torch.Tensor], canvas) -> None:
    config = [OptimizeConfig(steps=count) for count in (15, 0, 4)]
    control = StageControl(max_mse=4e-3, max_dssim=2)
    together = run_stages_batch(pictures, GridPredictor(7), config, control=control, canvas=canvas)
    assert [len(stages) for stages in together] == [3, 0, 3, 1, 3]
    for picture, stages in zip(pictures, together, strict=True):
        alone = list(run_stages(picture, GridPredictor(7), config, control=control, canvas=canvas))
        assert len(stages) == len(alone)
        for found, expected in zip(stages, alone, strict=True):
            for name in ("patch", "anchor", "predicted", "target"):
                assert torch.equal(getattr(found, name), getattr(expected, name))
            for name in ("stage", "steps", "loss", "psnr"):
                assert getattr(found, name) == getattr(expected, name)


def test_no_images_have_no_stages() -> None:
    assert run_stages_batch([], GridPredictor(7), [OptimizeConfig(steps=1)]) == []


class GrayPredictor:
    """Gray Gaussians, whatever the image."""

    patch_size = 7

    def predict(
        self, image: torch.Tensor, canvas: torch.Tensor, active: torch.Tensor, stage: int, threads: int = 1
    ) -> Prediction:
        return Prediction(torch.full((len(active), 8), 0.1), anchors(*image.shape[1:], 7))


def test_a_batch_says_which_image_diverged(photograph: torch.Tensor) -> None:
    broken = photograph.clone()
    broken[1, 3, 4] = torch.nan
    images = [torch.zeros(3, 7, 7), photograph, broken, photograph]
    with pytest.raises(NonFiniteLossError, match="after 0 updates") as caught:
        run_stages_batch(images, GrayPredictor(), [OptimizeConfig(steps=1)])
    assert caught.value.image == 2


def test_stage_control_and_predictions_stay_on_the_images_device() -> None:
    """The meta device stands in for a GPU: torch refuses to mix its tensors with those of the CPU."""
    image, canvas = torch.empty(2, 3, 20, 30, device="meta")
    active = active_patches(canvas, image, 7, StageControl())
    assert active.device.type == "meta"
    for stage in range(2):
        raw, anchor = GridPredictor(7).predict(image, canvas, active, stage)
        assert activate(raw, anchor, 7).xy.device.type == "meta"


def test_without_a_judge_a_prediction_is_the_same_but_not_measured() -> None:
    image = torch.rand(3, 30, 41, generator=torch.Generator().manual_seed(2))
    config = [OptimizeConfig(steps=0)] * 3
    judged = list(run_stages(image, GridPredictor(7), config, canvas="predicted"))
    plain = list(run_stages(image, GridPredictor(7), config, canvas="predicted", judge=False))
    assert len(judged) == len(plain) == 3
    for one, other in zip(judged, plain, strict=True):
        assert torch.equal(one.patch, other.patch)
        assert torch.equal(one.target, other.target)
        assert np.isnan([*other.loss, *other.psnr]).all()
    optimized = list(run_stages(image, GridPredictor(7), [OptimizeConfig(steps=2)], judge=False))
    assert np.isfinite([*optimized[0].loss, *optimized[0].psnr]).all(), "what is optimised is always measured"


def test_predicting_without_steps_is_the_loop_without_steps() -> None:
    image = torch.rand(3, 30, 41, generator=torch.Generator().manual_seed(2))
    config = [OptimizeConfig(steps=0)] * 3
    looped = list(run_stages(image, GridPredictor(7), config, canvas="predicted", budget=50))
    predicted = predict(image, GridPredictor(7), 3, budget=50, threads=2)
    assert sum(map(len, predicted)) == 50
    raw, anchor = all_predicted(predicted)
    assert torch.equal(raw, torch.cat([stage.raw("predicted") for stage in looped]))
    assert torch.equal(anchor, torch.cat([stage.anchor for stage in looped]))
    table = all_gaussians(predicted, 7, "predicted")
    assert torch.equal(table.xy, torch.cat([stage.gaussians("target", 7).xy for stage in looped]))
