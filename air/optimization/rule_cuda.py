"""The learned rule on CUDA: one kernel that describes blocks of Gaussians, runs the network and makes the update.

`air.optimization.rule` is the definition. Every Gaussian of a block takes part in three small matrix products, as
tensor cores make them: each factor is split into two tf32 numbers, which keeps about the precision of float32. The 52
features become 48 inputs. Nine of the ten that all Gaussians share depend on the step alone, so their part of the
first layer is a row of a table. The tenth, the error of the picture, is read where the loss's kernels summed it.

Importing this module needs triton.
"""

# triton's language has no types that a checker understands.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from air.compute.ragged import HEIGHT, IMAGE_COLUMNS, WIDTH
from air.gaussians import RAW_CHANNELS
from air.loss.cuda import SUM_SQUARES, SUMS
from air.loss.reference import L1_WEIGHT
from air.optimization import rule as definition
from air.optimization.config import OptimizeConfig
from air.optimization.cuda_kernels import activate_channels, load_anchor
from air.optimization.rule import HIDDEN, OWN_FEATURES, LearnedRule
from air.rendering.cuda_kernels import COLOUR, HALF_TURNS, PARAMETERS, SCALE_1, SCALE_2

LEARNED_BLOCK = 16
"""Gaussians per program of `learned_step`, which is one warp: the rows of the smallest product of tensor cores."""

_INPUTS = 6 * RAW_CHANNELS
"""Inputs of the network in the kernel: six groups of eight, of which the last has three that are used."""

# Columns of the last group of inputs.
_AGE, _STRETCH, _ERROR = (tl.constexpr(column) for column in range(3))

# Features by their place in `air.optimization.rule.describe`.
_BRIGHTNESS_FEATURE, _AGE_FEATURE, _STRETCH_FEATURE, _ERROR_FEATURE = 39, 40, 41, 49

_OUTPUTS = (definition.DIRECTIONS + 1) * RAW_CHANNELS
_HIDDEN = tl.constexpr(HIDDEN)
_SECOND = tl.constexpr(_INPUTS * HIDDEN)
_LAST = tl.constexpr(_INPUTS * HIDDEN + HIDDEN * HIDDEN)
_SECOND_BIAS = tl.constexpr(_INPUTS * HIDDEN + HIDDEN * HIDDEN + HIDDEN * _OUTPUTS)
_LAST_BIAS = tl.constexpr(_INPUTS * HIDDEN + HIDDEN * HIDDEN + HIDDEN * _OUTPUTS + HIDDEN)

_SUMS = tl.constexpr(SUMS)
_PI = tl.constexpr(math.pi)
_L1_WEIGHT = tl.constexpr(L1_WEIGHT)
_RIDGE, _MIN_SLOPE = tl.constexpr(definition.RIDGE), tl.constexpr(definition.MIN_SLOPE)
_MAX_NEWTON = tl.constexpr(definition.MAX_NEWTON)
_NEWTON_BOUND, _FREE_MOVE = tl.constexpr(definition.NEWTON_BOUND), tl.constexpr(definition.FREE_MOVE)
_MAX_GAIN, _MAX_MOVE = tl.constexpr(definition.MAX_GAIN), tl.constexpr(definition.MAX_MOVE)


@triton.jit
def _clamp(value, least, most):
    """As torch's clamp: what is not a number stays so."""
    value = tl.where(value < least, least, value)
    return tl.where(value > most, most, value)


