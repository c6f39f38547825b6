"""The optimiser's loop in plain torch: the definition that the compiled backends are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from air.gaussians import activate
from air.loss.reference import L1_WEIGHT, MIN_MEAN_ERROR
from air.loss.reference import loss as torch_loss
from air.optimization.config import OptimizeConfig
from air.optimization.problem import Moments, Recorder
from air.optimization.rule import State
from air.rendering.render import render


def optimize_reference(
    raw: Tensor,
    anchor: Tensor,
    target: Tensor,
    patch_size: int,
    config: OptimizeConfig,
    background: Tensor | None,
    moments: Moments,
    threads: int,
    recorder: Recorder,
) -> tuple[Tensor, Moments]:
    """Raw Gaussians (N, 8) after the last update, and their moments; by the reference renderer and torch's autograd.

    A number with gradient g, learning rate r, moments m and v, of a Gaussian with its a-th update, moves by r u:

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        u = rule(m / (1 - beta1^a), v / (1 - beta2^a), ...)

    Adam's rule is -m / (sqrt(v) + eps) of the corrected moments; `air.optimization.rule` has both rules. Gaussians
    whose moments are kept from an earlier optimisation have a larger a than new ones, so every Gaussian is corrected
    for its own bias.

    With `squared_fraction` f, the L1 term's gradient sign(d) becomes (1 - f) sign(d) + f d / mean |d| for differences d
    from the target. The mean is that of one update before, so that compiled backends know it in time; at the first
    update it is the present one.

    Arguments are as for `air.optimization.optimize.optimize`, checked. `threads` is not used: torch has its own number.
    """
    _, height, width = target.shape
    last_error = None
    for step in range(config.steps + 1):
        raw = raw.detach().requires_grad_()
        image = render(activate(raw, anchor, patch_size), height, width, backend="reference")
        if background is not None:
            image = background + image
        loss = torch_loss(image, target)
        squared_error = float((image.detach().clamp(0, 1) - target).square().mean())
        recorder.add(loss.item(), squared_error)
        if step == config.steps:
            break
        objective, last_error = descent_objective(image, target, loss, config.squared_fraction, last_error)
        (gradient,) = torch.autograd.grad(objective, raw)
        state, moments = observe(
            raw.detach(), gradient, moments, config, step, squared_error, patch_size, target.numel()
        )
        with torch.no_grad():
            moves = config.rule(step).move(state)
        raw = raw + torch.from_numpy(config.learning_rates(step)).to(raw) * moves
    return raw.detach(), moments


def observe(
    raw: Tensor,
    gradient: Tensor,
    moments: Moments,
    config: OptimizeConfig,
    step: int,
    squared_error: float,
    patch_size: int,
    num_values: int,
) -> tuple[State, Moments]:
    """What a rule sees at update number `step`, and the moments with this gradient in them.

    Args:
        raw: Raw Gaussians before the update, shape (N, 8).
        gradient: The gradient by them, of the same shape.
        moments: Those before the update.
        config: Rates and schedule.
        step: Number of the update, from 0.
        squared_error: Mean squared error of the clamped picture.
        patch_size: The activations' range in pixels.
        num_values: Values of the picture: 3 · height · width.
    """
    mean = config.beta1 * moments.mean + (1 - config.beta1) * gradient
    square = config.beta2 * moments.square + (1 - config.beta2) * gradient.square()
    updates = (moments.age + 1)[:, None].to(raw.dtype)
    state = State(
        raw=raw,
        gradient=gradient,
        mean=mean / (1 - config.beta1**updates),
        square=square / (1 - config.beta2**updates),
        age=moments.age,
        learning_rates=torch.from_numpy(config.first_learning_rates()).to(raw),
        patch_size=patch_size,
        num_values=num_values,
        progress=config.progress(step, squared_error),
        eps=config.eps,
    )
    return state, Moments(mean, square, moments.age + 1)


def descent_objective(
    image: Tensor, target: Tensor, loss: Tensor, squared_fraction: float, last_error: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the gradient is taken of: the loss, with the squared error in place of a fraction of the L1 term.

    Args:
        image: The picture drawn, shape (3, height, width), with its autograd history.
        target: The picture wanted.
        loss: The loss of the two.
        squared_fraction: As in `OptimizeConfig`.
        last_error: The mean difference one update before; None at the first update.

    Returns:
        The objective and the present mean difference, both scalars.
    """
    difference = image - target
    error = difference.detach().abs().mean()
    if not squared_fraction:
        return loss, error
    scale = (error if last_error is None else last_error).clamp_min(MIN_MEAN_ERROR)
    replaced = (0.5 / scale * difference.square() - difference.abs()).mean()
    return loss + squared_fraction * L1_WEIGHT * replaced, error
