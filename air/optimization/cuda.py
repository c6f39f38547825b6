"""The optimiser on CUDA: a ragged batch of images, every step four kernels, replayed as CUDA graphs.

A step draws (`air.rendering.cuda_kernels`) and differentiates the loss (two kernels of `air.loss.cuda`). The fourth
kernel gathers each Gaussian's gradient, multiplies it by the slopes of the activations, makes Adam's update and
activates the result for the next step (method.md sections 2 and 5). All buffers are allocated once. A run needs nothing
from the host: a table on the device holds the learning rates of every step, and kernels read the row that a clock
points to, which the drawing kernel advances. The bias of each Gaussian's moments lies beside the moments. Losses are
summed into a table in the same way. The host fetches them at the end, or on request.

Tables of Gaussians are float32 (N, 8), all images' one after another. Importing this module needs triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from air.compute.launch import launch, selected
from air.compute.ragged import IMAGE_COLUMNS, RaggedImages
from air.gaussians import MIN_RAW_SCALE, RAW_CHANNELS
from air.loss.cuda import SUMS, BatchLoss
from air.optimization.config import OptimizeConfig
from air.optimization.problem import Moments, Problem, Recorder, naming_image
from air.rendering.cuda import BLOCKS, launch_draw
from air.rendering.cuda_kernels import COLOUR, HALF_TURNS, PARAMETERS, SCALE_1, gather_gradient
from air.rendering.parameters import OFF_IMAGE

GRAPH_STEPS = 20
"""Steps in one CUDA graph: enough that starting a graph costs little beside its steps."""

_BLOCK = 64  # Gaussians per program of `activate_raw`
_MIN_SCALE = tl.constexpr(MIN_RAW_SCALE)
_TWO_PI = tl.constexpr(2 * math.pi)


@triton.jit
def activate_channels(raw, anchor, patch_size, channel):
    """(parameter, slope) of raw numbers in their channels, of any shape (method.md section 2).

    `anchor` is the anchor's coordinate in the channels of the centre and 0 elsewhere. The slope is the derivative of
    the parameter by the raw number, with the angle in radians.
    """
    is_tanh = (channel < SCALE_1) | (channel >= COLOUR)
    # tanh(u) = 2 σ(2u) - 1
    sigmoid = tl.sigmoid(tl.where(is_tanh, 2 * raw, raw))
    # σ (1 - σ) = e/(1 + e)² with e = exp(-|u|), which neither cancels nor overflows.
    e = tl.exp(-tl.abs(tl.where(is_tanh, 2 * raw, raw)))
    bell = e / ((1 + e) * (1 + e))
    reach = tl.where(channel < HALF_TURNS, patch_size, tl.where(channel == HALF_TURNS, _TWO_PI, 1.0))
    slope = tl.where(is_tanh, 4 * bell, bell) * reach
    # The angle is 2 σ half turns; whole half turns change nothing.
    turns = 2 * sigmoid
    turns = turns - tl.floor(turns + 0.5)
    parameter = tl.where(is_tanh, reach * (2 * sigmoid - 1) + anchor, reach * sigmoid + _MIN_SCALE)
    return tl.where(channel == HALF_TURNS, turns, parameter), slope


@triton.jit
def load_anchor(anchors, gaussian, channel, exists):
    """The anchor's coordinate in the channels of the centre, 0 in the others."""
    return tl.load(anchors + gaussian * 2 + channel, mask=exists & (channel < SCALE_1), other=0.0)


@triton.jit
def activate_raw(raw, anchors, patch_size, parameters, count, BLOCK: tl.constexpr):
    """The parameters of `count` raw Gaussians; each program computes BLOCK of them."""
    gaussian = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    channel = tl.arange(0, PARAMETERS)[None, :]
    exists = gaussian < count
    place = gaussian * PARAMETERS + channel
    anchor = load_anchor(anchors, gaussian, channel, exists)
    parameter, _ = activate_channels(tl.load(raw + place, mask=exists, other=0.0), anchor, patch_size, channel)
    tl.store(parameters + place, parameter, mask=exists)


