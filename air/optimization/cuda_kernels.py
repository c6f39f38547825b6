"""Triton kernels of the optimiser: activations, and Adam's update (method.md sections 2 and 5).

A table of Gaussians is float32 (N, 8). Importing this module needs triton.
"""

# triton's language has no types that a checker understands.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import math

import triton
import triton.language as tl

from air.compute.ragged import IMAGE_COLUMNS
from air.gaussians import MIN_RAW_SCALE
from air.rendering.cuda_kernels import COLOUR, HALF_TURNS, PARAMETERS, SCALE_1, gather_gradient

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