@triton.jit
def lone_gaussians(row, by_raw, slope, pull_factor, channel, exists):
    """Curvatures and Gauss-Newton steps in raw numbers (BLOCK, 8), |colour|² and stretches (BLOCK, 1) of Gaussians.

    `row` points to the parameters before the update, (BLOCK, 1). `pull_factor` makes the loss's gradient about that of
    half the squared error. As `_lone_gaussian` of the definition.
    """
    scale_1 = tl.load(row + SCALE_1, mask=exists, other=1.0)
    scale_2 = tl.load(row + SCALE_2, mask=exists, other=1.0)
    half_turns = tl.load(row + HALF_TURNS, mask=exists, other=0.0)
    red = tl.load(row + COLOUR, mask=exists, other=0.0)
    green = tl.load(row + COLOUR + 1, mask=exists, other=0.0)
    blue = tl.load(row + COLOUR + 2, mask=exists, other=0.0)
    cosine = tl.cos(half_turns * _PI)
    sine = tl.sin(half_turns * _PI)
    variance_1 = scale_1 * scale_1
    variance_2 = scale_2 * scale_2
    area = _PI * scale_1 * scale_2
    brightness = red * red + green * green + blue * blue
    energy = area * brightness
    least = _RIDGE * area
    stretch = scale_1 / scale_2 - scale_2 / scale_1
    cos_cos = cosine * cosine
    sin_sin = sine * sine
    bend_x = 0.5 * energy * (cos_cos / variance_1 + sin_sin / variance_2)
    bend_y = 0.5 * energy * (sin_sin / variance_1 + cos_cos / variance_2)
    bend_scale = 0.75 * energy / tl.where(channel == SCALE_1, variance_1, variance_2)
    bend = tl.where(channel == HALF_TURNS, 0.25 * energy * stretch * stretch, area)
    bend = tl.where(channel < HALF_TURNS, bend_scale, bend)
    bend = tl.where(channel < SCALE_1, tl.where(channel == 0, bend_x, bend_y), bend)
    curvature = bend * slope * slope + least

    pull = by_raw * pull_factor
    reach = tl.where(slope < _MIN_SLOPE, _MIN_SLOPE, slope)
    by_place = pull / reach
    by_x = tl.sum(tl.where(channel == 0, by_place, 0.0), axis=1, keep_dims=True)
    by_y = tl.sum(tl.where(channel == 1, by_place, 0.0), axis=1, keep_dims=True)
    xx = cos_cos * variance_1 + sin_sin * variance_2
    xy = cosine * sine * (variance_1 - variance_2)
    yy = sin_sin * variance_1 + cos_cos * variance_2
    moved = tl.where(channel == 0, xx * by_x + xy * by_y, xy * by_x + yy * by_y)
    step = tl.where(channel < SCALE_1, moved * 2 / (energy + least) / reach, pull / curvature)
    return curvature, step, brightness, stretch


@triton.jit
def run_network(a, b, c, d, e, f, first_bias, weights):
    """Gains, factors on the gradient, factors on Newton's step, and free moves (BLOCK, 8), from six groups (BLOCK, 8).

    Groups are interleaved, which needs no data of another thread; `pack_weights` orders the weights to match.
    """
    block: tl.constexpr = a.shape[0]
    # Column 4 c + 2 i + j is channel c of group i + 2 j.
    four = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (block, 32))
    two = tl.reshape(tl.join(e, f), (block, 16))
    unit = tl.arange(0, _HIDDEN)
    square = unit[:, None] * _HIDDEN + unit[None, :]
    tall = tl.arange(0, 32)[:, None] * _HIDDEN + unit[None, :]
    wide = unit[:, None] * 32 + tl.arange(0, 32)[None, :]
    hidden = tl.load(first_bias + unit)[None, :] + tl.zeros((block, _HIDDEN), tl.float32)
    hidden = tl.dot(four, tl.load(weights + tall), hidden, input_precision="tf32x3")
    hidden = tl.dot(two, tl.load(weights + 32 * _HIDDEN + square), hidden, input_precision="tf32x3")
    hidden = tl.where(hidden < 0, 0.0, hidden)
    hidden = tl.dot(hidden, tl.load(weights + _SECOND + square), input_precision="tf32x3")
    hidden += tl.load(weights + _SECOND_BIAS + unit)[None, :]
    hidden = tl.where(hidden < 0, 0.0, hidden)
    out = tl.dot(hidden, tl.load(weights + _LAST + wide), input_precision="tf32x3")
    out += tl.load(weights + _LAST_BIAS + tl.arange(0, 32))[None, :]
    first, second = tl.split(tl.reshape(out, (block, 8, 2, 2)))
    gain, by_gradient = tl.split(first)
    by_newton, free = tl.split(second)
    return gain, by_gradient, by_newton, free


