"""The compact predictor: it starts as the grid, its feedback is a Gauss-Newton step, its parts learn."""

import json

import pytest
import torch

from air.compute.threads import Workers
from air.errors import CheckpointError
from air.fitting.grid import grid_initialization
from air.gaussians import activate, anchors
from air.predictor.base import GridPredictor
from air.predictor.checkpoint import load_checkpoint, save_checkpoint
from air.predictor.compact import trunk_cpu
from air.predictor.compact.feedback import Feedback, curvature
from air.predictor.network import build
from air.rendering.render import render

SETTINGS = {"patch_size": 5, "num_stages": 2, "channels": 16, "depth": 1, "passes": 2}


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image, canvas, active for a batch of two images whose sizes are no whole patches."""
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(2, 3, 23, 32, generator=generator)
    return image, torch.zeros_like(image), torch.rand(2, 5 * 7, generator=generator) < 0.7


@pytest.mark.parametrize("stage", [0, 1])
def test_with_a_head_of_zeros_it_is_the_grid(stage: int, inputs) -> None:
    image, canvas, active = inputs
    network = build("compact", SETTINGS)
    for head in network.heads:
        torch.nn.init.zeros_(head.weight)
    predicted = network.predict(image[0], canvas[0], active[0], stage)
    start = GridPredictor(5).predict(image[0], canvas[0], active[0], stage)
    assert torch.equal(predicted.raw, start.raw)
    assert torch.equal(predicted.anchor, start.anchor)


def test_a_batch_gives_what_its_images_give(inputs) -> None:
    network = build("compact", SETTINGS).eval()
    with torch.no_grad():
        together = network(*inputs, 1)
        for index in range(2):
            alone = network(*(each[index : index + 1] for each in inputs), 1)[0]
            torch.testing.assert_close(together[index], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(35, 7), (10, 61)])
def test_the_compiled_trunk_is_torchs(size: tuple[int, int]) -> None:
    torch.manual_seed(2)
    network = build("compact", SETTINGS | {"channels": 32, "depth": 3}).eval()
    for parameter in network.trunk.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = torch.randn(2, *size, 32)
    expected = network.trunk(features)
    with torch.no_grad():
        assert trunk_cpu.fits(features)
        run = network._trunk_for(features, Workers(1))
        assert isinstance(run, trunk_cpu.Trunk)
        for _ in range(2):  # its buffers are used again
            torch.testing.assert_close(run(features), expected.detach(), rtol=1e-4, atol=1e-4)


def test_every_parameter_learns_and_each_pass_answers_for_itself(inputs) -> None:
    network = build("compact", SETTINGS)
    torch.nn.init.normal_(network.heads[0].weight)
    loss = sum(proposal.sum() for stage in range(2) for proposal in network.proposals(*inputs, stage))
    loss.backward()
    without = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert not without
    network.zero_grad()
    network.proposals(*inputs, 0)[1].sum().backward()
    assert network.heads[0].weight.grad is None, "the second pass's loss must not reach the first pass"


def test_feedback_is_the_residual_and_a_step_that_helps(inputs) -> None:
    image, canvas, _ = inputs
    active = torch.ones(2, 35, dtype=torch.bool)
    raw = torch.stack([grid_initialization(each, 5) for each in image]) * 0.8
    excess, steps = Feedback(image, canvas, active, 5, Workers(1))(raw)
    anchor = anchors(23, 32, 5)
    drawn = torch.stack([render(activate(each, anchor, 5), 23, 32, backend="reference") for each in raw])
    torch.testing.assert_close(excess, drawn - image, atol=1e-4, rtol=0)
    moved = raw + 0.1 * steps / 3
    after = torch.stack([render(activate(each, anchor, 5), 23, 32) for each in moved])
    assert (image - after).square().mean() < excess.square().mean()


def test_compiled_feedback_is_torchs(inputs) -> None:
    image, _, active = inputs
    canvas = 0.3 * image.flip(0)
    raw = torch.stack([grid_initialization(each, 5) for each in image])
    raw = raw + 0.3 * torch.randn(raw.shape, generator=torch.Generator().manual_seed(8))
    for chosen in (slice(0, 1), slice(0, 2)):
        batch = (image[chosen], canvas[chosen], active[chosen])
        excess, steps = Feedback(*batch, 5, Workers(2))(raw[chosen])
        exact = Feedback(*(each.double() if each.is_floating_point() else each for each in batch), 5, Workers(1))
        expected_excess, expected_steps = exact.reference(raw[chosen].double())
        torch.testing.assert_close(excess, expected_excess.float(), atol=1e-5, rtol=0)
        torch.testing.assert_close(steps, torch.asinh(3 * expected_steps).float(), atol=1e-3, rtol=1e-3)


def test_feedback_of_no_active_patch_is_nothing(inputs) -> None:
    image, canvas, active = inputs
    excess, steps = Feedback(image, canvas, torch.zeros_like(active), 5, Workers(1))(torch.zeros(2, 35, 8))
    assert torch.equal(excess, -image)
    assert not steps.any()


def test_curvature_is_that_of_a_gaussian_alone_on_a_plane() -> None:
    raw = torch.tensor([[0.1, -0.2, 0.3, -0.4, 0.05, 0.6, -0.3, 0.2]], dtype=torch.float64)
    anchor = torch.tensor([[40.0, 40.0]], dtype=torch.float64)

    def draw(values: torch.Tensor) -> torch.Tensor:
        # The cut of the support has no part in the integrals, so this draws without one.
        gaussians = activate(values, anchor, 8)
        a, b, c = gaussians.conic()[0]
        y, x = torch.meshgrid(torch.arange(81.0).double(), torch.arange(81.0).double(), indexing="ij")
        x, y = x - gaussians.xy[0, 0], y - gaussians.xy[0, 1]
        weight = torch.exp(-0.5 * (a * x * x + 2 * b * x * y + c * y * y))
        return gaussians.colour[0][:, None, None] * weight

    jacobian = torch.func.jacfwd(draw)(raw).reshape(-1, 8)
    measured = jacobian.square().sum(dim=0)
    area, bend = curvature(raw, 8)
    scale = activate(raw, anchor, 8).scale[0]
    assert area.item() == pytest.approx(torch.pi * scale.prod().item())
    torch.testing.assert_close(bend[0, 2:], measured[2:], rtol=1e-3, atol=0)
    # The centre's formula holds along the Gaussian's own axes; in x and y the sum of both is the same.
    torch.testing.assert_close(
        (bend[0, 0:2] / (1 - torch.tanh(raw[0, 0:2]).square()).square()).sum(),
        (measured[0:2] / (1 - torch.tanh(raw[0, 0:2]).square()).square()).sum(),
        rtol=1e-3,
        atol=0,
    )


def test_what_is_done_outside_training_lowers_the_error_and_training_goes_without(inputs) -> None:
    image, canvas, active = (each[0] for each in inputs)
    errors = []
    for extra in ({}, {"colour_iterations": 3}):
        torch.manual_seed(1)
        network = build("compact", SETTINGS | extra).eval()
        raw, anchor = network.predict(image, canvas, active, 0)
        drawn = render(activate(raw[active], anchor[active], 5), 23, 32)
        errors.append(float((drawn - image).square().mean()))
    assert errors[1] < errors[0]
    network = build("compact", SETTINGS | {"extra_passes": 1})
    assert len(network.train().proposals(*inputs, 0)) == 2
    assert len(network.eval().proposals(*inputs, 0)) == 3


def test_a_new_stage_starts_as_a_copy(inputs) -> None:
    network = build("compact", SETTINGS)
    torch.nn.init.normal_(network.embedding)
    network.start_stage(1)
    assert torch.equal(network.embedding[0], network.embedding[1])
    for number in range(2):
        assert torch.equal(network.heads[number].weight, network.heads[2 + number].weight)


def test_a_checkpoint_gives_the_same_network(tmp_path, inputs) -> None:
    network = build("compact", SETTINGS).eval()
    save_checkpoint(tmp_path / "one.safetensors", network, phase="finetune", step=7)
    loaded, card = load_checkpoint(tmp_path / "one.safetensors")
    assert (card.phase, card.step, card.settings["passes"]) == ("finetune", 7, 2)
    image, canvas, active = (each[0] for each in inputs)
    assert torch.equal(loaded.predict(image, canvas, active, 0).raw, network.predict(image, canvas, active, 0).raw)


def test_a_card_without_a_patch_size_is_named(tmp_path) -> None:
    save_checkpoint(tmp_path / "one.safetensors", build("compact", SETTINGS))
    card = json.loads((tmp_path / "one.json").read_text())
    del card["settings"]["patch_size"]
    (tmp_path / "one.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"one\.json: .* no whole number patch_size"):
        load_checkpoint(tmp_path / "one.safetensors")


def test_weights_that_are_not_those_of_the_card_are_refused(tmp_path) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    for path in (one, other):
        save_checkpoint(path, build("compact", SETTINGS))
    whole = one.read_bytes()
    one.write_bytes(whole[:-4] + bytes(byte ^ 255 for byte in whole[-4:]))
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"one\.safetensors is not the file that its card .*one\.json describes"
        ):
            load_checkpoint(one)
        one.write_bytes(other.read_bytes())  # then, beside the card of another checkpoint
    one.write_bytes(whole)
    load_checkpoint(one)
    card = json.loads((tmp_path / "one.json").read_text())
    del card["sha256"]
    (tmp_path / "one.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"one\.json: names no checksum \(sha256\) of one\.safetensors.*again"):
        load_checkpoint(one)


def test_settings_out_of_bounds_are_named() -> None:
    with pytest.raises(ValueError, match="depth must be a whole number, at least 1, got 0"):
        build("compact", {"patch_size": 7, "depth": 0})
    with pytest.raises(ValueError, match="colour"):
        build("compact", {"patch_size": 7, "colour": 1})
