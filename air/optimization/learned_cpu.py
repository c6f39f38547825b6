"""The learned rule's update as one kernel: moments, features, network and move of a vector of Gaussians at a time.

`air.optimization.rule` is the definition. What a vector needs stays in a scratch of a few kilobytes: the features, the
two hidden layers and the coefficients. The features that all Gaussians share are folded into the first layer's bias
once a step.
"""

from __future__ import annotations

import numpy as np

from air.compute.compile import LANES, inline, kernel
from air.compute.simd import (
    absolute,
    aligned_scratch,
    fma,
    load,
    maximum,
    minimum,
    splat,
    sqrt,
    store,
    where_ge,
)
from air.gaussians import RAW_CHANNELS
from air.optimization.rule import (
    DIRECTIONS,
    FREE_MOVE,
    HIDDEN,
    MAX_GAIN,
    MAX_MOVE,
    MAX_NEWTON,
    MIN_SLOPE,
    NEWTON_BOUND,
    OWN_FEATURES,
    RIDGE,
    LearnedRule,
    Progress,
)
from air.rendering.cpu_kernels import HALF, ONE, PI, TWO, ZERO, cos_sin
from air.rendering.parameters import BLUE, GREEN, HALF_TURNS, RED, SCALE_1, SCALE_2
from air.rendering.raw_cpu import sigmoid_slope, slope_factors, tanh

f32 = np.float32

BIAS_OF_MEAN, BIAS_OF_SQUARE, OF_MEAN, OF_SQUARE, AGE = range(5)
"""Rows of the table of biases: beta1 and beta2 to the power of a Gaussian's updates, what corrects the two moments for
them, and the updates."""

_OUTPUTS = 8  # of a layer, computed together: as many running sums as keep the multipliers busy
_MOVES = (DIRECTIONS + 1) * RAW_CHANNELS
# The scratch, in vectors: features, curvature factors, cautious momentum, and the layers.
_BEND = OWN_FEATURES
_CAUTIOUS = _BEND + RAW_CHANNELS
_LAYER_1 = _CAUTIOUS + RAW_CHANNELS
_LAYER_2 = _LAYER_1 + HIDDEN
_COEFFICIENTS = _LAYER_2 + HIDDEN
_SCRATCH = _COEFFICIENTS + _MOVES


class PackedRule:
    """A learned rule's weights in the order in which the kernel reads them.

    Attributes:
        weights: float32; eight outputs after eight outputs of each layer, for each input the eight weights.
        biases: float32 (64,): of the first layer, without the shared features, of the second and of the last.
    """

    def __init__(self, rule: LearnedRule) -> None:
        first, second, last = (
            (layer.weight.detach().cpu().double().numpy(), layer.bias.detach().cpu().double().numpy())
            for layer in (rule.first, rule.second, rule.last)
        )
        own = first[0][:, :OWN_FEATURES]
        self.weights = np.concatenate([_packed(own), _packed(second[0]), _packed(last[0])]).astype(np.float32)
        self._shared = first[0][:, OWN_FEATURES:]
        self._first_bias = first[1]
        self.biases = np.concatenate([first[1], second[1], last[1]]).astype(np.float32)

    def set_progress(self, progress: Progress, patch_size: float) -> None:
        """Folds the features that all Gaussians share into the biases."""
        self.biases[:HIDDEN] = self._first_bias + (self._shared * progress.features(patch_size)).sum(axis=1)


