"""The compact predictor's trunk on a CPU, outside training: compiled kernels for the layers that torch is slow at.

In torch the depthwise convolution, the norm and the activation take most of the time, although they do the least
arithmetic. Here convolution and norm are one sweep, four pixels at a time, so that each weight is loaded once for four
pixels. Matrix products stay torch's. Values differ from torch's in rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from air.compute.backends import has_cpu_kernels
from air.compute.compile import LANES, inline, kernel
from air.compute.planes import FloatArray
from air.compute.simd import exp, fma, lane_sum, load, splat, sqrt, store
from air.compute.threads import Workers

f32 = np.float32
ZERO, ONE = f32(0), f32(1)

_REACH = 2  # of the 5 x 5 convolution
_TAPS = 2 * _REACH + 1
_TOGETHER = 4  # pixels of a row that are convolved together
_ROWS_TOGETHER = 8  # rows of each thread: 112 x 8 patches with 3 x 64 hidden channels are 0.7 MB
_MARGIN = _REACH + _TOGETHER - 1  # columns read to the right of a pixel

# GELU by tanh: x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))), and (1 + tanh(u))/2 is 1/(1 + exp(-2u)).
_GELU_1 = f32(-2 * np.sqrt(2 / np.pi))
_GELU_3 = f32(-2 * np.sqrt(2 / np.pi) * 0.044715)


class Block(Protocol):
    """The layers of a block of the trunk."""

    mix: nn.Conv2d
    norm: nn.LayerNorm
    widen: nn.Linear
    narrow: nn.Linear


@inline
def _normalise(out, at, channels, scale, shift, eps):
    """Layer norm of the `channels` numbers from `at`, in place."""
    total = splat(ZERO)
    for k in range(0, channels, LANES):
        total = total + load(out, at + k)
    mean = splat(f32(lane_sum(total) / channels))
    total = splat(ZERO)
    for k in range(0, channels, LANES):
        distance = load(out, at + k) - mean
        total = fma(distance, distance, total)
    factor = splat(ONE) / sqrt(splat(f32(lane_sum(total) / channels)) + f32(eps))
    for k in range(0, channels, LANES):
        store(out, at + k, fma((load(out, at + k) - mean) * factor, load(scale, k), load(shift, k)))


@kernel
def mix_and_normalise(padded, weights, bias, scale, shift, eps, out, first, end):
    """Depthwise 5 x 5 convolution and layer norm of rows first .. end - 1.

    `padded` is (rows + 4, columns + margin, C) with zeros around the features, `weights` (25, C), `out`
    (rows, columns rounded up to 4, C); C is a multiple of LANES.
    """
    stride, channels = padded.shape[1] * padded.shape[2], padded.shape[2]
    columns = out.shape[1]
    for row in range(first, end):
        for column in range(0, columns, 4):
            at = (row * columns + column) * channels
            for k in range(0, channels, LANES):
                sum0 = load(bias, k)
                sum1 = sum0
                sum2 = sum0
                sum3 = sum0
                for i in range(5):
                    source = (row + i) * stride + column * channels + k
                    tap = i * 5 * channels + k
                    x0 = load(padded, source)
                    x1 = load(padded, source + channels)
                    x2 = load(padded, source + 2 * channels)
                    x3 = load(padded, source + 3 * channels)
                    x4 = load(padded, source + 4 * channels)
                    x5 = load(padded, source + 5 * channels)
                    x6 = load(padded, source + 6 * channels)
                    x7 = load(padded, source + 7 * channels)
                    weight = load(weights, tap)
                    sum0 = fma(x0, weight, sum0)
                    sum1 = fma(x1, weight, sum1)
                    sum2 = fma(x2, weight, sum2)
                    sum3 = fma(x3, weight, sum3)
                    weight = load(weights, tap + channels)
                    sum0 = fma(x1, weight, sum0)
                    sum1 = fma(x2, weight, sum1)
                    sum2 = fma(x3, weight, sum2)
                    sum3 = fma(x4, weight, sum3)
                    weight = load(weights, tap + 2 * channels)
                    sum0 = fma(x2, weight, sum0)
                    sum1 = fma(x3, weight, sum1)
                    sum2 = fma(x4, weight, sum2)
                    sum3 = fma(x5, weight, sum3)
                    weight = load(weights, tap + 3 * channels)
                    sum0 = fma(x3, weight, sum0)
                    sum1 = fma(x4, weight, sum1)
                    sum2 = fma(x5, weight, sum2)
                    sum3 = fma(x6, weight, sum3)
                    weight = load(weights, tap + 4 * channels)
                    sum0 = fma(x4, weight, sum0)
                    sum1 = fma(x5, weight, sum1)
                    sum2 = fma(x6, weight, sum2)
                    sum3 = fma(x7, weight, sum3)
                store(out, at + k, sum0)
                store(out, at + channels + k, sum1)
                store(out, at + 2 * channels + k, sum2)
                store(out, at + 3 * channels + k, sum3)
            for pixel in range(4):
                _normalise(out, at + pixel * channels, channels, scale, shift, eps)


@kernel
def add_and_activate(values, bias, first, end):
    """Adds the bias to rows first .. end - 1 of `values`, whose width is a multiple of LANES; then GELU by tanh."""
    width = values.shape[1]
    for row in range(first, end):
        for k in range(0, width, LANES):
            x = load(values, row * width + k) + load(bias, k)
            minus = x * fma(x * x, _GELU_3, splat(_GELU_1))
            store(values, row * width + k, x / (exp(minus) + ONE))


@kernel
def add_to_stream(padded, added, bias, columns, out, first, end):
    """Sets pixels of rows first .. end - 1 of `out` to `padded` + `added` + bias.

    `padded` and `out` are (rows + 4, columns + margin, C), `added` (rows, columns rounded up to 4, C).
    """
    stride, channels = padded.shape[1] * padded.shape[2], padded.shape[2]
    for row in range(first, end):
        for column in range(columns):
            source = row * added.shape[1] * channels + column * channels
            target = (row + _REACH) * stride + (column + _REACH) * channels
            for k in range(0, channels, LANES):
                total = load(padded, target + k) + load(added, source + k) + load(bias, k)
                store(out, target + k, total)


def fits(features: Tensor) -> bool:
    """Whether the kernels take these features: no gradient, float32 on the CPU, channels in whole vectors."""
    return not torch.is_grad_enabled() and has_cpu_kernels(features) and features.shape[-1] % LANES == 0


class Trunk:
    """The blocks of a trunk, with buffers that all calls use, for features of one size.

    Args:
        blocks: The blocks, first to last.
        rows: Rows of the patch grid.
        columns: Columns of the patch grid.
        workers: CPU threads.
    """

    def __init__(self, blocks: Iterable[Block], rows: int, columns: int, workers: Workers) -> None:
        self._layers = [_Layers(block, columns, workers) for block in blocks]
        self._rows, self._columns = rows, columns
        channels, hidden = self._layers[0].widths
        self._streams = [torch.zeros(rows + 2 * _REACH, columns + _REACH + _MARGIN, channels) for _ in range(2)]
        self._together = min(rows, _ROWS_TOGETHER * workers.count)
        whole = -(-columns // _TOGETHER) * _TOGETHER
        self._mixed = torch.zeros(self._together, whole, channels)
        self._hidden = torch.empty(self._together * whole, hidden)
        self._added = torch.empty_like(self._mixed)

    def __call__(self, features: Tensor) -> Tensor:
        """The blocks' output for features (B, rows, columns, C) for which `fits` is true, of the same shape."""
        made = torch.empty_like(features)
        for image, out in zip(features, made, strict=True):
            out.copy_(self._run(image))
        return made

    def _run(self, features: Tensor) -> Tensor:
        """The output for one image, (rows, columns, C), which the next call overwrites.

        A few rows are computed at a time, so that they stay in a core's cache from layer to layer.
        """
        # A block reads rows above and below its output, so it writes to another buffer than it reads.
        given, made = self._streams
        inside = (slice(_REACH, _REACH + self._rows), slice(_REACH, _REACH + self._columns))
        given[inside] = features
        for layers in self._layers:
            for first in range(0, self._rows, self._together):
                count = min(self._together, self._rows - first)
                buffers = (self._mixed[:count], self._hidden[: count * self._mixed.shape[1]], self._added[:count])
                layers.run(given.numpy()[first:], *buffers, made.numpy()[first:])
            given, made = made, given
        return given[inside]


