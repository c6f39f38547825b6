"""The optimiser's loop in plain torch: the definition that the compiled backends are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from air.gaussians import activate
from air.loss.reference import loss as torch_loss
from air.optimization.config import OptimizeConfig
from air.optimization.problem import Moments, Recorder
from air.rendering.render import render


def optimize_reference(
    raw: Tensor,
    anchor: Tensor,
    target: Tensor,
    patch_size: int,
    config: OptimizeConfig,
    background: Tensor,
    moments: Moments,
    threads: int,
    recorder: Recorder,
) -> tuple[Tensor, Moments]:
    """Raw Gaussians (N, 8) after the last update, and their moments; by the reference renderer and torch's autograd.

    A number with gradient g, learning rate r, moments m and v, of a Gaussian with its a-th update, moves by -u:

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        u = r (m / (1 - beta1^a)) / (sqrt(v / (1 - beta2^a)) + eps)

    If m and g have different signs, u is multiplied by `opposed_fraction`. Gaussians whose moments are kept from an
    earlier optimisation have a larger a than new ones, so every Gaussian is corrected for its own bias.

    Arguments are as for `air.optimization.optimize.optimize`, checked. `threads` is not used: torch has its own number.
    """
    _, height, width = target.shape
    mean, square, age = moments.mean, moments.square, moments.age
    for step in range(config.steps + 1):
        raw = raw.detach().requires_grad_()
        image = background + render(activate(raw, anchor, patch_size), height, width, backend="reference")
        loss = torch_loss(image, target)
        squared_error = (image.detach().clamp(0, 1) - target).square().mean()
        recorder.add(loss.item(), squared_error.item())
        if step == config.steps:
            break
        (gradient,) = torch.autograd.grad(loss, raw)
        age = age + 1
        updates = age[:, None].to(raw.dtype)
        mean = config.beta1 * mean + (1 - config.beta1) * gradient
        square = config.beta2 * square + (1 - config.beta2) * gradient.square()
        corrected_mean = mean / (1 - config.beta1**updates)
        corrected_square = square / (1 - config.beta2**updates)
        rates = torch.from_numpy(config.learning_rates(step)).to(raw)
        update = rates * corrected_mean / (corrected_square.sqrt() + config.eps)
        raw = raw - torch.where(mean * gradient < 0, config.opposed_fraction, 1.0) * update
    return raw.detach(), Moments(mean, square, age)
