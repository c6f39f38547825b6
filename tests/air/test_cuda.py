"""The cuda backend against its definitions, on a GPU: float64 reference renderer, torch's loss, torch's Adam.

Every test but those that need a real GPU also runs on a CPU in triton's interpreter, started by
test_cuda_interpreter.py. The interpreter takes about a millisecond for every few kernel operations, hence small cases.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from air.compute.backends import choose_device
from air.errors import InvalidGaussiansError, NonFiniteLossError
from air.fitting.fit import fit
from air.gaussians import SUPPORT_CUTOFF, Gaussians, activate
from air.loss.reference import loss
from air.optimization.config import OptimizeConfig
from air.optimization.optimize import optimize, optimize_batch
from air.optimization.problem import Moments, Problem
from air.predictor.base import GridPredictor
from air.rendering.render import render
from air.stages.control import StageControl
from air.stages.loop import run_stages, run_stages_batch
from tests.support.cases import needles, random_gaussians, smooth_image
from tests.support.cuda_problems import DEVICE, INTERPRETED, PATCH, problem

pytest.importorskip("triton", reason="the cuda backend needs triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
real_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a real GPU")

CASES = {
    "usual": (lambda: random_gaussians(16, 24, 29, 1), 24, 29),
    "small and large": (lambda: random_gaussians(12, 22, 26, 2, median=1.0, spread=1.3), 22, 26),
    "over the borders": (lambda: random_gaussians(12, 12, 15, 5, median=3.0, outside=8.0), 12, 15),
    "off the image": (lambda: random_gaussians(20, 20, 30, 6, outside=500.0), 20, 30),
    "needles": (lambda: needles(40, 40, 9), 40, 40),
    "one pixel": (lambda: random_gaussians(10, 1, 1, 7, outside=2.0), 1, 1),
    "one row": (lambda: random_gaussians(12, 1, 35, 8), 1, 35),
    "one column": (lambda: random_gaussians(12, 35, 1, 9), 35, 1),
    "huge": (lambda: random_gaussians(3, 20, 30, 10, median=1e4, spread=0.3), 20, 30),
    "thin": (lambda: random_gaussians(30, 20, 20, 11, median=0.1, spread=0.3), 20, 20),
    "none": (lambda: Gaussians.empty(), 12, 13),
}
LARGE_CASES = {
    "many": (lambda: random_gaussians(3000, 300, 400, 21), 300, 400),
    "many, of all sizes": (lambda: random_gaussians(1000, 257, 190, 22, median=2.0, spread=1.2), 257, 190),
    "many needles": (lambda: needles(90, 90), 90, 90),
}


def image_and_gradients(gaussians: Gaussians, weight: Tensor, backend: str, dtype: torch.dtype, device: str):
    parts = (gaussians.xy, gaussians.scale, gaussians.angle, gaussians.colour)
    leaves = [part.detach().to(device, dtype).requires_grad_() for part in parts]
    image = render(Gaussians(*leaves), *weight.shape[1:], backend=backend)
    (image * weight.to(device, dtype)).sum().backward()
    return image.detach().cpu(), [leaf.grad.cpu() for leaf in leaves]


def check_against_reference(gaussians: Gaussians, height: int, width: int) -> None:
    weight = torch.randn(3, height, width, generator=torch.Generator().manual_seed(7))
    exact_image, exact = image_and_gradients(gaussians, weight, "reference", torch.float64, "cpu")
    image, gradients = image_and_gradients(gaussians, weight, "cuda", torch.float32, DEVICE)
    tiles = render(gaussians.to(DEVICE), height, width, backend="cuda").cpu()
    assert image.shape == tiles.shape == (3, height, width)
    assert (image - exact_image).abs().max() < 1e-5
    assert (tiles - exact_image).abs().max() < 1e-5
    for found, expected in zip(gradients, exact, strict=True):
        assert found.shape == expected.shape
        if expected.numel() and expected.abs().max() > 0:
            assert (found - expected).norm() < 1e-4 * expected.norm()
        else:
            assert not found.any()


@pytest.mark.parametrize("name", CASES)
def test_images_and_gradients_agree_with_the_float64_reference(name):
    make, height, width = CASES[name]
    check_against_reference(make(), height, width)


@real_gpu
@pytest.mark.parametrize("name", LARGE_CASES)
def test_large_images_and_gradients_agree_with_the_float64_reference(name):
    make, height, width = LARGE_CASES[name]
    check_against_reference(make(), height, width)


class GsplatInTorch:
    """gsplat's own torch reference of its binning: slow, but it runs anywhere."""

    def __init__(self) -> None:
        self.source = pytest.importorskip("gsplat.cuda._torch_impl", reason="needs gsplat")

    def isect_tiles(self, *arguments):
        return self.source._isect_tiles(*arguments)

    def isect_offset_encode(self, *arguments):
        return self.source._isect_offset_encode(*arguments)


