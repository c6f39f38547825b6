"""The optimiser on CUDA: a ragged batch of images, every step four kernels, replayed as CUDA graphs.

A step draws (`air.rendering.cuda_kernels`) and differentiates the loss (two kernels of `air.loss.cuda`). The fourth
kernel gathers each Gaussian's gradient, multiplies it by the slopes of the activations, makes Adam's update and
activates the result for the next step (method.md sections 2 and 5). With a learned rule two kernels take its place:
one gathers, and one makes the update (`air.optimization.rule_cuda`). All buffers are allocated once. A run needs
nothing from the host: a table on the device holds the learning rates of every step, and kernels read the row that a
clock points to, which the drawing kernel advances. The bias of each Gaussian's moments lies beside the moments. Losses
are summed into a table in the same way. The host fetches them at the end, or on request.

Tables of Gaussians are float32 (N, 8), all images' one after another. Importing this module needs triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from air.compute.launch import launch, selected
from air.compute.ragged import RaggedImages
from air.gaussians import RAW_CHANNELS
from air.loss.cuda import SUMS, BatchLoss
from air.optimization.config import OptimizeConfig
from air.optimization.cuda_kernels import activate_raw, gather_and_step
from air.optimization.problem import Moments, Problem, Recorder, naming_image
from air.optimization.rule_cuda import LEARNED_BLOCK, RuleTables, learned_step
from air.rendering.cuda import BLOCKS, launch_draw
from air.rendering.cuda_kernels import gather
from air.rendering.parameters import OFF_IMAGE

GRAPH_STEPS = 20
"""Steps in one CUDA graph: enough that starting a graph costs little beside its steps."""

_BLOCK = 64  # Gaussians per program of `activate_raw`


class BatchOptimizer:
    """Updates of the raw Gaussians of several images at once; images may differ in size and number of Gaussians.

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
        self._learned = RuleTables.of(config, self.patch_size, self._raw)
        self._clock = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._sums = torch.zeros(config.steps + 1, len(problems), SUMS, dtype=torch.float64, device=self.device)
        black = [torch.zeros_like(problem.target) for problem in problems]
        canvases = [empty if p.canvas is None else p.canvas for p, empty in zip(problems, black, strict=True)]
        self._background = self.layout.pack(canvases)
        self._image = self.layout.buffer()
        # Kept, so that it is not freed while the device still runs it.
        self._graph: torch.cuda.CUDAGraph | None = None
        with selected(self.device):
            self._loss = BatchLoss(self.layout, [problem.target for problem in problems], config.squared_fraction)

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
        if self.config.squared_fraction:
            self._draw()
            self._loss.measure_first_errors(self._image, self._background, self._sums, self._clock)
            self._clock.zero_()

    def evaluate(self) -> None:
        """Launches three kernels: drawing, and the two of the loss and its gradient."""
        self._draw()
        self._loss.evaluate(self._image, self._background, self._sums, self._clock)

    def _draw(self) -> None:
        """Adds the Gaussians to the image, and 1 to the clock."""
        launch_draw(self._parameters, self._image_of, self.layout, self._image, self._clock)

    def update(self) -> None:
        """Launches the kernel of one update with Adam, or the two with a learned rule, from what `evaluate` left."""
        if self._learned is None:
            self._update_with_adam()
        else:
            self._update_with_learned_rule(self._learned)

    def _update_with_adam(self) -> None:
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

    def _update_with_learned_rule(self, tables: RuleTables) -> None:
        table = self.layout.table
        gradient = tables.gradient
        launch(
            gather,
            len(self._raw),
            self._parameters,
            self._image_of,
            table,
            self._loss.gradient,
            gradient,
            **BLOCKS,
        )
        config = self.config
        launch(
            learned_step,
            triton.cdiv(len(self._raw), LEARNED_BLOCK),
            self._raw,
            self._mean,
            self._square,
            self._bias,
            self._first_moments.age,
            self._anchor,
            self.patch_size,
            self._parameters,
            self._image_of,
            table,
            len(self.layout.sizes),
            gradient,
            self._rates,
            tables.first_rates,
            tables.first_biases,
            tables.weights,
            tables.updates,
            config.beta1,
            config.beta2,
            config.eps,
            config.opposed_fraction,
            self._sums,
            self._clock,
            len(self._raw),
            BLOCK=LEARNED_BLOCK,
            warps=1,
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
