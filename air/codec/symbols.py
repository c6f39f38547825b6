"""Gaussians in stages -> whole-number symbols -> Gaussians, as a file holds them (docs/format.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from air.codec.bitstream import Header
from air.codec.sensitivity import (
    ANGLE,
    CB,
    COLUMN,
    CR,
    LOG_RATIO,
    LOG_SCALE,
    LUMA,
    MAX_SCALE,
    MIN_SCALE,
    ROW,
    SUBDIVISIONS,
    SYMBOLS,
    SensitivityQuantizer,
    SymbolTable,
    dequantize,
    quantize,
)
from air.codec.uniform import CHANNELS, UniformQuantizer, channel_values, gaussians_from_channels
from air.errors import CodecError
from air.gaussians import Gaussians, anchors, grid_shape

# Columns of symbols in the order of the uniform quantiser's channels.
_CHANNEL_COLUMNS = [COLUMN, ROW, LOG_SCALE, LOG_RATIO, ANGLE, LUMA, CR, CB]

_MAX_REACH_PATCHES = 4  # positions may lie so many patches away, along each axis


class Stage(NamedTuple):
    """Gaussians of a stage, in ascending order of patch (row-major), one in a patch at most."""

    patch: NDArray[np.int64]
    gaussians: Gaussians


class QuantizedStage(NamedTuple):
    """A stage as a file holds it: ascending patches, and their symbols (N, 8)."""

    patch: NDArray[np.int64]
    symbols: SymbolTable


def lay_out(gaussians: Gaussians, height: int, width: int, patch_size: int) -> list[Stage]:
    """Free Gaussians as stages: each belongs to the patch of its centre, the strongest of a patch to the first stage.

    Those centred off the image belong to the nearest patch.
    """
    rows, columns = grid_shape(height, width, patch_size)
    gaussians = gaussians.detach().to("cpu")
    cell = torch.floor((gaussians.xy.double() + 0.5) / patch_size).long().numpy()
    patch = cell[:, 1].clip(0, rows - 1) * columns + cell[:, 0].clip(0, columns - 1)
    strength = (gaussians.colour.square().sum(dim=1) * gaussians.scale.prod(dim=1)).numpy()
    order = np.lexsort((-strength, patch))
    ascending = patch[order]
    rank = np.arange(len(order)) - np.searchsorted(ascending, ascending)
    stages = []
    for stage in range(int(rank.max(initial=-1)) + 1):
        chosen = order[rank == stage]
        stages.append(Stage(patch[chosen], gaussians[torch.from_numpy(chosen)]))
    return stages


def patch_size_for(count: int, height: int, width: int) -> int:
    """The patch size in pixels at which there is about one Gaussian a patch.

    With larger patches several Gaussians share a patch, and their order costs bits; with smaller ones empty patches do.
    """
    return min(max(1, round(math.sqrt(height * width / max(count, 1)))), 1 << 12)


def quantize_stages(
    stages: Sequence[Stage],
    height: int,
    width: int,
    patch_size: int,
    quantizer: SensitivityQuantizer | UniformQuantizer,
) -> tuple[Header, list[QuantizedStage]]:
    """The header and the symbols of the file of these stages; arguments and errors as `encode_stages`."""
    stages = [Stage(stage.patch, stage.gaussians.detach().to("cpu")) for stage in stages]
    for stage in stages:
        stage.gaussians.validate()
    header = Header(height, width, patch_size, 0, quantizer)
    if isinstance(quantizer, UniformQuantizer):
        grid = anchors(height, width, patch_size, torch.float64)
        quantized = [
            QuantizedStage(patch, _uniform_symbols(quantizer, gaussians, grid[torch.from_numpy(patch)]))
            for patch, gaussians in stages
        ]
    else:
        parameters = [canonical_parameters(stage.gaussians) for stage in stages]
        header = with_reach(header, parameters, [stage.patch for stage in stages])
        quantized = [quantize_stage(header, stage.patch, own) for stage, own in zip(stages, parameters, strict=True)]
    return header, quantized


def canonical_parameters(gaussians: Gaussians) -> NDArray[np.float64]:
    """Parameters for `air.codec.sensitivity.quantize`, shape (8, N): the wider scale first, strengths for colours."""
    plain = gaussians.detach().to("cpu").to(torch.float64)
    first, second = plain.scale.clamp(MIN_SCALE, MAX_SCALE).unbind(dim=1)
    swapped = first < second
    half_turns = torch.remainder(plain.angle / math.pi + 0.5 * swapped, 1.0)
    colour = channel_values(plain, plain.xy)[:, 5:8] * torch.sqrt(first * second)[:, None]
    rows = [*plain.xy.unbind(dim=1), torch.maximum(first, second), torch.minimum(first, second), half_turns]
    return torch.stack([*rows, *colour.unbind(dim=1)]).numpy()


def corners(header: Header, patch: NDArray[np.int64]) -> NDArray[np.int64]:
    """The origin of positions in these patches, in 64ths of a pixel, shape (2, N)."""
    _, columns = header.grid
    first_pixel = np.stack([patch % columns, patch // columns]) * (header.patch_size * SUBDIVISIONS)
    return first_pixel - SUBDIVISIONS // 2 + header.reach_low


def with_reach(
    header: Header, parameters: Sequence[NDArray[np.float64]], patches: Sequence[NDArray[np.int64]]
) -> Header:
    """The header with the range of positions that all stages need, at most a few patches each way."""
    patch = header.patch_size * SUBDIVISIONS
    plain = replace(header, reach_low=0, reach_span=patch)
    offsets = [
        own[:2] * SUBDIVISIONS - corners(plain, stage)
        for own, stage in zip(parameters, patches, strict=True)
        if len(stage)
    ]
    if not offsets:
        return plain
    low = max(math.floor(min(part.min() for part in offsets)), -_MAX_REACH_PATCHES * patch)
    high = min(math.ceil(max(part.max() for part in offsets)), _MAX_REACH_PATCHES * patch)
    return replace(header, reach_low=low, reach_span=max(high - low, 1))


def quantize_stage(header: Header, patch: NDArray[np.int64], parameters: NDArray[np.float64]) -> QuantizedStage:
    """The symbols of `canonical_parameters`, without Gaussians that are too weak to show."""
    assert isinstance(header.quantizer, SensitivityQuantizer)
    symbols = np.zeros((len(patch), SYMBOLS), np.int32)
    step, weights = header.quantizer.step, header.quantizer.weights()
    quantize(parameters, corners(header, patch), header.reach_span, step, weights, symbols)
    kept = symbols[:, [LUMA, CR, CB]].any(axis=1)
    return QuantizedStage(patch[kept], symbols[kept])


def _zero_levels(quantizer: UniformQuantizer) -> NDArray[np.int64]:
    """Per channel, the level that is coded as 0: for colours the one next to no colour, else the first."""
    zero = np.zeros(len(CHANNELS), np.int64)
    for channel in range(5, 8):
        # The nearest level to zero, rounded half up in whole numbers.
        nearest = (-2 * quantizer.low[channel] + quantizer.step[channel]) // (2 * quantizer.step[channel])
        zero[channel] = min(max(nearest, 0), 2 ** quantizer.bits[channel] - 1)
    return zero


def _uniform_symbols(quantizer: UniformQuantizer, gaussians: Gaussians, anchor: Tensor) -> SymbolTable:
    levels = quantizer.symbols(channel_values(gaussians.to(torch.float64), anchor)) - _zero_levels(quantizer)
    symbols = np.zeros(levels.shape, np.int32)
    symbols[:, _CHANNEL_COLUMNS] = levels
    return symbols


def gaussians_of(stage: QuantizedStage, header: Header) -> Gaussians:
    """The Gaussians that the symbols of one or more stages stand for, float32; the same bits on every machine.

    Raises:
        CodecError: With a uniform quantiser, a colour has no level or a scale is not positive.
    """
    if isinstance(header.quantizer, UniformQuantizer):
        levels = stage.symbols[:, _CHANNEL_COLUMNS] + _zero_levels(header.quantizer)
        if ((levels < 0) | (levels >> np.array(header.quantizer.bits) > 0)).any():
            raise CodecError("a stage has a colour outside its quantiser's levels: the file is damaged")
        grid = anchors(header.height, header.width, header.patch_size, torch.float64)
        values = header.quantizer.values(levels, torch.float64)
        if bool((values[:, 2:4].to(torch.float32) <= 0).any()):
            raise CodecError("a stage has a scale that is not positive: the file is damaged")
        return gaussians_from_channels(values, grid[torch.from_numpy(stage.patch)]).to(torch.float32)
    rows = np.empty((SYMBOLS, len(stage.patch)), np.float32)
    dequantize(stage.symbols, corners(header, stage.patch), header.quantizer.step, header.quantizer.weights(), rows)
    rows[4] = rows[4].astype(np.float64) * math.pi  # half turns are exact, and radians rounded once
    values = torch.from_numpy(rows)
    return Gaussians(values[0:2].T, values[2:4].T, values[4], values[5:8].T)
