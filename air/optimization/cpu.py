"""The compiled optimiser: the loop, its state, and one Adam step as a kernel (method.md section 5).

Adam's two moments are planar tables as the raw numbers are (`air.rendering.raw_cpu`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from air.compute.compile import LANES, KernelSet, kernel
from air.compute.planes import FloatArray, image_planes, pixels, table
from air.compute.simd import fma, load, splat, sqrt, store, where_ge
from air.compute.threads import Workers
from air.gaussians import RAW_CHANNELS
from air.loss.cpu import FusedLoss, LossValues, blur_target, sum_differences, sweep_loss
from air.loss.reference import L1_WEIGHT
from air.optimization.config import OptimizeConfig
from air.optimization.learned_cpu import AGE, BIAS_OF_MEAN, BIAS_OF_SQUARE, PackedRule, learned_step
from air.optimization.problem import Moments, Recorder, Reuse
from air.optimization.rule import LearnedRule
from air.rendering.cpu_kernels import ONE, ZERO, chain_to_parameters, derive_geometry, draw_runs, gather_runs, sweep
from air.rendering.raw_cpu import RawRaster, activate_raw, sigmoid_slope, slope_factors

f32 = np.float32


@kernel
def adam_step(
    raw, patch_size, mean, square, bias, gradient, rates, beta1, beta2, eps, opposed_fraction, age, first, end
):
    """Adam's update of Gaussians first .. end - 1, with a learning rate per row in `rates`.

    `age` counts the updates of every Gaussian, this one included, if all have had as many. It is 0 if they differ, as
    in a fit that added Gaussians on its way. Then `bias` has four rows: in the first two the bias of each Gaussian's
    moments towards zero, beta1 and beta2 to the power of its updates; in the last two the corrections that follow from
    it, which all rows of raw numbers need.

    Only `opposed_fraction` of an update against the present gradient is made. `gradient` is with respect to the
    parameters. The kernel multiplies it by the slopes of the activations itself, so that memory is read once.
    """
    row = raw.shape[1]
    keep1 = f32(beta1)
    keep2 = f32(beta2)
    kept = f32(opposed_fraction)
    correction = f32(1.0 / np.sqrt(1.0 - beta2**age)) if age else ONE
    if not age:
        for i in range(first, end, LANES):
            bias_of_mean = load(bias, i) * keep1
            bias_of_square = load(bias, row + i) * keep2
            store(bias, i, bias_of_mean)
            store(bias, row + i, bias_of_square)
            store(bias, 2 * row + i, splat(ONE) / (splat(ONE) - bias_of_mean))
            store(bias, 3 * row + i, splat(ONE) / sqrt(splat(ONE) - bias_of_square))
    for k in range(RAW_CHANNELS):
        a, b = slope_factors(k, patch_size)
        rate = f32(-rates[k] / (1.0 - beta1**age)) if age else f32(-rates[k])
        for j in range(first, end, LANES):
            i = k * row + j
            old = load(raw, i)
            slope = load(gradient, i) * (sigmoid_slope(old * a) * b)
            new_mean = fma(load(mean, i), keep1, slope * (ONE - keep1))
            new_square = fma(load(square, i), keep2, slope * slope * (ONE - keep2))
            store(mean, i, new_mean)
            store(square, i, new_square)
            if age:
                scale = splat(ONE) / fma(sqrt(new_square), correction, f32(eps))
            else:
                scale = load(bias, 2 * row + j) / fma(sqrt(new_square), load(bias, 3 * row + j), splat(f32(eps)))
            scale = where_ge(new_mean * slope, ZERO, scale, scale * kept)
            store(raw, i, fma(new_mean * rate, scale, old))


class FusedBuffers:
    """Images that optimisations of one target use one after another.

    Attributes:
        loss: The loss against the target.
        image: Planes of the picture.
    """

    def __init__(self, target: FloatArray, workers: Workers) -> None:
        _, height, width = target.shape
        self.loss = FusedLoss(target, workers)
        self.image = image_planes(height, width)


class FusedOptimizer:
    """The state of one optimisation in the kernels' layout: raw numbers, Adam's moments, image and loss buffers.

    Call `evaluate`, then `update`, in turns. The step inside touches no torch and allocates no image.

    Args:
        raw: float32 (N, 8). anchor: float32 (N, 2), pixels.
        target: float32 (3, height, width).
        patch_size: Range of the activations in pixels.
        background: float32 (3, height, width), to which the Gaussians are added; None if it is black.
        workers: The threads to use.
        config: Rates, schedule and update rule.
        moments: Adam's moments to go on from; None: those of Gaussians that had no update.
        buffers: Those of this target, if there are any yet.

    Attributes:
        drawing: The present Gaussians.
        loss: The loss against the target.
    """

    def __init__(
        self,
        raw: FloatArray,
        anchor: FloatArray,
        target: FloatArray,
        patch_size: int,
        background: FloatArray | None,
        workers: Workers,
        config: OptimizeConfig,
        moments: Moments | None = None,
        buffers: FusedBuffers | None = None,
    ) -> None:
        self.config = config
        _, height, width = target.shape
        self.drawing = RawRaster(anchor, height, width, patch_size, workers)
        self.drawing.set_rows(raw)
        buffers = buffers or FusedBuffers(target, workers)
        self.loss, self.image = buffers.loss, buffers.image
        self.loss.begin(workers, config.squared_fraction)
        self._mean = table(RAW_CHANNELS, len(raw))
        self._square = table(RAW_CHANNELS, len(raw))
        self._age = np.zeros(len(raw), np.int32)
        if moments is not None:
            self._mean[:, : len(raw)] = moments.mean.numpy().T
            self._square[:, : len(raw)] = moments.square.numpy().T
            self._age[:] = moments.age.numpy()
        self._is_of_one_age = len(raw) > 0 and bool((self._age == self._age[0]).all())
        self._bias = table(5, 0) if self._is_of_one_age and config.learned is None else self._bias_table()
        self._learned = None if config.learned is None else PackedRule(config.learned)
        self._squared_error = 0.0
        self.background = None
        if background is not None and background.any():
            self.background = image_planes(height, width)
            pixels(self.background, height, width)[:] = background

    def draw(self) -> None:
        """Draws the present state."""
        self.drawing.draw(self.image, self.background)

    def evaluate(self) -> LossValues:
        """Draws the present state; returns its loss and leaves the loss's gradient for `update`."""
        self.draw()
        values = self.loss.evaluate(self.image)
        self._squared_error = values.squared_error
        return values

    def raw_gradient(self) -> FloatArray:
        """The table of the loss's gradient with respect to raw numbers, from what `evaluate` left."""
        return self.drawing.raw_gradient(self.loss.gradient)

    def update(self, step: int) -> None:
        """Update number `step` of the configuration, from the gradient that `evaluate` left."""
        config, raster = self.config, self.drawing.raster
        rates = config.learning_rates(step)
        learned = config.learned_at(step) is not None
        self._age += 1
        move = self._learned_update(step, rates) if learned else self._adam_update(rates)

        def gather_and_move(first: int, end: int) -> None:
            # Range by range, so that the gradient may still be in the cache when the rule reads it.
            raster.gather_range(self.loss.gradient, first, end)
            move(first, end)

        raster.workers.run(gather_and_move, raster.ranges)

    def _adam_update(self, rates: NDArray[np.float64]) -> Callable[[int, int], None]:
        config, drawing = self.config, self.drawing
        age = int(self._age[0]) if self._is_of_one_age else 0

        def move(first: int, end: int) -> None:
            adam_step(
                drawing.raw,
                drawing.patch_size,
                self._mean,
                self._square,
                self._bias,
                drawing.raster.gradient,
                rates,
                config.beta1,
                config.beta2,
                config.eps,
                config.opposed_fraction,
                age,
                first,
                end,
            )

        return move

    def _learned_update(self, step: int, rates: NDArray[np.float64]) -> Callable[[int, int], None]:
        config, drawing, learned = self.config, self.drawing, self._learned
        assert learned is not None
        progress = config.progress(step, self._squared_error)
        learned.set_progress(progress, drawing.patch_size)
        count = 3 * self.loss.height * self.loss.width / L1_WEIGHT
        first_rates = config.first_learning_rates()

        def move(first: int, end: int) -> None:
            learned_step(
                drawing.raw,
                drawing.patch_size,
                drawing.raster.parameters,
                self._mean,
                self._square,
                self._bias,
                drawing.raster.gradient,
                learned.weights,
                learned.biases,
                -count * progress.rms_error,
                count,
                first_rates,
                rates,
                config.beta1,
                config.beta2,
                config.eps,
                first,
                end,
            )

        return move

    def _bias_table(self) -> FloatArray:
        """The table of biases (`air.optimization.learned_cpu`) of Gaussians of these ages."""
        count = len(self._age)
        bias = table(5, count)
        age = self._age.astype(np.float64)
        bias[BIAS_OF_MEAN, :count] = self.config.beta1**age
        bias[BIAS_OF_SQUARE, :count] = self.config.beta2**age
        bias[AGE, :count] = age
        return bias

    def moments(self) -> Moments:
        """Adam's moments after the updates so far."""
        count = len(self._age)
        mean, square = (torch.from_numpy(rows[:, :count].T.copy()) for rows in (self._mean, self._square))
        return Moments(mean, square, torch.from_numpy(self._age.copy()))

    def raw_rows(self) -> FloatArray:
        """The raw numbers, shape (N, 8)."""
        return self.drawing.rows()