class _Layers:
    """A block's weights in the kernels' layout. Kernels add the biases: products without biases are faster."""

    def __init__(self, block: Block, columns: int, workers: Workers) -> None:
        assert block.mix.bias is not None
        self._taps = block.mix.weight.detach().reshape(-1, _TAPS * _TAPS).T.contiguous().numpy()
        self._norm = [tensor.detach().numpy() for tensor in (block.mix.bias, block.norm.weight, block.norm.bias)]
        self._eps = block.norm.eps
        self._widen, self._narrow = (layer.weight.detach().T.contiguous() for layer in (block.widen, block.narrow))
        self._widen_bias, self._narrow_bias = (layer.bias.detach().numpy() for layer in (block.widen, block.narrow))
        self._columns = columns
        self._workers = workers

    @property
    def widths(self) -> tuple[int, int]:
        """Channels, and hidden channels."""
        return self._widen.shape[0], self._widen.shape[1]

    def run(self, padded: FloatArray, mixed: Tensor, hidden: Tensor, added: Tensor, out: FloatArray) -> None:
        """Writes the block's output for the first rows of `padded` to `out`; `mixed` has that number of rows.

        `mixed` and `added`, (rows, columns rounded up to 4, C), and `hidden` are scratch.
        """
        rows = len(mixed)

        def mix(first: int, end: int) -> None:
            mix_and_normalise(padded, self._taps, *self._norm, self._eps, mixed.numpy(), first, end)

        def activate(first: int, end: int) -> None:
            add_and_activate(hidden.numpy(), self._widen_bias, first, end)

        def add(first: int, end: int) -> None:
            add_to_stream(padded, added.numpy(), self._narrow_bias, self._columns, out, first, end)

        self._divide(mix, rows)
        torch.mm(mixed.flatten(0, 1), self._widen, out=hidden)
        self._divide(activate, len(hidden))
        torch.mm(hidden, self._narrow, out=added.view(-1, added.shape[2]))
        self._divide(add, rows)

    def _divide(self, function: Callable[[int, int], None], size: int) -> None:
        self._workers.run(function, _parts(size, self._workers.count))


def _parts(size: int, parts: int) -> list[tuple[int, int]]:
    """0 .. size in equal parts, as (first, end)."""
    ends = [size * part // parts for part in range(parts + 1)]
    return [(first, end) for first, end in pairwise(ends) if end > first]
