"""What training draws is what prediction draws, and a sample's loss does not depend on its batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from air.codec.file import decode, encode_stages
from air.codec.symbols import Stage
from air.codec.uniform import channel_values
from air.compute.threads import Workers
from air.gaussians import Gaussians, activate, anchors
from air.metrics import psnr_of
from air.optimization.config import OptimizeConfig
from air.predictor.network import PredictorNetwork, build
from air.predictor.quantized import learned_table
from air.rendering.render import render
from air.stages.loop import all_gaussians, run_stages
from pipeline.training.config import LossConfig
from pipeline.training.losses import BatchLosses, finetune_losses, online_pod_losses, quantize_losses
from tests.support.released_dinov3 import CHANNELS, FEATURES, TINY

BITS = [8, 8, 7, 7, 7, 8, 4, 4]
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "compact": ("compact", {"channels": 16, "depth": 1}),
    "dinov3": ("dinov3", {"backbone": TINY, "channels": CHANNELS, "features": FEATURES}),
    "stretched": ("dinov3", {"backbone": TINY, "channels": CHANNELS, "features": FEATURES, "pixel_stretch": True}),
}


@pytest.fixture(params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> PredictorNetwork:
    architecture, settings = NETWORKS[request.param]
    if architecture == "dinov3":
        pytest.importorskip("transformers", reason="the backbone comes with transformers")
    torch.manual_seed(5)
    network = build(architecture, {"patch_size": 8, "num_stages": 2, "quantizer_bits": BITS, **settings})
    assert network.quantizer is not None
    assert network.quantizer.adapt is not None
    torch.nn.init.normal_(network.quantizer.adapt.weight, std=0.1)
    return network.eval()


def pictures(count: int = 3) -> Tensor:
    """Smooth noise; the first one is black but for a corner, which only its first stage has to do with."""
    generator = torch.Generator().manual_seed(1)
    images = torch.nn.functional.interpolate(torch.rand(count, 3, 5, 6, generator=generator), (40, 49), mode="bicubic")
    images = images.clamp(0, 1)
    images[0] = 0
    images[0, :, :4, :4] = 0.5
    return images.contiguous()


def run(name: str, network: PredictorNetwork, images: Tensor, config: LossConfig | None = None) -> BatchLosses:
    config = config or LossConfig(psnr_weight=1)
    with Workers(1) as workers:
        if name == "online pod":
            return online_pod_losses(network, images, [OptimizeConfig(steps=0)] * 2, config, workers)
        return (finetune_losses if name == "finetune" else quantize_losses)(network, images, 2, config, workers)


@pytest.mark.parametrize("phase", ["finetune", "online pod"])
def test_training_draws_what_prediction_draws(phase: str, network: PredictorNetwork) -> None:
    """With the network's own anchors, too: the authors' weights expect centres that are stretched."""
    images = pictures()
    found = run(phase, network, images).squared_error
    assert found is not None
    for image, error in zip(images, found, strict=True):
        stages = list(run_stages(image, network, [OptimizeConfig(steps=0)] * 2, canvas="predicted"))
        drawn = render(all_gaussians(stages, 8, "predicted"), 40, 49)
        expected = (drawn.clamp(0, 1) - image).square().mean()
        assert psnr_of(float(error)) == pytest.approx(psnr_of(float(expected)), abs=1e-3)


@pytest.mark.parametrize("phase", ["finetune", "quantize"])
def test_losses_of_a_batch_are_those_of_its_images(phase: str, network: PredictorNetwork) -> None:
    images = pictures()
    together = run(phase, network, images)
    alone = [run(phase, network, images[index : index + 1]) for index in range(3)]
    torch.testing.assert_close(together.loss, torch.cat([each.loss for each in alone]), rtol=1e-4, atol=1e-5)


def test_what_a_file_would_hold_is_judged_in_addition(network: PredictorNetwork) -> None:
    """Its squared error, and a hundredth of the mean error of offsets, scales, angles and colours each."""
    images = pictures()
    config = LossConfig(photometric_weight=0, mse_weight=1)
    plain, quantised = (run(name, network, images, config) for name in ("finetune", "quantize"))
    for index, image in enumerate(images):
        results = list(run_stages(image, network, [OptimizeConfig(steps=0)] * 2, canvas="predicted"))
        stages = [Stage(part.patch.numpy(), activate(part.predicted, part.anchor, 8)) for part in results]
        table = learned_table(network, image, stages)
        stored = decode(encode_stages(stages, 40, 49, 8, table))
        error = (render(stored, 40, 49) - image).square().mean()

        anchor = anchors(40, 49, 8)[torch.cat([part.patch for part in results])]
        moved = channel_values(stored, anchor) - channel_values(Gaussians.concatenate([g for _, g in stages]), anchor)
        moved[:, 4] = torch.remainder(moved[:, 4] + math.pi / 2, math.pi) - math.pi / 2
        groups = [moved[:, part].abs().mean() for part in (slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 8))]
        expected = error + 0.01 * torch.stack(groups).sum()
        torch.testing.assert_close((quantised.loss - plain.loss)[index].detach(), expected, rtol=1e-2, atol=1e-5)


def test_a_black_picture_has_no_gaussian_and_a_loss_without_gradient(network: PredictorNetwork) -> None:
    result = run("quantize", network, torch.zeros(2, 3, 40, 49))
    assert not result.loss.requires_grad
    assert result.squared_error is not None
    assert result.squared_error.tolist() == [0, 0]