@triton.jit(do_not_specialize=["learned_updates"])
def learned_step(
    raw,
    mean,
    square,
    bias,
    first_age,
    anchors,
    patch_size,
    parameters,
    image_of,
    images,
    num_images,
    gradient,
    rates,
    first_rates,
    first_biases,
    weights,
    learned_updates,
    beta1,
    beta2,
    eps,
    opposed_fraction,
    sums,
    clock,
    count,
    BLOCK: tl.constexpr,
):
    """The update of BLOCK raw Gaussians from the gradients by their parameters, and their new parameters.

    The learned rule makes the first `learned_updates` of this run, Adam the later ones.
    """
    gaussian = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    channel = tl.arange(0, PARAMETERS)[None, :]
    exists = gaussian < count
    place = gaussian * PARAMETERS + channel
    time = tl.load(clock) - 1
    value = tl.load(raw + place, mask=exists, other=0.0)
    parameter, slope = activate_channels(value, 0.0, patch_size, channel)
    by_raw = tl.load(gradient + place, mask=exists, other=0.0) * slope
    new_mean = beta1 * tl.load(mean + place, mask=exists, other=0.0) + (1 - beta1) * by_raw
    new_square = beta2 * tl.load(square + place, mask=exists, other=0.0) + (1 - beta2) * by_raw * by_raw
    bias_of_mean = beta1 * tl.load(bias + gaussian * 2, mask=exists, other=0.0)
    bias_of_square = beta2 * tl.load(bias + gaussian * 2 + 1, mask=exists, other=0.0)
    root = tl.sqrt(new_square / (1 - bias_of_square)) + eps
    momentum = -new_mean / (1 - bias_of_mean) / root
    along = new_mean * by_raw

    if time < learned_updates:
        number = tl.load(image_of + gaussian, mask=exists, other=0)
        image = images + number * IMAGE_COLUMNS
        values = 3.0 * tl.load(image + HEIGHT).to(tl.float32) * tl.load(image + WIDTH).to(tl.float32)
        squares = tl.load(sums + (time * num_images + number) * _SUMS + SUM_SQUARES).to(tl.float32)
        error = tl.sqrt(squares / values)
        row = parameters + gaussian * PARAMETERS
        pull_factor = -error * values / _L1_WEIGHT
        curvature, step, brightness, stretch = lone_gaussians(row, by_raw, slope, pull_factor, channel, exists)
        by_gradient = -by_raw / root
        newton = _clamp(step / tl.load(first_rates + channel), -_MAX_NEWTON, _MAX_NEWTON)
        newton = newton / (1 + tl.abs(newton) / _NEWTON_BOUND)
        coherence = values / _L1_WEIGHT * root * tl.rsqrt(curvature)
        coherence = 2 * coherence / (2 + coherence)
        shape = tl.where(channel == HALF_TURNS, brightness / (brightness + 0.05), parameter)
        shape = tl.where(channel < HALF_TURNS, parameter / (parameter + 4), shape)
        shape = tl.where(channel < SCALE_1, parameter / patch_size, shape)
        age = tl.load(first_age + gaussian, mask=exists, other=0) + time
        rest = tl.where(channel == _AGE, 4.0 / (4.0 + age.to(tl.float32)), 0.0)
        rest = tl.where(channel == _STRETCH, stretch / (1 + tl.abs(stretch)), rest)
        rest = tl.where(channel == _ERROR, 0.5 * tl.log(tl.where(error < 1e-6, 1e-6, error)) + 1.5, rest)
        gain, on_gradient, on_newton, free = run_network(
            momentum, by_gradient, newton, coherence, shape, rest, first_biases + time * _HIDDEN, weights
        )
        move = _clamp(1 + gain, 0.0, _MAX_GAIN) * tl.where(along > 0, momentum, 0.0)
        move = _clamp(move + on_gradient * by_gradient + on_newton * newton + _FREE_MOVE * free, -_MAX_MOVE, _MAX_MOVE)
    else:
        move = tl.where(along < 0, opposed_fraction, 1.0) * momentum

    value += tl.load(rates + time * PARAMETERS + channel) * move
    anchor = load_anchor(anchors, gaussian, channel, exists)
    parameter, _ = activate_channels(value, anchor, patch_size, channel)
    tl.store(mean + place, new_mean, mask=exists)
    tl.store(square + place, new_square, mask=exists)
    tl.store(bias + gaussian * 2, bias_of_mean, mask=exists)
    tl.store(bias + gaussian * 2 + 1, bias_of_square, mask=exists)
    tl.store(raw + place, value, mask=exists)
    tl.store(parameters + place, parameter, mask=exists)


