"""Roll-outs of an update rule: a growing fit that records what each update should have been instead.

That is predict, optimise, distill for the rule. It predicts moves; the fit goes on with them; and the gradients of all
later losses say in which direction each move should have been different. No graph runs through the renderer: with the
features held fixed, the Gaussians after T updates are the first ones plus the sum of all updates, so the gradient of
the loss at update s is the derivative by every update before s. A fit computes these gradients anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from air.compute.backends import has_cpu_kernels
from air.compute.threads import Workers
from air.fitting.grow import GrowthConfig, grow, largest_grid
from air.gaussians import RAW_CHANNELS, activate
from air.loss.reference import L1_WEIGHT
from air.loss.reference import loss as torch_loss
from air.metrics import psnr_of
from air.optimization.config import OptimizeConfig
from air.optimization.problem import Moments, Reuse
from air.optimization.reference import descent_objective, observe
from air.optimization.rule import OWN_FEATURES, SHARED_FEATURES, State, UpdateRule
from air.rendering.render import render


@dataclass(frozen=True)
class CreditConfig:
    """How the gradients of later losses count for a move.

    The objective is a sum of log losses. A loss k updates later counts (1 - discount) · discount^(k - 1), and the last
    loss of the fit counts `final_weight` more, however far away it is.

    Attributes:
        discount: From 0 to below 1.
        final_weight: At least 0.
    """

    discount: float = 0.8
    final_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.discount < 1:
            raise ValueError(f"discount must be at least 0 and below 1, got {self.discount}")
        if not self.final_weight >= 0:
            raise ValueError(f"final_weight must be at least 0, got {self.final_weight}")


@dataclass(frozen=True, eq=False)
class RollOut:
    """What sampled Gaussians at sampled updates of one fit saw, did, and should have done. M samples, float32.

    Attributes:
        update: Number of the update in the fit, from 0, int32, shape (M,).
        features: As `air.optimization.rule.describe`, shape (M, 52).
        move: The move that was made, in scheduled learning rates, shape (M, 8).
        credit: Derivative of the objective (`CreditConfig`) by the move, shape (M, 8): the move should have gone
            against it.
        curvature: Second derivative of the objective by each number of the move, as that of a lone Gaussian, (M, 8).
        loss: 0.7 L1 + 0.3 (1 - SSIM) before every update and after the last, float64.
        psnr: The same in dB.
    """

    update: Tensor
    features: Tensor
    move: Tensor
    credit: Tensor
    curvature: Tensor
    loss: np.ndarray
    psnr: np.ndarray

    def __len__(self) -> int:
        return len(self.update)


def roll_out(
    image: Tensor,
    rule: UpdateRule,
    num_gaussians: int,
    config: OptimizeConfig,
    *,
    growth: GrowthConfig | None = None,
    credit: CreditConfig | None = None,
    fraction: float = 1.0,
    seed: int = 0,
) -> RollOut:
    """Fits Gaussians to an image by a rule, and records samples of its updates.

    Args:
        image: Shape (3, height, width), values in [0, 1]. Float32 on the CPU is drawn by the compiled kernels.
        rule: Makes the moves.
        num_gaussians: The budget, at least 1.
        config: Steps, rates and schedule; its rule is not used.
        growth: How the fit grows.
        credit: How later losses count.
        fraction: Fraction of the Gaussians, drawn anew at every update, that is recorded.
        seed: Of the sample.

    Example:
        >>> from air.optimization.rule import Adam
        >>> image = torch.linspace(0, 1, 16).expand(3, 16, 16).contiguous()
        >>> result = roll_out(image, Adam(0.0), 20, OptimizeConfig(steps=6))
        >>> result.features.shape[1], len(result.loss)
        (52, 7)
    """
    growth, credit = growth or GrowthConfig(), credit or CreditConfig()
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    _, height, width = image.shape
    patch_size = largest_grid(height, width, max(1, int(num_gaussians * growth.start_fraction)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), Workers(1) as workers:
        recorder = _Recorder(image, rule, patch_size, workers, fraction, generator)
        grow(image, num_gaussians, config.steps, patch_size, growth, config, recorder, recorder.draw)
        recorder.end()
    return recorder.result(credit)


class _Update(NamedTuple):
    """What one update leaves: the slope of the log loss for all Gaussians before it, and the samples."""

    slope: Tensor  # (N, 8)
    rates: Tensor  # (8,), scheduled
    chosen: Tensor  # indices of the samples
    features: Tensor
    move: Tensor
    curvature: Tensor


class _Recorder:
    """The phases of a fit by a rule in torch."""

    def __init__(
        self,
        target: Tensor,
        rule: UpdateRule,
        patch_size: int,
        workers: Workers,
        fraction: float,
        generator: torch.Generator,
    ) -> None:
        self._target, self._rule, self._patch_size, self._workers = target, rule, patch_size, workers
        self._fraction, self._generator = fraction, generator
        self._reuse = Reuse()
        self._updates: list[_Update] = []
        self._kept: dict[int, Tensor] = {}  # by number of update: where the Gaussians before it lie at it
        self._loss: list[float] = []
        self._psnr: list[float] = []
        self._last: tuple[Callable[[Tensor], tuple[Tensor, float, float]], Tensor] | None = None
        self._last_slope = torch.empty(0)

    def draw(self, raw: Tensor, anchor: Tensor) -> Tensor:
        _, height, width = self._target.shape
        return render(activate(raw, anchor, self._patch_size), height, width)

    def __call__(
        self, raw: Tensor, anchor: Tensor, moments: Moments, config: OptimizeConfig, kept: Tensor
    ) -> tuple[Tensor, Moments]:
        """As `air.fitting.grow.Phase`."""
        self._kept[len(self._updates)] = kept
        gradient_at = _gradient_source(raw, anchor, self._target, self._patch_size, config, self._workers, self._reuse)
        size = self._target.numel()
        for step in range(config.steps):
            gradient, loss, squared_error = gradient_at(raw)
            self._note(loss, squared_error)
            state, moments = observe(raw, gradient, moments, config, step, squared_error, self._patch_size, size)
            move = self._rule.move(state)
            rates = torch.from_numpy(config.learning_rates(step)).to(raw)
            self._updates.append(self._sampled(state, move, rates, loss))
            raw = raw + rates * move
        self._last = (gradient_at, raw)
        return raw, moments

    def end(self) -> None:
        """Takes the gradient of the last state."""
        assert self._last is not None
        gradient_at, raw = self._last
        gradient, loss, squared_error = gradient_at(raw)
        self._note(loss, squared_error)
        self._last_slope = gradient / loss

    def result(self, credit: CreditConfig) -> RollOut:
        """The samples, with the credit of each move."""
        ahead = torch.zeros_like(self._last_slope)  # the discounted slopes of later losses
        final = credit.final_weight * self._last_slope
        next_slope = self._last_slope
        credits: list[Tensor] = []
        for number in range(len(self._updates) - 1, -1, -1):
            update = self._updates[number]
            ahead = credit.discount * ahead + next_slope
            # The gradient after a growth is that of more Gaussians, in another order.
            kept = self._kept.get(number + 1)
            if kept is not None and len(update.slope) <= len(ahead):
                ahead, final = ahead[kept], final[kept]
            whole = (1 - credit.discount) * ahead + final
            credits.append(whole[update.chosen] * update.rates)
            next_slope = update.slope
        credits.reverse()
        columns = zip(*((u.features, u.move, u.curvature) for u in self._updates), strict=True)
        counts = torch.tensor([len(update.chosen) for update in self._updates], dtype=torch.int64)
        numbers = torch.arange(len(self._updates), dtype=torch.int32)
        shapes = (
            (OWN_FEATURES + SHARED_FEATURES,),
            (RAW_CHANNELS,),
            (RAW_CHANNELS,),
        )
        joined = [torch.cat(parts).cpu().float() for parts in columns] or [torch.empty(0, *shape) for shape in shapes]
        features, move, curvature = joined
        return RollOut(
            update=numbers.repeat_interleave(counts),
            features=features,
            move=move,
            credit=torch.cat([*credits, torch.empty(0, RAW_CHANNELS).to(self._last_slope)]).cpu().float(),
            curvature=curvature * (1 + credit.final_weight),
            loss=np.array(self._loss),
            psnr=np.array(self._psnr),
        )

    def _note(self, loss: float, squared_error: float) -> None:
        self._loss.append(loss)
        self._psnr.append(psnr_of(squared_error))

    def _sampled(self, state: State, move: Tensor, rates: Tensor, loss: float) -> _Update:
        count = len(state.raw)
        chosen = torch.arange(count)
        if self._fraction < 1:
            chosen = (torch.rand(count, generator=self._generator) < self._fraction).nonzero()[:, 0]
        chosen = chosen.to(state.raw.device)
        # The gradient is about that of half the squared error by this factor: see `air.optimization.rule`.
        per_value = L1_WEIGHT / (state.num_values * max(state.progress.rms_error, 1e-6))
        features, curvature = state.description
        curvature = curvature[chosen] * rates.square() * (per_value / loss)
        return _Update(state.gradient / loss, rates, chosen, features[chosen], move[chosen], curvature)


def _gradient_source(
    raw: Tensor,
    anchor: Tensor,
    target: Tensor,
    patch_size: int,
    config: OptimizeConfig,
    workers: Workers,
    reuse: Reuse,
) -> Callable[[Tensor], tuple[Tensor, float, float]]:
    """A function from raw Gaussians to the gradient (N, 8), the loss, and the squared error of the clamped picture."""
    _, height, width = target.shape
    if has_cpu_kernels(raw):
        from air.optimization.cpu import FusedBuffers, FusedOptimizer

        reuse.buffers = reuse.buffers or FusedBuffers(target.numpy(), workers)
        arrays = (raw.numpy(), anchor.numpy(), target.numpy(), patch_size, None)
        state = FusedOptimizer(*arrays, workers, config, buffers=reuse.buffers)

        def compiled(raw: Tensor) -> tuple[Tensor, float, float]:
            state.drawing.set_rows(raw.numpy())
            values = state.evaluate()
            gradient = torch.from_numpy(state.raw_gradient()[:, : len(raw)].T.copy())
            return gradient, values.loss, values.squared_error

        return compiled
    last_error: Tensor | None = None

    def by_autograd(raw: Tensor) -> tuple[Tensor, float, float]:
        nonlocal last_error
        with torch.enable_grad():
            moving = raw.detach().requires_grad_()
            image = render(activate(moving, anchor, patch_size), height, width)
            loss = torch_loss(image, target)
            objective, last_error = descent_objective(image, target, loss, config.squared_fraction, last_error)
            (gradient,) = torch.autograd.grad(objective, moving)
        squared_error = (image.detach().clamp(0, 1) - target).square().mean()
        return gradient, float(loss.detach()), float(squared_error)

    return by_autograd
