import math

import numpy as np
import pytest
import torch

from air.arguments import image_tensor
from air.compute.threads import Workers
from air.errors import InvalidGaussiansError, NonFiniteLossError
from air.fitting.fit import fit
from air.fitting.grid import grid_initialization
from air.gaussians import activate, anchors
from air.loss.reference import loss
from air.metrics import psnr
from air.optimization.config import OptimizeConfig
from air.optimization.cpu import FusedOptimizer
from air.optimization.optimize import optimize
from air.optimization.settings import refinement
from air.rendering.render import render
from air.warmup import kernels_of, warm_up
from tests.support.cases import smooth_image

HEIGHT, WIDTH, PATCH = 37, 45, 5


def problem(dtype: torch.dtype = torch.float32):
    """A perturbed start (raw, anchor, target): no two numbers alike, so that no gradient vanishes by symmetry."""
    target = smooth_image(HEIGHT, WIDTH).to(dtype)
    raw = grid_initialization(target, PATCH)
    raw = raw + 0.2 * torch.randn(raw.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return raw, anchors(HEIGHT, WIDTH, PATCH, dtype), target


def test_the_raw_gradient_of_a_step_agrees_with_float64_autograd():
    raw, anchor, target = problem()
    exact = raw.double().requires_grad_()
    image = render(activate(exact, anchor.double(), PATCH), HEIGHT, WIDTH, backend="reference")
    loss(image, target.double()).backward()
    with Workers(1) as workers:
        state = FusedOptimizer(
            raw.numpy(),
            anchor.numpy(),
            target.numpy(),
            PATCH,
            torch.zeros_like(target).numpy(),
            workers,
            OptimizeConfig(),
        )
        state.evaluate()
        found = torch.from_numpy(state.raw_gradient()[:, : len(raw)].T.copy())
    for column in range(8):
        difference = (found[:, column] - exact.grad[:, column]).norm()
        assert difference < 1e-3 * exact.grad[:, column].norm(), column


def test_a_good_start_is_refined_and_not_thrown_back():
    raw, anchor, target = problem()
    good = optimize(raw, anchor, target, PATCH, OptimizeConfig(steps=30)).raw

    def refined(config: OptimizeConfig) -> float:
        return optimize(good, anchor, target, PATCH, config).trajectory.psnr[-1]

    assert refined(refinement(10)) > refined(OptimizeConfig(steps=0))
    for steps in (3, 10):
        assert refined(refinement(steps)) > refined(OptimizeConfig(steps=steps))


@pytest.mark.parametrize("opposed_fraction", [0.0, 0.3, 1.0])
def test_both_paths_take_the_same_way(opposed_fraction: float):
    # A step that is taken or not, by a sign, parts rounding errors: few steps then.
    config = OptimizeConfig(steps=15 if opposed_fraction == 1 else 10, opposed_fraction=opposed_fraction)
    fast = optimize(*problem(), PATCH, config, backend="cpu")
    slow = optimize(*problem(torch.float64), PATCH, config)
    assert fast.trajectory.loss == pytest.approx(slow.trajectory.loss, rel=1e-3)
    assert fast.trajectory.psnr == pytest.approx(slow.trajectory.psnr, abs=0.02)
    assert fast.trajectory.loss[-1] < 0.7 * fast.trajectory.loss[0]


@pytest.mark.parametrize("opposed_fraction", [0.0, 1.0])
def test_only_plain_adam_moves_against_the_gradient(opposed_fraction: float):
    raw, anchor, target = (tensor.numpy() for tensor in problem())
    config = OptimizeConfig(steps=12, opposed_fraction=opposed_fraction)
    opposed = 0
    with Workers(1) as workers:
        state = FusedOptimizer(raw, anchor, target, PATCH, np.zeros_like(target), workers, config)
        for step in range(config.steps):
            state.evaluate()
            gradient, before = state.raw_gradient().copy(), state.drawing.raw.copy()
            state.update(step)
            opposed += ((state.drawing.raw - before) * gradient > 0).sum()
    assert (opposed > 0) == (opposed_fraction > 0)


def test_entry_k_is_the_state_after_k_updates():
    raw, anchor, target = problem()
    config = OptimizeConfig(steps=6)
    seen = []
    result = optimize(raw, anchor, target, PATCH, config, on_step=lambda *entry: seen.append(entry))
    assert result.trajectory.loss.shape == (7,)
    assert result.trajectory.loss.dtype == np.float64
    assert [step for step, _, _ in seen] == list(range(7))
    assert [entry[1] for entry in seen] == result.trajectory.loss.tolist()
    for entry, state in ((0, raw), (6, result.raw)):
        image = render(activate(state, anchor, PATCH), HEIGHT, WIDTH)
        assert result.trajectory.psnr[entry] == pytest.approx(psnr(image, target), abs=1e-4)
        assert result.trajectory.loss[entry] == pytest.approx(loss(image.double(), target.double()).item(), abs=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_frozen_gaussians_do_not_move_and_are_drawn(backend):
    raw, anchor, target = problem()
    free = torch.rand(len(raw), generator=torch.Generator().manual_seed(3)) < 0.5
    result = optimize(raw, anchor, target, PATCH, OptimizeConfig(steps=4), free=free, backend=backend)
    assert torch.equal(result.raw[~free], raw[~free])
    assert (result.raw[free] != raw[free]).any(dim=1).all()
    everything = optimize(raw, anchor, target, PATCH, OptimizeConfig(steps=0), backend=backend)
    assert result.trajectory.loss[0] == pytest.approx(everything.trajectory.loss[0], abs=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_canvas_is_the_same_as_frozen_gaussians(backend):
    raw, anchor, target = problem()
    free = torch.arange(len(raw)) % 3 == 0
    canvas = render(activate(raw[~free], anchor[~free], PATCH), HEIGHT, WIDTH)
    config = OptimizeConfig(steps=5)
    masked = optimize(raw, anchor, target, PATCH, config, free=free, backend=backend)
    painted = optimize(raw[free], anchor[free], target, PATCH, config, canvas=canvas, backend=backend)
    assert masked.trajectory.loss == pytest.approx(painted.trajectory.loss, rel=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_to_do_is_done(backend):
    raw, anchor, target = problem()
    none = optimize(raw[:0], anchor[:0], target, PATCH, OptimizeConfig(steps=2), backend=backend)
    assert none.raw.shape == (0, 8)
    assert none.trajectory.psnr[-1] == pytest.approx(psnr(torch.zeros_like(target), target), abs=1e-4)
    still = torch.zeros(len(raw), dtype=torch.bool)
    assert torch.equal(optimize(raw, anchor, target, PATCH, OptimizeConfig(steps=2), free=still).raw, raw)
    zero = optimize(raw, anchor, target, PATCH, OptimizeConfig(steps=0), backend=backend)
    assert torch.equal(zero.raw, raw)
    assert len(zero.trajectory.loss) == 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("which", ["target", "canvas"])
def test_a_loss_that_is_not_a_number_names_the_step(backend, which):
    raw, anchor, target = problem()
    images = {"target": target.clone(), "canvas": torch.zeros_like(target)}
    images[which][1, 5, 6] = math.nan
    with pytest.raises(NonFiniteLossError, match="after 0 updates"):
        optimize(
            raw, anchor, images["target"], PATCH, OptimizeConfig(steps=3), canvas=images["canvas"], backend=backend
        )


def test_raw_numbers_that_are_not_finite_are_refused():
    raw, anchor, target = problem()
    raw[7, 1] = math.nan
    with pytest.raises(InvalidGaussiansError, match="Gaussian 7"):
        optimize(raw, anchor, target, PATCH, OptimizeConfig(steps=1))


def test_the_number_of_threads_changes_no_bit():
    image = smooth_image(150, 90)
    one, two = (fit(image, steps=8, patch_size=6, threads=threads) for threads in (1, 2))
    assert torch.equal(one.raw, two.raw)
    assert one.trajectory.loss.tolist() == two.trajectory.loss.tolist()


@pytest.mark.parametrize("size", [(1, 1), (1, 23), (19, 1), (5, 7)])
def test_tiny_images_fit(size):
    result = fit(smooth_image(*size), steps=3, patch_size=4)
    assert np.isfinite(result.trajectory.loss).all()
    assert (result.height, result.width) == size


def test_fit_takes_arrays_pictures_and_tensors_alike():
    from PIL import Image

    array = (smooth_image(20, 30).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    raws = [fit(image, steps=2, patch_size=4).raw for image in (array, Image.fromarray(array), image_tensor(array))]
    assert torch.equal(raws[0], raws[1])
    assert torch.equal(raws[0], raws[2])


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), torch.full((3, 4, 4), 1.5), "picture.png"]
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match="image"):
        fit(image, steps=1)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": -1},
        {"colour_learning_rate": 0.0},
        {"beta1": 1.0},
        {"constant_fraction": 1.5},
        {"opposed_fraction": -0.1},
    ],
)
def test_a_configuration_out_of_bounds_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        OptimizeConfig(**options)


