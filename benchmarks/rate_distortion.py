"""The table and the plot of docs/codec.md, from what `air evaluate --codec` measured on the 24 pictures of Kodak.

    air evaluate KODAK --codec --bpp 0.1,0.15,0.25,0.5,1,2 --output FIGURES.parquet
    python benchmarks/rate_distortion.py FIGURES.parquet [--plot FILE.svg]

GaussianImage's published points on Kodak stand beside it. "At our bpp" is how far above or below ours another codec's
curve lies where it has our files' mean size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline.evaluation.codec import AIR, means
from pipeline.reports.charts import Curve, svg
from pipeline.reports.codec_curves import charts

GAUSSIAN_IMAGE = {0.15: 25.0, 1.0: 29.7}
"""GaussianImage's codec on Kodak as published: bits per pixel and PSNR in dB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="the table that `air evaluate --codec --output` wrote")
    parser.add_argument("--plot", type=Path, help="write PSNR and MS-SSIM over bits per pixel here, as SVG")
    arguments = parser.parse_args()
    table = pq.read_table(arguments.figures)
    rows = table.to_pylist()
    print(f"{len({row['key'] for row in rows})} pictures; {table.schema.metadata[b'air.codecs'].decode()}\n")
    print_table(means(rows))
    if arguments.plot:
        published = Curve("GaussianImage", sorted(GAUSSIAN_IMAGE.items()), joined=False)
        arguments.plot.write_text(svg(charts(rows, [published])))


def print_table(mean: dict[tuple[float, str], dict[str, float]]) -> None:
    """A row for each target and codec, in Markdown."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for (_, codec), figures in mean.items():
        curves.setdefault(codec, []).append((figures["bpp"], figures["psnr"]))
    print("| target | codec | bpp | PSNR, dB | at our bpp | MS-SSIM | Gaussians | encode, s | decode, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for (target, codec), figures in mean.items():
        own = mean[target, AIR]
        reached = quality_at(own["bpp"], curves[codec])
        beside = "none so small" if reached is None else f"{reached - own['psnr']:+.2f}"
        if codec == AIR:
            beside = ""
        count = f"{figures['num_gaussians']:,.0f}" if codec == AIR else ""
        print(
            f"| {target:g} | {codec} | {figures['bpp']:.3f} | {figures['psnr']:.2f} | {beside} "
            f"| {figures['ms_ssim']:.4f} | {count} | {figures['encode_seconds']:.3f} "
            f"| {1e3 * figures['decode_seconds']:.1f} |"
        )
        if codec == AIR and target in GAUSSIAN_IMAGE:
            difference = GAUSSIAN_IMAGE[target] - figures["psnr"]
            print(
                f"| {target:g} | GaussianImage, published | {target:g} | {GAUSSIAN_IMAGE[target]} | {difference:+.2f} |"
                + " |" * 4
            )


def quality_at(bpp: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """PSNR in dB of a curve (bits per pixel, dB) at a size, linear over its logarithm; None below the smallest file."""
    sizes, qualities = np.log([x for x, _ in curve]), [y for _, y in curve]
    if np.log(bpp) < sizes[0]:
        return None
    if len(curve) == 1 or np.log(bpp) <= sizes[-1]:
        return float(np.interp(np.log(bpp), sizes, qualities))
    # Files are a little smaller than ours, also those of the last target: their last line goes on so far.
    slope = (qualities[-1] - qualities[-2]) / (sizes[-1] - sizes[-2])
    return float(qualities[-1] + slope * (np.log(bpp) - sizes[-1]))


if __name__ == "__main__":
    main()
