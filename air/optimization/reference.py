"""The optimiser's loop in plain torch: the definition that the compiled backends are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from air.gaussians import COLUMN_GROUPS, activate
from air.loss.reference import loss as torch_loss
from air.optimization.config import OptimizeConfig
from air.optimization.problem import Recorder
from air.rendering.render import render


def optimize_reference(
    raw: Tensor,
    anchor: Tensor,
    target: Tensor,
    patch_size: int,
    config: OptimizeConfig,
    background: Tensor,
    threads: int,
    recorder: Recorder,
) -> Tensor:
    """Optimises with the reference renderer, torch's autograd and torch's Adam.

    Arguments are as for `air.optimization.optimize.optimize`, checked. `threads` is not used: torch has its own number.
    """
    _, height, width = target.shape
    groups = [raw[:, columns].clone().requires_grad_() for columns in COLUMN_GROUPS.values()]
    adam = torch.optim.Adam(
        [{"params": [group]} for group in groups], betas=(config.beta1, config.beta2), eps=config.eps
    )
    for step in range(config.steps + 1):
        gaussians = activate(torch.cat(groups, dim=1), anchor, patch_size)
        image = background + render(gaussians, height, width, backend="reference")
        loss = torch_loss(image, target)
        squared_error = (image.detach().clamp(0, 1) - target).square().mean()
        recorder.add(loss.item(), squared_error.item())
        if step == config.steps:
            break
        rates = config.learning_rates(step)
        for options, columns in zip(adam.param_groups, COLUMN_GROUPS.values(), strict=True):
            options["lr"] = float(rates[columns][0])
        adam.zero_grad()
        loss.backward()
        before = [group.detach().clone() for group in groups]
        adam.step()
        for group, old in zip(groups, before, strict=True):
            assert group.grad is not None
            opposed = adam.state[group]["exp_avg"] * group.grad < 0
            kept = torch.where(opposed, config.opposed_fraction, 1.0)
            group.data.copy_(old + kept * (group.data - old))
    return torch.cat(groups, dim=1).detach()