@triton.jit
def gather_and_step(
    raw,
    mean,
    square,
    bias,
    anchors,
    patch_size,
    parameters,
    image_of,
    images,
    gradient,
    rates,
    beta1,
    beta2,
    eps,
    opposed_fraction,
    clock,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adam's update of raw Gaussian number program_id from the images' gradient, and its new parameters."""
    gaussian = tl.program_id(0)
    image = images + tl.load(image_of + gaussian) * IMAGE_COLUMNS
    by_parameter = gather_gradient(parameters + gaussian * PARAMETERS, image, gradient, ROWS, COLUMNS)
    channel = tl.arange(0, PARAMETERS)
    place = gaussian * PARAMETERS + channel
    anchor = load_anchor(anchors, gaussian, channel, channel >= 0)
    value = tl.load(raw + place)
    _, slope = activate_channels(value, anchor, patch_size, channel)
    by_raw = by_parameter * slope
    new_mean = beta1 * tl.load(mean + place) + (1 - beta1) * by_raw
    new_square = beta2 * tl.load(square + place) + (1 - beta2) * by_raw * by_raw
    # The bias of the moments towards zero: beta to the power of the updates that this Gaussian has had.
    bias_of_mean = beta1 * tl.load(bias + gaussian * 2)
    bias_of_square = beta2 * tl.load(bias + gaussian * 2 + 1)
    corrected_mean = new_mean / (1 - bias_of_mean)
    corrected_square = new_square / (1 - bias_of_square)
    rate = tl.load(rates + (tl.load(clock) - 1) * PARAMETERS + channel)
    kept = tl.where(new_mean * by_raw < 0, opposed_fraction, 1.0)
    value -= kept * rate * corrected_mean / (tl.sqrt(corrected_square) + eps)
    parameter, _ = activate_channels(value, anchor, patch_size, channel)
    tl.store(mean + place, new_mean)
    tl.store(square + place, new_square)
    tl.store(bias + gaussian * 2, bias_of_mean)
    tl.store(bias + gaussian * 2 + 1, bias_of_square)
    tl.store(raw + place, value)
    tl.store(parameters + place, parameter)


class BatchOptimizer:
    """Adam on the raw Gaussians of several images at once; images may differ in size and number of Gaussians.

    - The constructor allocates and fills all buffers on the device of the problems.
    - `run` launches all steps of the configuration, from the start, without waiting for the device.
    - Then read `raw` and `trajectories`, which wait for the device.

    Args:
        problems: At least one; float32, all on one device that the kernels run on.
        patch_size: Range of the activations in pixels.
        config: Steps, rates and schedule, the same for all.

    Attributes:
        raw: One tensor (N, 8) per problem.
    """

    def __init__(self, problems: Sequence[Problem], patch_size: int, config: OptimizeConfig) -> None:
        self.config = config
        self.device = problems[0].target.device
        self.patch_size = float(patch_size)
        self.layout = RaggedImages([(p.target.shape[1], p.target.shape[2]) for p in problems], self.device)
        # The clock advances in a kernel over Gaussians, which needs at least one: this one ends every batch.
        stand_in = torch.full((1, 2), OFF_IMAGE, device=self.device)
        numbers = [len(problem.raw) for problem in problems]
        self._raw = torch.cat([*(p.raw for p in problems), torch.zeros(1, RAW_CHANNELS, device=self.device)])
        self._anchor = torch.cat([*(p.anchor for p in problems), stand_in])
        image_of = np.repeat(np.arange(len(problems), dtype=np.int32), numbers)
        self._image_of = torch.from_numpy(np.append(image_of, np.int32(0))).to(self.device)
        self.raw = self._raw[:-1].split(numbers)
        moments = [Moments.fresh(p.raw) if p.moments is None else p.moments for p in problems]
        self._numbers = numbers
        self._first_moments = Moments.concatenate([*moments, Moments.fresh(self._raw[:1])])
        self._first_bias = bias_of(self._first_moments.age, config)
        self._start = self._raw.clone()
        self._mean = torch.zeros_like(self._raw)
        self._square = torch.zeros_like(self._raw)
        self._bias = torch.zeros_like(self._first_bias)
        self._parameters = torch.zeros_like(self._raw)
        self._rates = torch.from_numpy(rate_table(config)).to(self.device)
        self._clock = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._sums = torch.zeros(config.steps + 1, len(problems), SUMS, dtype=torch.float64, device=self.device)
        black = [torch.zeros_like(problem.target) for problem in problems]
        canvases = [empty if p.canvas is None else p.canvas for p, empty in zip(problems, black, strict=True)]
        self._background = self.layout.pack(canvases)
        self._image = self.layout.buffer()
        # Kept, so that it is not freed while the device still runs it.
        self._graph: torch.cuda.CUDAGraph | None = None
        with selected(self.device):
            self._loss = BatchLoss(self.layout, [problem.target for problem in problems])

    def reset(self) -> None:
        """Back to the start of the run."""
        self._raw.copy_(self._start)
        self._mean.copy_(self._first_moments.mean)
        self._square.copy_(self._first_moments.square)
        self._bias.copy_(self._first_bias)
        self._clock.zero_()
        self._sums.zero_()
        self._image.copy_(self._background)
        count = len(self._raw)
        blocks = triton.cdiv(count, _BLOCK)
        launch(activate_raw, blocks, self._raw, self._anchor, self.patch_size, self._parameters, count, BLOCK=_BLOCK)

    def evaluate(self) -> None:
        """Launches three kernels: drawing, and the two of the loss and its gradient."""
        launch_draw(self._parameters, self._image_of, self.layout, self._image, self._clock)
        self._loss.evaluate(self._image, self._background, self._sums, self._clock)

    def update(self) -> None:
        """Launches the kernel of one update, from what `evaluate` left."""
        config = self.config
        launch(
            gather_and_step,
            len(self._raw),
            self._raw,
            self._mean,
            self._square,
            self._bias,
            self._anchor,
            self.patch_size,
            self._parameters,
            self._image_of,
            self.layout.table,
            self._loss.gradient,
            self._rates,
            config.beta1,
            config.beta2,
            config.eps,
            config.opposed_fraction,
            self._clock,
            **BLOCKS,
        )

    def run(self, on_launched: Callable[[int, int], None] | None = None) -> None:
        """Launches all steps, and the loss of the last state.

        Args:
            on_launched: Called with (first, last) when the steps for the entries [first, last) of the trajectory are
                launched: after every GRAPH_STEPS steps, and at the end.
        """
        steps = self.config.steps
        with selected(self.device):
            if self._graph is None and self.device.type == "cuda" and steps >= GRAPH_STEPS:
                self._graph = self._capture()
            self.reset()
            done = 0
            while done < steps:
                count = min(GRAPH_STEPS, steps - done)
                if self._graph is not None and count == GRAPH_STEPS:
                    self._graph.replay()
                else:
                    for _ in range(count):
                        self.evaluate()
                        self.update()
                if on_launched is not None:
                    on_launched(done, done + count)
                done += count
            self.evaluate()
            if on_launched is not None:
                on_launched(steps, steps + 1)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """A graph of GRAPH_STEPS steps."""
        # A first run compiles and loads the kernels, which is not allowed during a capture.
        self.reset()
        self.evaluate()
        self.update()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        # `with torch.cuda.graph(graph)` would also collect garbage and empty the cache of device memory, which may take
        # longer than the steps. Nothing here allocates, so neither is needed. Other threads may use the GPU meanwhile.
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            for _ in range(GRAPH_STEPS):
                self.evaluate()
                self.update()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph

    def moments(self) -> list[Moments]:
        """Adam's moments of each problem after all steps."""
        parts = (self._mean[:-1], self._square[:-1], self._first_moments.age[:-1] + self.config.steps)
        columns = zip(*(part.split(self._numbers) for part in parts), strict=True)
        return [Moments(mean.clone(), square.clone(), age) for mean, square, age in columns]

    def trajectories(self, first: int = 0, last: int | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(loss, mean squared error of the clamped image) after every number of updates, each (updates, images).

        All steps + 1 entries, or the entries [first, last). Waits for the device.
        """
        loss, squared_error = self._loss.values(self._sums[first:last])
        return loss.cpu().numpy(), squared_error.cpu().numpy()


def bias_of(age: Tensor, config: OptimizeConfig) -> Tensor:
    """The bias towards zero of the two moments of Gaussians that had `age` (N,) updates, float32 (N, 2)."""
    betas = torch.tensor([config.beta1, config.beta2], dtype=torch.float64, device=age.device)
    return (betas ** age[:, None]).to(torch.float32)


def rate_table(config: OptimizeConfig) -> NDArray[np.float32]:
    """The learning rates of update number k in row k, (max(steps, 1), 8)."""
    table = np.zeros((max(config.steps, 1), RAW_CHANNELS), np.float32)
    for step in range(config.steps):
        table[step] = config.learning_rates(step)
    return table


def optimize_cuda(
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
    """The optimised raw Gaussians of one image and their moments: a batch of one.

    Arguments are as for `air.optimization.optimize.optimize`, checked. `threads` is not used.
    """
    return optimize_batch_cuda([Problem(raw, anchor, target, background, moments)], patch_size, config, [recorder])[0]


def optimize_batch_cuda(
    problems: Sequence[Problem], patch_size: int, config: OptimizeConfig, recorders: Sequence[Recorder]
) -> list[tuple[Tensor, Moments]]:
    """The optimised raw Gaussians and moments of problems whose tensors were checked; trajectories go to the recorders.

    Raises:
        NonFiniteLossError: As `air.optimization.optimize.optimize_batch`.
    """
    state = BatchOptimizer(problems, patch_size, config)

    def record(first: int, last: int) -> None:
        losses, squared_errors = state.trajectories(first, last)
        for image, recorder in enumerate(recorders):
            with naming_image(image):
                for loss, squared_error in zip(losses[:, image], squared_errors[:, image], strict=True):
                    recorder.add(float(loss), float(squared_error))

    if any(recorder.on_step for recorder in recorders):
        state.run(record)
    else:  # nothing waits for the device before the end
        state.run()
        record(0, config.steps + 1)
    return [(raw.clone(), moments) for raw, moments in zip(state.raw, state.moments(), strict=True)]