def _packed(weights: np.ndarray) -> np.ndarray:
    outputs, inputs = weights.shape
    return weights.reshape(outputs // _OUTPUTS, _OUTPUTS, inputs).transpose(0, 2, 1).ravel()


@inline
def _layer(scratch, inputs, num_inputs, weights, first_weight, biases, first_bias, outputs, num_outputs, least):
    """One layer of the network: vectors of the scratch from `inputs` to `outputs`, at least `least`."""
    for group in range(0, num_outputs, _OUTPUTS):
        bias = first_bias + group
        sum_0 = splat(biases[bias])
        sum_1 = splat(biases[bias + 1])
        sum_2 = splat(biases[bias + 2])
        sum_3 = splat(biases[bias + 3])
        sum_4 = splat(biases[bias + 4])
        sum_5 = splat(biases[bias + 5])
        sum_6 = splat(biases[bias + 6])
        sum_7 = splat(biases[bias + 7])
        w = first_weight + group * num_inputs
        for k in range(num_inputs):
            x = load(scratch, (inputs + k) * LANES)
            sum_0 = fma(x, splat(weights[w]), sum_0)
            sum_1 = fma(x, splat(weights[w + 1]), sum_1)
            sum_2 = fma(x, splat(weights[w + 2]), sum_2)
            sum_3 = fma(x, splat(weights[w + 3]), sum_3)
            sum_4 = fma(x, splat(weights[w + 4]), sum_4)
            sum_5 = fma(x, splat(weights[w + 5]), sum_5)
            sum_6 = fma(x, splat(weights[w + 6]), sum_6)
            sum_7 = fma(x, splat(weights[w + 7]), sum_7)
            w += _OUTPUTS
        out = (outputs + group) * LANES
        store(scratch, out, maximum(sum_0, least))
        store(scratch, out + LANES, maximum(sum_1, least))
        store(scratch, out + 2 * LANES, maximum(sum_2, least))
        store(scratch, out + 3 * LANES, maximum(sum_3, least))
        store(scratch, out + 4 * LANES, maximum(sum_4, least))
        store(scratch, out + 5 * LANES, maximum(sum_5, least))
        store(scratch, out + 6 * LANES, maximum(sum_6, least))
        store(scratch, out + 7 * LANES, maximum(sum_7, least))


@inline
def _bounded(newton):
    """A Gauss-Newton step in learning rates, which approaches NEWTON_BOUND."""
    held = maximum(minimum(newton, f32(MAX_NEWTON)), f32(-MAX_NEWTON))
    return held / fma(absolute(held), f32(1 / NEWTON_BOUND), splat(ONE))


@inline
def _describe(
    scratch, raw, patch_size, parameters, mean, square, bias, gradient, pull, count, rates, beta1, beta2, eps, i
):
    """Fills the scratch with features and cautious momentum of Gaussians i .. i + LANES - 1; updates their moments."""
    row = raw.shape[1]
    keep1 = f32(beta1)
    keep2 = f32(beta2)
    scale_1 = load(parameters, SCALE_1 * row + i)
    scale_2 = load(parameters, SCALE_2 * row + i)
    red = load(parameters, RED * row + i)
    green = load(parameters, GREEN * row + i)
    blue = load(parameters, BLUE * row + i)
    cosine, sine = cos_sin(load(parameters, HALF_TURNS * row + i))
    cos2 = cosine * cosine
    sin2 = sine * sine
    cos_times_sin = cosine * sine
    variance_1 = scale_1 * scale_1
    variance_2 = scale_2 * scale_2
    area = scale_1 * scale_2 * PI
    brightness = fma(red, red, fma(green, green, blue * blue))
    energy = area * brightness
    least = area * f32(RIDGE)
    ratio = scale_1 / scale_2
    stretch = ratio - splat(ONE) / ratio
    along_1 = energy / variance_1 * HALF
    along_2 = energy / variance_2 * HALF
    store(scratch, _BEND * LANES, fma(cos2, along_1, sin2 * along_2))
    store(scratch, (_BEND + 1) * LANES, fma(sin2, along_1, cos2 * along_2))
    store(scratch, (_BEND + 2) * LANES, along_1 * f32(1.5))
    store(scratch, (_BEND + 3) * LANES, along_2 * f32(1.5))
    store(scratch, (_BEND + 4) * LANES, energy * stretch * stretch * f32(0.25))
    for k in range(5, RAW_CHANNELS):
        store(scratch, (_BEND + k) * LANES, area)

    bias_of_mean = load(bias, BIAS_OF_MEAN * row + i) * keep1
    bias_of_square = load(bias, BIAS_OF_SQUARE * row + i) * keep2
    of_mean = splat(ONE) / (splat(ONE) - bias_of_mean)
    of_square = splat(ONE) / sqrt(splat(ONE) - bias_of_square)
    age = load(bias, AGE * row + i)
    store(bias, BIAS_OF_MEAN * row + i, bias_of_mean)
    store(bias, BIAS_OF_SQUARE * row + i, bias_of_square)
    store(bias, AGE * row + i, age + ONE)

    for k in range(RAW_CHANNELS):
        a, b = slope_factors(k, patch_size)
        at = k * row + i
        slope = sigmoid_slope(load(raw, at) * a) * b
        by_raw = load(gradient, at) * slope
        new_mean = fma(load(mean, at), keep1, by_raw * (ONE - keep1))
        new_square = fma(load(square, at), keep2, by_raw * by_raw * (ONE - keep2))
        store(mean, at, new_mean)
        store(square, at, new_square)
        root = fma(sqrt(new_square), of_square, splat(f32(eps)))
        inverse = splat(f32(-1)) / root
        momentum = new_mean * of_mean * inverse
        curvature = fma(load(scratch, (_BEND + k) * LANES) * slope, slope, least)
        coherence = root * count / sqrt(curvature)
        store(scratch, k * LANES, momentum)
        store(scratch, (RAW_CHANNELS + k) * LANES, by_raw * inverse)
        store(scratch, (3 * RAW_CHANNELS + k) * LANES, coherence * TWO / (coherence + TWO))
        # Where momentum opposes the gradient there is no cautious move.
        store(scratch, (_CAUTIOUS + k) * LANES, where_ge(splat(ZERO) - new_mean * by_raw, ZERO, splat(ZERO), momentum))
        if k < SCALE_1:
            reach = maximum(slope, splat(f32(MIN_SLOPE)))
            store(scratch, (_BEND + k) * LANES, reach)
            store(scratch, (2 * RAW_CHANNELS + k) * LANES, by_raw * pull / reach)
        else:
            step = by_raw * pull / (curvature * f32(rates[k]))
            store(scratch, (2 * RAW_CHANNELS + k) * LANES, _bounded(step))

    # The two coordinates of the centre are solved for together.
    by_x = load(scratch, 2 * RAW_CHANNELS * LANES)
    by_y = load(scratch, (2 * RAW_CHANNELS + 1) * LANES)
    xy = cos_times_sin * (variance_1 - variance_2)
    factor = splat(TWO) / (energy + least)
    x = fma(fma(cos2, variance_1, sin2 * variance_2), by_x, xy * by_y) * factor
    y = fma(fma(sin2, variance_1, cos2 * variance_2), by_y, xy * by_x) * factor
    store(scratch, 2 * RAW_CHANNELS * LANES, _bounded(x / (load(scratch, _BEND * LANES) * f32(rates[0]))))
    store(scratch, (2 * RAW_CHANNELS + 1) * LANES, _bounded(y / (load(scratch, (_BEND + 1) * LANES) * f32(rates[1]))))

    own = 4 * RAW_CHANNELS
    store(scratch, own * LANES, tanh(load(raw, i)))
    store(scratch, (own + 1) * LANES, tanh(load(raw, row + i)))
    store(scratch, (own + 2) * LANES, scale_1 / (scale_1 + f32(4)))
    store(scratch, (own + 3) * LANES, scale_2 / (scale_2 + f32(4)))
    store(scratch, (own + 4) * LANES, red)
    store(scratch, (own + 5) * LANES, green)
    store(scratch, (own + 6) * LANES, blue)
    store(scratch, (own + 7) * LANES, brightness / (brightness + f32(0.05)))
    store(scratch, (own + 8) * LANES, splat(f32(4)) / (age + f32(4)))
    store(scratch, (own + 9) * LANES, stretch / (absolute(stretch) + ONE))


@kernel
def learned_step(
    raw,
    patch_size,
    parameters,
    mean,
    square,
    bias,
    gradient,
    weights,
    biases,
    pull,
    count,
    first_rates,
    rates,
    beta1,
    beta2,
    eps,
    first,
    end,
):
    """The learned rule's update of Gaussians first .. end - 1, with a learning rate per row in `rates`.

    `gradient` is with respect to `parameters`, which `raw` was activated to. `bias` has the rows named above, `pull` is
    the factor that turns the gradient into that of half the squared error, and `count` the number of the picture's
    values over the weight of the L1 term. `first_rates` are the rates before annealing.
    """
    row = raw.shape[1]
    scratch = aligned_scratch(_SCRATCH * LANES)
    second = HIDDEN * OWN_FEATURES
    last = second + HIDDEN * HIDDEN
    anything = f32(-3e38)
    for i in range(first, end, LANES):
        _describe(
            scratch,
            raw,
            patch_size,
            parameters,
            mean,
            square,
            bias,
            gradient,
            f32(pull),
            f32(count),
            first_rates,
            beta1,
            beta2,
            eps,
            i,
        )
        _layer(scratch, 0, OWN_FEATURES, weights, 0, biases, 0, _LAYER_1, HIDDEN, ZERO)
        _layer(scratch, _LAYER_1, HIDDEN, weights, second, biases, HIDDEN, _LAYER_2, HIDDEN, ZERO)
        _layer(scratch, _LAYER_2, HIDDEN, weights, last, biases, 2 * HIDDEN, _COEFFICIENTS, _MOVES, anything)
        for k in range(RAW_CHANNELS):
            out = _COEFFICIENTS + k
            gain = maximum(minimum(load(scratch, out * LANES) + ONE, f32(MAX_GAIN)), ZERO)
            move = load(scratch, (out + 3 * RAW_CHANNELS) * LANES) * f32(FREE_MOVE)
            move = fma(
                load(scratch, (out + 2 * RAW_CHANNELS) * LANES), load(scratch, (2 * RAW_CHANNELS + k) * LANES), move
            )
            move = fma(load(scratch, (out + RAW_CHANNELS) * LANES), load(scratch, (RAW_CHANNELS + k) * LANES), move)
            move = fma(gain, load(scratch, (_CAUTIOUS + k) * LANES), move)
            move = maximum(minimum(move, f32(MAX_MOVE)), f32(-MAX_MOVE))
            at = k * row + i
            store(raw, at, fma(move, splat(f32(rates[k])), load(raw, at)))