@pytest.mark.parametrize("name", ["usual", "over the borders", "off the image", "needles"])
def test_both_binnings_give_the_same_bits(name, monkeypatch):
    from air.rendering import cuda

    make, height, width = CASES[name]
    gaussians = make().to(DEVICE)
    own = cuda.render_tiles(gaussians, height, width, "own")
    if INTERPRETED:
        provider = GsplatInTorch()
        monkeypatch.setattr(
            cuda,
            "bin_tiles",
            lambda geometry, height, width, binning: cuda.gsplat_tile_lists(
                geometry[:, 0:2], geometry[:, 5:7], height, width, cuda.kernels.TILE, provider
            ),
        )
    elif cuda.load_gsplat() is None:
        pytest.skip("gsplat's extension does not load here")
    assert torch.equal(cuda.render_tiles(gaussians, height, width, "gsplat"), own)


@real_gpu
def test_without_gradients_every_run_gives_the_same_bits():
    gaussians = random_gaussians(3000, 300, 400, 21).to(DEVICE)
    first = render(gaussians, 300, 400)
    assert all(torch.equal(render(gaussians, 300, 400), first) for _ in range(5))


@pytest.mark.parametrize("name", ["usual", "needles", "over the borders"])
def test_gsplat_finds_the_same_pairs_of_gaussian_and_pixel(name):
    """An independent cross-check: gsplat lists the pairs with a weight of at least 1/255; their sum is the image.

    Its lists end where a pixel would be opaque. So each image there gets only 8 Gaussians, and 1e38 of light.
    """
    from air.rendering import cuda

    if INTERPRETED:
        pytest.skip("needs a real GPU")
    gsplat = cuda.load_gsplat()
    if gsplat is None:
        pytest.skip("gsplat's extension does not load here")
    make, height, width = CASES[name]
    gaussians = make().to(DEVICE)
    total = torch.zeros(3, height * width, dtype=torch.float64, device=DEVICE)
    tile_rows, tile_columns = -(-height // 16), -(-width // 16)
    for first in range(0, len(gaussians), 8):
        part = gaussians[first : first + 8]
        centre = (part.xy + 0.5)[None]
        radii = torch.full((1, len(part), 2), 10_000, dtype=torch.int32, device=DEVICE)
        depths = torch.arange(len(part), device=DEVICE, dtype=torch.float32)[None] + 1
        _, keys, members = gsplat.isect_tiles(centre, radii, depths, 16, tile_columns, tile_rows)
        offsets = gsplat.isect_offset_encode(keys, 1, tile_columns, tile_rows)
        light = torch.full((1, height, width), 1e38, device=DEVICE)
        opacity = torch.ones(1, len(part), device=DEVICE)
        conic = part.conic()[None].contiguous()
        found, pixel, _ = gsplat.rasterize_to_indices_in_range(
            0, 1 << 30, light, centre, conic, opacity, width, height, 16, offsets, members
        )
        exact = part.to(torch.float64)
        a, b, c = exact.conic()[found].unbind(1)
        dx = pixel % width - exact.xy[found, 0]
        dy = torch.div(pixel, width, rounding_mode="floor") - exact.xy[found, 1]
        weight = torch.exp(-0.5 * (a * dx * dx + 2 * b * dx * dy + c * dy * dy))
        assert (weight > 0.999 * SUPPORT_CUTOFF).all()
        total.index_add_(1, pixel, weight * exact.colour[found].T)
    image = render(gaussians, height, width, backend="cuda")
    assert (image.double().flatten(1) - total).abs().max() < 1e-5


SIZES = [(1, 1), (1, 45), (18, 1), (5, 3)]


@pytest.mark.parametrize("sizes", [SIZES, pytest.param([(130, 200), (64, 48), (37, 61)], marks=real_gpu)])
def test_the_loss_of_a_batch_and_its_gradient_agree_with_float64_torch(sizes):
    from air.compute.ragged import RaggedImages
    from air.loss.cuda import SUMS, BatchLoss

    targets = [smooth_image(*size, seed) for seed, size in enumerate(sizes)]
    generator = torch.Generator().manual_seed(1)
    images = [target + 0.2 * torch.randn(target.shape, generator=generator) for target in targets]
    layout = RaggedImages(sizes, torch.device(DEVICE))
    state = BatchLoss(layout, targets)
    image, background = layout.pack(images), layout.pack(targets)
    sums = torch.zeros(2, len(sizes), SUMS, dtype=torch.float64, device=DEVICE)
    state.evaluate(image, background, sums, torch.full((1,), 2, dtype=torch.int32, device=DEVICE))
    losses, squared_errors = state.values(sums)
    for k, (x, y) in enumerate(zip(images, targets, strict=True)):
        exact = x.double().requires_grad_()
        expected = loss(exact, y.double())
        expected.backward()
        assert losses[1, k].item() == pytest.approx(expected.item(), abs=1e-6)
        clamped = (exact.detach().clamp(0, 1) - y.double()).square().mean().item()
        assert squared_errors[1, k].item() == pytest.approx(clamped, rel=1e-5)
        found = layout.image(state.gradient, k).cpu()
        assert (found - exact.grad).abs().max() < 1e-5 * exact.grad.abs().max()
    assert torch.equal(image, background)  # reset for the next step, and nothing outside touched
    inside = sum(layout.image(state.gradient, k).abs().sum() for k in range(len(sizes)))
    assert state.gradient.abs().sum().item() == pytest.approx(float(inside), rel=1e-5)


def definition(height: int, width: int, seed: int, config: OptimizeConfig, canvas: Tensor | None = None):
    """The same run in float64 torch."""
    exact = Problem(*(part.cpu().double() for part in problem(height, width, seed)[:3]))
    return optimize(*exact[:3], PATCH, config, canvas=None if canvas is None else canvas.double().cpu())


def test_whole_steps_agree_with_the_definition():
    config = OptimizeConfig(steps=2)
    found = optimize(*problem(12, 17)[:3], PATCH, config, backend="cuda")
    expected = definition(12, 17, 1, config)
    assert found.trajectory.loss == pytest.approx(expected.trajectory.loss, rel=1e-5)
    assert found.trajectory.psnr == pytest.approx(expected.trajectory.psnr, abs=1e-3)
    assert (found.raw.cpu() - expected.raw).abs().max() < 1e-4
    assert found.trajectory.loss[-1] < found.trajectory.loss[0]


def test_a_run_replays_its_graph_and_does_the_rest_step_by_step(monkeypatch):
    """The bookkeeping around graphs, with something that replays steps as a graph would."""
    from air.optimization import cuda

    class Steps:
        replays = 0

        def replay(self) -> None:
            self.replays += 1
            for _ in range(2):
                state.evaluate()
                state.update()

    monkeypatch.setattr(cuda, "GRAPH_STEPS", 2)
    config = OptimizeConfig(steps=3, opposed_fraction=0.3)
    state = cuda.BatchOptimizer([problem(4, 5)], PATCH, config)
    state._graph = Steps()
    state.run()
    assert state._graph.replays == 1
    expected = definition(4, 5, 1, config)
    assert state.trajectories()[0][:, 0] == pytest.approx(expected.trajectory.loss, rel=1e-5)
    assert (state.raw[0].cpu() - expected.raw).abs().max() < 1e-4


@real_gpu
@pytest.mark.parametrize("steps", [19, 20, 47])
def test_graphs_of_many_steps_take_the_same_way(steps):
    config = OptimizeConfig(steps=steps)
    found = optimize(*problem(37, 45)[:3], PATCH, config)
    expected = definition(37, 45, 1, config)
    assert found.trajectory.loss == pytest.approx(expected.trajectory.loss, rel=2e-3)
    assert found.trajectory.psnr == pytest.approx(expected.trajectory.psnr, abs=0.05)


def test_a_ragged_batch_gives_what_single_images_give():
    config = OptimizeConfig(steps=1)
    canvas = (0.3 * torch.rand(3, 6, 4, generator=torch.Generator().manual_seed(5))).to(DEVICE)
    nothing = problem(6, 4, 3)
    batch = [
        problem(11, 16, 1),
        Problem(nothing.raw[:0], nothing.anchor[:0], nothing.target, canvas),
        problem(4, 19, 2)._replace(canvas=None),
        problem(6, 4, 4)._replace(canvas=canvas),
    ]
    results = optimize_batch(batch, PATCH, config, backend="cuda")
    for one, result in zip(batch, results, strict=True):
        exact = [part.cpu().double() for part in one[:3]]
        canvas64 = None if one.canvas is None else one.canvas.cpu().double()
        expected = optimize(*exact, PATCH, config, canvas=canvas64)
        assert result.raw.shape == one.raw.shape
        assert result.trajectory.loss == pytest.approx(expected.trajectory.loss, rel=1e-5)
        assert result.trajectory.psnr == pytest.approx(expected.trajectory.psnr, abs=1e-3)
        if len(one.raw):
            assert (result.raw.cpu() - expected.raw).abs().max() < 1e-4


def test_a_step_goes_on_from_moments_of_gaussians_of_different_ages():
    raw, anchor, target = problem(6, 9)[:3]
    config = OptimizeConfig(steps=1, opposed_fraction=0.0)
    kept = optimize(raw, anchor, target, PATCH, config, backend="cuda").moments
    moments = Moments.concatenate([kept[:2], Moments.fresh(raw[2:])])
    found = optimize(raw, anchor, target, PATCH, config, moments=moments, backend="cuda")
    exact = Moments(moments.mean.cpu().double(), moments.square.cpu().double(), moments.age.cpu())
    expected = optimize(*(part.cpu().double() for part in (raw, anchor, target)), PATCH, config, moments=exact)
    assert (found.raw.cpu() - expected.raw).abs().max() < 1e-4
    assert found.moments.age.tolist() == expected.moments.age.tolist() == [2] * 2 + [1] * (len(raw) - 2)
    torch.testing.assert_close(found.moments.square.cpu().double(), expected.moments.square, rtol=1e-3, atol=1e-12)


def test_images_go_through_the_stages_together_as_they_do_alone():
    """Beside the cpu backend: equal patches, and equal numbers up to rounding. A black image has no stage."""
    images = [smooth_image(5, 9, 1), torch.zeros(3, 5, 5), smooth_image(6, 4, 2)]
    control = StageControl(max_mse=1e-4, max_dssim=2)
    config = [OptimizeConfig(steps=1)] * 2
    together = run_stages_batch(
        [image.to(DEVICE) for image in images],
        GridPredictor(PATCH),
        config,
        control=control,
        backend="cuda",
    )
    assert not together[1]
    assert len(together[0]) == 2
    for image, results in zip(images, together, strict=True):
        alone = list(run_stages(image, GridPredictor(PATCH), config, control=control))
        assert len(results) == len(alone)
        for found, expected in zip(results, alone, strict=True):
            assert found.target.device.type == DEVICE
            assert torch.equal(found.to("cpu").patch, expected.patch)
            assert found.loss == pytest.approx(expected.loss, rel=1e-4)
            assert found.psnr == pytest.approx(expected.psnr, abs=1e-2)
            assert (found.target.cpu() - expected.target).abs().max() < 1e-2


def test_a_batch_of_nothing_but_black_images_is_evaluated():
    target = smooth_image(5, 7).to(DEVICE)
    empty = Problem(torch.zeros(0, 8, device=DEVICE), torch.zeros(0, 2, device=DEVICE), target)
    (result,) = optimize_batch([empty], PATCH, OptimizeConfig(steps=1), backend="cuda")
    expected = loss(torch.zeros_like(target).double(), target.double()).item()
    assert result.trajectory.loss.tolist() == pytest.approx([expected] * 2, rel=1e-6)
    assert optimize_batch([], PATCH, OptimizeConfig(steps=1)) == []


def test_frozen_gaussians_do_not_move_and_are_drawn():
    raw, anchor, target = problem(11, 9)[:3]
    free = torch.arange(len(raw), device=DEVICE) % 2 == 0
    result = optimize(raw, anchor, target, PATCH, OptimizeConfig(steps=1), free=free, backend="cuda")
    assert torch.equal(result.raw[~free], raw[~free])
    assert (result.raw[free] != raw[free]).any(dim=1).all()
    exact = activate(raw.double(), anchor.double(), PATCH)
    expected = loss(render(exact, 11, 9, backend="reference"), target.double()).item()
    assert result.trajectory.loss[0] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_a_number_names_the_step_and_the_image():
    raw, anchor, target = problem(6, 9)[:3]
    target[1, 3, 4] = math.nan
    with pytest.raises(NonFiniteLossError, match="after 0 updates"):
        optimize(raw, anchor, target, PATCH, OptimizeConfig(steps=2), backend="cuda")
    with pytest.raises(NonFiniteLossError) as caught:
        optimize_batch(
            [problem(4, 5), problem(6, 9), Problem(raw, anchor, target)], PATCH, OptimizeConfig(steps=0), backend="cuda"
        )
    assert caught.value.image == 2


@pytest.mark.parametrize("steps", [0, 2, 3])
def test_progress_is_reported_on_the_way(steps, monkeypatch):
    from air.optimization import cuda

    monkeypatch.setattr(cuda, "GRAPH_STEPS", 2)
    launched = []
    update = cuda.BatchOptimizer.update
    monkeypatch.setattr(cuda.BatchOptimizer, "update", lambda self: (launched.append(1), update(self)))
    seen = []

    def on_step(step, loss, psnr):
        seen.append((step, loss, psnr))
        # At most the steps of this chunk are ahead of what is reported.
        assert INTERPRETED is False or len(launched) <= step + 2

    config = OptimizeConfig(steps=steps)
    result = optimize(*problem(4, 5)[:3], PATCH, config, backend="cuda", on_step=on_step)
    assert [step for step, _, _ in seen] == list(range(steps + 1))
    assert [loss for _, loss, _ in seen] == result.trajectory.loss.tolist()
    assert [psnr for _, _, psnr in seen] == result.trajectory.psnr.tolist()


@pytest.mark.parametrize("make", [partial(fit, steps=1, patch_size=5), partial(fit, num_gaussians=4, steps=3)])
def test_whole_fits_run_on_the_backend(make):
    image = smooth_image(5, 10, 3).to(DEVICE)
    found, expected = make(image, backend="cuda"), make(image.cpu(), backend="cpu")
    assert found.gaussians.xy.device.type == DEVICE
    assert len(found.gaussians) == len(expected.gaussians)
    assert found.trajectory.psnr == pytest.approx(expected.trajectory.psnr, abs=0.05)


def test_what_the_backend_cannot_draw_is_refused():
    gaussians = random_gaussians(5, 9, 9, 1).to(DEVICE)
    with pytest.raises(ValueError, match="float32 on CUDA"):
        render(gaussians.to(torch.float64), 9, 9, backend="cuda")
    gaussians.xy[2] = math.inf
    with pytest.raises(InvalidGaussiansError, match="Gaussian 2"):
        render(gaussians, 9, 9, backend="cuda")


@real_gpu
def test_auto_takes_the_gpu_and_gives_back_where_the_image_was():
    assert choose_device("auto").type == "cuda"
    assert choose_device("auto", "cpu").type == "cpu"
    image = smooth_image(60, 80)
    on_gpu, on_cpu = (fit(image, steps=30, patch_size=4, device=device) for device in ("auto", "cpu"))
    assert on_gpu.raw.device.type == "cpu"
    assert on_gpu.trajectory.psnr[-1] == pytest.approx(on_cpu.trajectory.psnr[-1], abs=0.2)
    assert fit(image.cuda(), steps=2, patch_size=4).gaussians.xy.device.type == "cuda"
    assert np.isfinite(fit(image, steps=2, patch_size=4, device="cuda").trajectory.loss).all()