@dataclass(frozen=True, eq=False)
class RuleTables:
    """What `learned_step` reads of a configuration with a learned rule, on the device of the Gaussians.

    Attributes:
        weights: The network, as `pack_weights` lays it out.
        first_biases: Row k holds the biases of the first layer in update number k, with what the step alone settles,
            float32 (updates, 16).
        first_rates: The learning rates before annealing, float32 (8,).
        updates: How many updates of the run the learned rule makes, at least 1; Adam makes the rest.
        gradient: Room for the gradients by the parameters, float32 (N, 8).
    """

    weights: Tensor
    first_biases: Tensor
    first_rates: Tensor
    updates: int
    gradient: Tensor

    @staticmethod
    def of(config: OptimizeConfig, patch_size: float, raw: Tensor) -> RuleTables | None:
        """The tables for raw Gaussians (N, 8); None where Adam makes all updates."""
        updates = sum(config.learned_at(step) is not None for step in range(config.steps))
        if config.learned is None or updates == 0:
            return None
        shared = np.stack([config.progress(step, 1.0).features(patch_size) for step in range(updates)])
        return RuleTables(
            weights=pack_weights(config.learned).to(raw),
            first_biases=_first_biases(config.learned, torch.from_numpy(shared)).to(raw),
            first_rates=torch.from_numpy(config.first_learning_rates()).to(raw),
            updates=updates,
            gradient=torch.zeros_like(raw),
        )


def pack_weights(rule: LearnedRule) -> Tensor:
    """The network as `run_network` reads it, float64 (N,) on the CPU.

    One after another, without the biases of the first layer: the first layer (48, 16), the second (16, 16), the last
    (16, 32), each with a row per input; the biases of the second and the last.
    """
    first, second, last = (_on_cpu(layer.weight).T for layer in (rule.first, rule.second, rule.last))
    groups = torch.zeros(_INPUTS // RAW_CHANNELS, RAW_CHANNELS, HIDDEN, dtype=torch.float64)
    groups[:4] = first[: 4 * RAW_CHANNELS].unflatten(0, (4, RAW_CHANNELS))
    # The features of the shape have the places of the raw numbers that they come from; |colour|² has the angle's.
    places = [*range(32, 36), _BRIGHTNESS_FEATURE, *range(36, 39)]
    groups[4] = first[places]
    groups[5, [_AGE.value, _STRETCH.value, _ERROR.value]] = first[[_AGE_FEATURE, _STRETCH_FEATURE, _ERROR_FEATURE]]
    inputs = torch.cat([_interleave(groups[:4]), groups[4:].transpose(0, 1).flatten(0, 1)])
    outputs = _interleave(last.T.unflatten(0, (4, RAW_CHANNELS))).T
    last_bias = _interleave(_on_cpu(rule.last.bias).view(4, RAW_CHANNELS, 1))
    parts = (inputs, second, outputs, _on_cpu(rule.second.bias), last_bias)
    return torch.cat([part.flatten() for part in parts])


def _interleave(groups: Tensor) -> Tensor:
    """Rows 4 c + 2 i + j from row c of group i + 2 j; groups (4, 8, n)."""
    return groups.unflatten(0, (2, 2)).permute(2, 1, 0, 3).flatten(0, 2)


def _first_biases(rule: LearnedRule, shared: Tensor) -> Tensor:
    """Biases of the first layer with the shared features (updates, 10) but the error, float64 (updates, 16)."""
    weight = _on_cpu(rule.first.weight)[:, OWN_FEATURES:].clone()
    weight[:, _ERROR_FEATURE - OWN_FEATURES] = 0
    return _on_cpu(rule.first.bias) + shared @ weight.T


def _on_cpu(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float64)