@pytest.mark.parametrize("size", [(64, 64), (61, 50)])
@pytest.mark.parametrize("value", [0.5, -0.3])
def test_the_grid_reproduces_a_constant_residual(size, value):
    residual = torch.full((3, *size), value)
    gaussians = activate(grid_initialization(residual, 4), anchors(*size, 4), 4)
    inside = render(gaussians, *size)[:, 16:-16, 16:-16]
    # A grid of Gaussians of width s ripples by 2 exp(-2π² (s/p)²) per axis: that is all that may remain.
    spread = gaussians.scale[0, 0].item() / 4
    ripple = 4 * math.exp(-2 * math.pi**2 * spread**2)
    assert inside.mean() == pytest.approx(value, rel=0.01)
    assert (inside - value).abs().max() < (ripple + 0.02) * abs(value)


def test_the_grid_is_linear_in_the_residual_and_keeps_colours_in_range():
    image = smooth_image(40, 50)
    plus, minus = grid_initialization(image / 4, 5), grid_initialization(-image / 4, 5)
    torch.testing.assert_close(plus[:, 5:], -minus[:, 5:])
    assert torch.tanh(grid_initialization(image * 50, 5))[:, 5:].abs().max() < 1


def test_kernels_are_known_to_be_compiled():
    warm_up("fit")
    assert kernels_of("fit").is_compiled()
    said = []
    warm_up("fit", said.append)
    assert not said
