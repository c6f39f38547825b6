"""Bits a Gaussian on a folder of pictures: the same fits stored five ways, one of them as AIR's authors do.

    python benchmarks/codec.py DIR [--images N] [--gaussians 8000] [--json FILE]

"Raw" is method.md's 53 bits. "Static histograms" is the entropy coding of AIR's authors: each channel of those 53-bit
symbols with the histogram of the image, by the ANS coder of the constriction library; they count neither the histograms
nor the patches, which a file needs. Then our entropy coder on those same symbols, whole files; and our own quantiser,
whole files, as fine as gives the same PSNR.

Quality over size, beside other codecs, is what `air evaluate --codec` measures; `rate_distortion.py` reports it.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from air.arguments import image_tensor
from air.codec.file import decode, encode_gaussians, encode_stages
from air.codec.sensitivity import SensitivityQuantizer
from air.codec.symbols import lay_out, patch_size_for, quantize_stages
from air.codec.uniform import channel_values, fit_uniform_quantizer
from air.fitting.fit import fit
from air.gaussians import Gaussians, anchors
from air.metrics import psnr
from air.rendering.render import render
from air.warmup import warm_up
from pipeline.inputs.pictures import find_pictures

WAYS = (
    ("53 bits, raw (method.md section 6)", "raw", "psnr_uniform"),
    ("static histograms as the authors count them, symbols only", "static", "psnr_uniform"),
    ("static histograms, with the tables and patches that a file needs", "static_file", "psnr_uniform"),
    ("the same symbols, our entropy coder, whole file", "uniform", "psnr_uniform"),
    ("our quantiser as fine as gives that PSNR, whole file", "sensitivity", "psnr_sensitivity"),
)
"""What the table's rows are called, and the keys of their bits a Gaussian and of their PSNR."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="pictures, for example the 24 of Kodak")
    parser.add_argument("--images", type=int, help="only so many, spread over the sorted folder")
    parser.add_argument("--gaussians", type=int, default=8000, help="of every fit")
    parser.add_argument("--steps", type=int, default=150, help="of every fit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures of every picture here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warm_up("encode")
    pictures = find_pictures([str(arguments.directory)])
    if arguments.images:
        count = min(arguments.images, len(pictures))
        pictures = [pictures[k * len(pictures) // count] for k in range(count)]
    rows = []
    for picture in pictures:
        key, rgb = picture.read()
        fitted = fit(rgb, arguments.steps, num_gaussians=arguments.gaussians, threads=arguments.threads).gaussians
        rows.append({"key": key, **code_five_ways(fitted, image_tensor(rgb).float())})
    print(f"{len(rows)} pictures, fits of {arguments.gaussians} Gaussians, {arguments.steps} steps; means\n")
    print_table(rows)
    if arguments.json:
        rounded = [
            {name: value if isinstance(value, str) else round(value, 3) for name, value in row.items()} for row in rows
        ]
        arguments.json.write_text("[\n" + ",\n".join(map(json.dumps, rounded)) + "\n]\n")


def print_table(rows: list[dict[str, float]]) -> None:
    """Means over pictures, and the least and the greatest difference of any picture."""

    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in rows]))

    print("| stored as | bits a Gaussian | PSNR, dB | beside static histograms | of single pictures |")
    print("| --- | --- | --- | --- | --- |")
    for title, bits, quality in WAYS:
        changes = [100 * (row[bits] / row["static"] - 1) for row in rows]
        total = 100 * (mean(bits) / mean("static") - 1)
        print(
            f"| {title} | {mean(bits):.2f} | {mean(quality):.2f} | {total:+.1f} % "
            f"| {min(changes):+.1f} to {max(changes):+.1f} % |"
        )
    print(f"\nBefore quantising: {mean('psnr_exact'):.2f} dB.")


def code_five_ways(gaussians: Gaussians, image: Tensor) -> dict[str, float]:
    """Bits a Gaussian and PSNR of each way.

    Args:
        gaussians: A fit.
        image: What was fitted, shape (3, H, W), values in [0, 1].
    """
    _, height, width = image.shape

    def quality_of(stored: Gaussians) -> float:
        return psnr(render(stored, height, width), image)

    patch_size = patch_size_for(len(gaussians), height, width)
    stages = lay_out(gaussians, height, width, patch_size)
    grid = anchors(height, width, patch_size)
    values = torch.cat([channel_values(stage.gaussians, grid[torch.from_numpy(stage.patch)]) for stage in stages])
    uniform = fit_uniform_quantizer(values)
    file = encode_stages(stages, height, width, patch_size, uniform)
    quality = quality_of(decode(file))
    symbols = uniform.symbols(values)
    static = static_histogram_bits(symbols)
    _, quantized = quantize_stages(stages, height, width, patch_size, uniform)
    # A histogram as a file would hold it: two bytes for each level from the first used one to the last. The patches:
    # the entropy of each stage's mask.
    tables = sum(16 * (int(channel.max()) - int(channel.min()) + 1) for channel in symbols.T)
    masks = sum(binary_entropy(len(stage.patch), len(grid)) for stage in quantized)
    low, high = 1.0, float(1 << 22)
    for _ in range(14):
        middle = math.sqrt(low * high)
        blob = encode_gaussians(gaussians, height, width, SensitivityQuantizer(round(middle)))
        low, high = (middle, high) if quality_of(decode(blob)) >= quality else (low, middle)
    own = encode_gaussians(gaussians, height, width, SensitivityQuantizer(round(low)))
    number = len(gaussians)
    return {
        "gaussians": number,
        "raw": 53.0,
        "static": static / number,
        "static_file": (static + tables + masks) / number,
        "uniform": 8 * len(file) / number,
        "sensitivity": 8 * len(own) / number,
        "psnr_exact": quality_of(gaussians),
        "psnr_uniform": quality,
        "psnr_sensitivity": quality_of(decode(own)),
    }


def static_histogram_bits(symbols: NDArray[np.int32]) -> float:
    """ANS-coded size of each channel's symbols with that channel's own histogram, in bits."""
    import constriction  # its submodules are attributes, not importable by name

    stream = constriction.stream
    coder = stream.stack.AnsCoder()
    for channel in symbols.T:
        levels = np.ascontiguousarray(channel - channel.min(), np.int32)
        counts = np.bincount(levels)
        if np.count_nonzero(counts) > 1:
            model = stream.model.Categorical((counts / counts.sum()).astype(np.float32), perfect=False)
            coder.encode_reverse(levels, model)
    return float(coder.num_bits())


def binary_entropy(ones: int, number: int) -> float:
    """Bits of a mask with so many ones, coded with its own frequency."""
    share = ones / number
    if share in (0.0, 1.0):
        return 0.0
    return -number * (share * math.log2(share) + (1 - share) * math.log2(1 - share))


if __name__ == "__main__":
    main()