def optimize_cpu(
    raw: Tensor,
    anchor: Tensor,
    target: Tensor,
    patch_size: int,
    config: OptimizeConfig,
    background: Tensor | None,
    moments: Moments,
    threads: int,
    recorder: Recorder,
    reuse: Reuse | None = None,
) -> tuple[Tensor, Moments]:
    """The optimised raw Gaussians and their moments; arguments as for `air.optimization.optimize.optimize`, checked."""
    with Workers(threads) as workers:
        reuse = reuse or Reuse()
        _, height, width = target.shape
        reuse.buffers = reuse.buffers or FusedBuffers(target.numpy(), workers)
        black = None if background is None else background.numpy()
        arrays = (raw.numpy(), anchor.numpy(), target.numpy(), patch_size, black)
        state = FusedOptimizer(*arrays, workers, config, moments, reuse.buffers)
        for step in range(config.steps):
            values = state.evaluate()
            recorder.add(values.loss, values.squared_error)
            state.update(step)
        if recorder.wants(config.steps):
            values = state.evaluate()
            recorder.add(values.loss, values.squared_error)
        else:
            state.draw()
        reuse.picture = torch.from_numpy(pixels(state.image, height, width))
        return torch.from_numpy(state.raw_rows()), state.moments()


def _use_each() -> None:
    raw, anchor, target = (np.zeros(shape, np.float32) for shape in ((1, RAW_CHANNELS), (1, 2), (3, 1, 1)))
    learned = LearnedRule()
    config = OptimizeConfig(
        steps=2, beta1=learned.beta1, beta2=learned.beta2, squared_fraction=1.0, learned=learned, learned_steps=1
    )
    state = FusedOptimizer(raw, anchor, target, 1, target, Workers(1), config)
    for step in range(config.steps):
        state.evaluate()
        state.update(step)
    state.raw_rows()


KERNELS = KernelSet(
    (
        activate_raw,
        adam_step,
        learned_step,
        derive_geometry,
        draw_runs,
        gather_runs,
        sweep,
        chain_to_parameters,
        blur_target,
        sum_differences,
        sweep_loss,
    ),
    _use_each,
    seconds=6,
)
"""Every kernel of an optimisation."""
