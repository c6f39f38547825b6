"""The .air format: Gaussians -> bytes -> Gaussians (docs/format.md).

    blob = encode_gaussians(gaussians, height, width, SensitivityQuantizer(step=4000))
    gaussians = decode(blob)                # the encoder's quantised Gaussians, bit for bit
    coarser = decode(blob, stages=2)        # the first two stages; the bytes of the others may be missing

A stage holds at most one Gaussian for each patch of a grid. The Gaussians of a stage loop come in such stages. Free
ones, as `air.fit` makes them, are laid out in as many stages as the fullest patch needs, the strongest of each patch
first.

`air.encoding.encode` also fits the Gaussians to an image and meets a target of bits or quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from air.codec.bitstream import MAX_PIXELS, MAX_STAGES, Header, read_header, read_sections, write_file
from air.codec.sections import SectionCoder, code_section
from air.codec.sensitivity import (
    SYMBOLS,
    SensitivityQuantizer,
    dequantize,
)
from air.codec.symbols import QuantizedStage, Stage, gaussians_of, lay_out, patch_size_for, quantize_stages
from air.codec.uniform import UniformQuantizer
from air.compute.compile import KernelSet
from air.errors import CodecError
from air.gaussians import Gaussians
from air.rendering.cpu import draw_levels
from air.rendering.cpu_kernels import derive_geometry, round_to_levels, sweep

__all__ = [
    "FileInfo",
    "Stage",
    "decode",
    "decode_stages",
    "encode_gaussians",
    "encode_stages",
    "lay_out",
    "read_header",
    "read_info",
]


@dataclass(frozen=True)
class FileInfo:
    """The sizes of a file, known without decoding its Gaussians.

    Attributes:
        header: Sizes and quantiser.
        num_gaussians: Per stage.
        ends: The byte after each stage: a file cut off there decodes with `stages`.
    """

    header: Header
    num_gaussians: tuple[int, ...]
    ends: tuple[int, ...]


def read_info(blob: bytes, stages: int | None = None, *, max_pixels: int = MAX_PIXELS) -> FileInfo:
    """The header and the sizes of the stages. Raises as `decode`."""
    header, sections = read_sections(blob, stages, max_pixels=max_pixels)
    return FileInfo(header, tuple(s.num_gaussians for s in sections), tuple(s.end for s in sections))


def decode(blob: bytes, stages: int | None = None, *, max_pixels: int = MAX_PIXELS) -> Gaussians:
    """The Gaussians of an .air file, float32 on the CPU, stage after stage; render them at its height and width.

    Args:
        blob: The file.
        stages: How many stages to decode, from the first; all if not given. The bytes of later ones may be missing.
        max_pixels: Images of more pixels are refused.

    Raises:
        CodecError: The bytes are not an .air file, are damaged, or are cut off before the end of the stages asked for.
        ValueError: `stages` is negative or above the number of stages in the file.

    Example:
        >>> white = Gaussians(torch.tensor([[2.0, 1.0]]), torch.ones(1, 2), torch.zeros(1), torch.ones(1, 3))
        >>> blob = encode_gaussians(white, 3, 5, SensitivityQuantizer(step=4000))
        >>> decode(blob).xy
        tensor([[1.9375, 1.0625]])
    """
    return _decode(blob, stages, max_pixels)[1]


def decode_stages(blob: bytes, stages: int | None = None, *, max_pixels: int = MAX_PIXELS) -> list[Stage]:
    """As `decode`, with the patches of each stage."""
    patches, gaussians = _decode(blob, stages, max_pixels)
    ends = np.cumsum([len(patch) for patch in patches])
    return [Stage(patch, gaussians[int(end) - len(patch) : int(end)]) for patch, end in zip(patches, ends, strict=True)]


def _decode(blob: bytes, stages: int | None, max_pixels: int) -> tuple[list[NDArray[np.int64]], Gaussians]:
    """The patches of each stage, and the Gaussians of all."""
    header, sections = read_sections(blob, stages, max_pixels=max_pixels)
    if not sections:
        return [], Gaussians.empty()
    coder = SectionCoder(header)
    decoded = [QuantizedStage(*coder.decode(section.num_gaussians, section.payload)) for section in sections]
    patches = [stage.patch for stage in decoded]
    symbols = np.concatenate([stage.symbols for stage in decoded])
    return patches, gaussians_of(QuantizedStage(np.concatenate(patches), symbols), header)


def encode_gaussians(
    gaussians: Gaussians,
    height: int,
    width: int,
    quantizer: SensitivityQuantizer | UniformQuantizer,
    *,
    patch_size: int | None = None,
) -> bytes:
    r"""An .air file of free Gaussians, laid out in stages by `lay_out`. Arguments and errors as `encode_stages`.

    Example:
        >>> white = Gaussians(torch.tensor([[2.0, 1.0]]), torch.ones(1, 2), torch.zeros(1), torch.ones(1, 3))
        >>> blob = encode_gaussians(white, 3, 5, SensitivityQuantizer(step=4000))
        >>> blob[:4], read_info(blob).num_gaussians
        (b'\x89AIR', (1,))
    """
    patch_size = patch_size or patch_size_for(len(gaussians), height, width)
    return encode_stages(lay_out(gaussians, height, width, patch_size), height, width, patch_size, quantizer)


def encode_stages(
    stages: Sequence[Stage],
    height: int,
    width: int,
    patch_size: int,
    quantizer: SensitivityQuantizer | UniformQuantizer,
) -> bytes:
    """An .air file of Gaussians that come in stages.

    With a `SensitivityQuantizer`, Gaussians too weak for its step are left out.

    Args:
        stages: In order.
        height: Of the image, pixels.
        width: Of the image, pixels.
        patch_size: Pixels between the anchors.
        quantizer: How to quantise the Gaussians.

    Raises:
        CodecError: There are too many stages, or a number does not fit the format.
        InvalidGaussiansError: A number is not finite or a scale is not positive.
    """
    if len(stages) > MAX_STAGES:
        raise CodecError(f"a file holds at most {MAX_STAGES} stages, got {len(stages)}: use smaller patches")
    header, quantized = quantize_stages(stages, height, width, patch_size, quantizer)
    return write_stages(header, quantized)


def write_stages(header: Header, stages: Sequence[QuantizedStage]) -> bytes:
    """The file of symbols. Stages at the end that hold nothing are left out."""
    used = [index for index, stage in enumerate(stages) if len(stage.patch)]
    stages = stages[: used[-1] + 1 if used else 0]
    header = replace(header, num_stages=len(stages))
    coder = SectionCoder(header)
    return write_file(header, [(len(stage.patch), *coder.encode(*stage)) for stage in stages])


def _use_each() -> None:
    header = Header(1, 1, 1, 1, SensitivityQuantizer(1))
    nothing = QuantizedStage(np.zeros(0, np.int64), np.zeros((0, SYMBOLS), np.int32))
    SectionCoder(header).encode(*nothing)  # the kernel that decodes, too
    draw_levels(gaussians_of(nothing, header), 1, 1, 1)


KERNELS = KernelSet((code_section, dequantize, derive_geometry, sweep, round_to_levels), _use_each, seconds=11)
"""Every kernel between a file and its picture."""
