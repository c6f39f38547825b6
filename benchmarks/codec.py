"""The .air codec on a folder of pictures: bits a Gaussian, and quality over size beside JPEG.

    python benchmarks/codec.py DIR [--images N] [--bpp 0.15 0.25 0.5 1.0] [--plot FILE.svg] [--json FILE]

First table: the same fitted Gaussians stored five ways. "raw" is method.md's 53 bits. "static histograms" is the
entropy coding of AIR's authors: each channel of those 53-bit symbols with the histogram of the image, by the ANS coder
of the constriction library; they count neither the histograms nor the patches, which a file needs. Then our entropy
coder on those same symbols, whole files; and our own quantiser, whole files, as fine as gives the same PSNR.

Second table: air.encode for targets of bits per pixel, JPEG (Pillow, optimised tables) at the largest quality that
is no larger, and GaussianImage's published points on Kodak. Decoding times are CPU time of one core, best of several.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from air.bitstream import read_header
from air.codec import decode, encode_gaussians, encode_stages, lay_out, patch_size_for, quantize_stages
from air.compress import encode
from air.gaussians import Gaussians, anchors
from air.growth import grow
from air.optimize import compile_kernels
from air.quantize import channel_values, fit_uniform_quantizer
from air.render import render
from air.sensitivity import SensitivityQuantizer

GAUSSIAN_IMAGE = {0.15: 25.0, 1.0: 29.7}
"""GaussianImage's codec on Kodak as published: bits per pixel and PSNR in dB."""

Picture = NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="pictures that Pillow reads, for example the 24 of Kodak")
    parser.add_argument("--images", type=int, help="only so many, spread over the sorted folder")
    parser.add_argument("--gaussians", type=int, default=8000, help="of the first table; 0 leaves it out")
    parser.add_argument("--bpp", type=float, nargs="*", default=[0.15, 0.25, 0.5, 1.0], help="of the second table")
    parser.add_argument("--steps", type=int, default=150, help="of each fit")
    parser.add_argument("--refine-steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="write PSNR against bits per pixel here, as SVG")
    parser.add_argument("--json", type=Path, help="write every figure of every picture here")
    arguments = parser.parse_args()
    paths = sorted(p for p in arguments.directory.iterdir() if p.suffix.lower() in (".png", ".webp", ".jpg", ".tif"))
    if not paths:
        parser.error(f"no pictures in {arguments.directory}")
    if arguments.images:
        paths = [paths[k * len(paths) // arguments.images] for k in range(min(arguments.images, len(paths)))]
    torch.set_num_threads(arguments.threads)
    compile_kernels()
    pictures = {path.name: np.asarray(Image.open(path).convert("RGB")) for path in paths}
    results: dict[str, object] = {}
    if arguments.gaussians:
        results["coding"] = coding_table(pictures, arguments.gaussians, arguments.steps, arguments.threads)
    if arguments.bpp:
        points = distortion_table(pictures, arguments.bpp, arguments)
        results["distortion"] = points
        if arguments.plot:
            arguments.plot.write_text(svg(mean_curves(points)))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def coding_table(pictures: dict[str, Picture], count: int, steps: int, threads: int) -> list[dict[str, float]]:
    """Prints the means; one entry per picture."""
    rows = []
    for picture in pictures.values():
        fitted = grow(picture, count, steps, threads=threads).gaussians
        rows.append(code_five_ways(fitted, picture))
    print(f"{len(rows)} pictures, fits of {count} Gaussians, {steps} steps; bits a Gaussian, means\n")
    print("| stored as | bits a Gaussian | PSNR, dB | beside static histograms |")
    print("| --- | --- | --- | --- |")
    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    base = mean["static"]
    for name, bits, quality in (
        ("53 bits, raw", 53.0, "psnr_uniform"),
        ("static histograms, symbols only", base, "psnr_uniform"),
        ("static histograms, with tables and patches", mean["static_file"], "psnr_uniform"),
        ("the same symbols, our entropy coder, file", mean["uniform"], "psnr_uniform"),
        ("our quantiser at that PSNR, file", mean["sensitivity"], "psnr_sensitivity"),
    ):
        print(f"| {name} | {bits:.2f} | {mean[quality]:.2f} | {100 * (bits / base - 1):+.1f} % |")
    print(f"\nBefore quantising: {mean['psnr_exact']:.2f} dB.\n", flush=True)
    return rows


def code_five_ways(gaussians: Gaussians, picture: Picture) -> dict[str, float]:
    height, width, _ = picture.shape
    patch_size = patch_size_for(len(gaussians), height, width)
    stages = lay_out(gaussians, height, width, patch_size)
    grid = anchors(height, width, patch_size)
    values = torch.cat([channel_values(stage.gaussians, grid[torch.from_numpy(stage.patch)]) for stage in stages])
    uniform = fit_uniform_quantizer(values)
    file = encode_stages(stages, height, width, patch_size, uniform)
    quality = psnr(decode(file), picture)
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
        low, high = (middle, high) if psnr(decode(blob), picture) >= quality else (low, middle)
    own = encode_gaussians(gaussians, height, width, SensitivityQuantizer(round(low)))
    number = len(gaussians)
    return {
        "gaussians": number,
        "static": static / number,
        "static_file": (static + tables + masks) / number,
        "uniform": 8 * len(file) / number,
        "sensitivity": 8 * len(own) / number,
        "psnr_exact": psnr(gaussians, picture),
        "psnr_uniform": quality,
        "psnr_sensitivity": psnr(decode(own), picture),
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


def psnr(gaussians: Gaussians, picture: Picture) -> float:
    """Of the picture that a viewer sees: clamped and rounded to 8 bits."""
    height, width, _ = picture.shape
    drawn = (render(gaussians, height, width).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    return psnr_of_pixels(drawn, picture)


def psnr_of_pixels(first: NDArray, second: NDArray) -> float:
    error = np.square(first.astype(np.float64) - second).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


def distortion_table(
    pictures: dict[str, Picture], targets: list[float], arguments: argparse.Namespace
) -> list[dict[str, float | str]]:
    """Prints a row per target; one entry per picture and target."""
    print(f"{len(pictures)} pictures, {arguments.steps} steps and {arguments.refine_steps} on what is stored; means\n")
    print("| target | AIR bpp | PSNR | least | Gaussians | JPEG bpp | PSNR | GaussianImage | encode s | decode ms |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    points: list[dict[str, float | str]] = []
    for target in targets:
        rows = [distortion(picture, target, arguments) for picture in pictures.values()]
        mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        published = f"{GAUSSIAN_IMAGE[target]:.1f}" if target in GAUSSIAN_IMAGE else ""
        print(
            f"| {target:g} | {mean['bpp']:.3f} | {mean['psnr']:.2f} | {min(row['psnr'] for row in rows):.2f} "
            f"| {mean['gaussians']:.0f} | {mean['jpeg_bpp']:.3f} | {mean['jpeg_psnr']:.2f} | {published} "
            f"| {mean['encode_seconds']:.1f} | {mean['decode_milliseconds']:.1f} |",
            flush=True,
        )
        points += [{"picture": name, "target": target, **row} for name, row in zip(pictures, rows, strict=True)]
    return points


def distortion(picture: Picture, target: float, arguments: argparse.Namespace) -> dict[str, float]:
    start = time.process_time()
    blob = encode(
        picture,
        bpp=target,
        steps=arguments.steps,
        refine_steps=arguments.refine_steps,
        threads=arguments.threads,
    )
    encode_seconds = time.process_time() - start
    gaussians = decode(blob)
    header = read_header(blob)
    assert (header.height, header.width) == picture.shape[:2]
    best = math.inf
    for _ in range(7):
        start = time.process_time()
        decode(blob)
        best = min(best, time.process_time() - start)
    jpeg_bits, jpeg_quality = jpeg(picture, target)
    pixels = picture[..., 0].size
    return {
        "bpp": 8 * len(blob) / pixels,
        "psnr": psnr(gaussians, picture),
        "gaussians": len(gaussians),
        "jpeg_bpp": jpeg_bits / pixels,
        "jpeg_psnr": jpeg_quality,
        "encode_seconds": encode_seconds,
        "decode_milliseconds": 1e3 * best,
    }


def jpeg(picture: Picture, target: float) -> tuple[int, float]:
    """(bits, PSNR) of the best JPEG of at most `target` bits per pixel; of the worst quality if there is none."""
    limit = target * picture[..., 0].size
    low, high = 1, 96
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if 8 * len(jpeg_file(picture, middle)) <= limit else (low, middle)
    data = jpeg_file(picture, low)
    return 8 * len(data), psnr_of_pixels(np.asarray(Image.open(io.BytesIO(data))), picture)


def jpeg_file(picture: Picture, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def mean_curves(points: list[dict[str, float | str]]) -> dict[str, list[tuple[float, float]]]:
    """Mean (bits per pixel, PSNR) of each target, per codec."""
    curves: dict[str, list[tuple[float, float]]] = {"AIR": [], "JPEG": [], "GaussianImage": []}
    for target in sorted({float(point["target"]) for point in points}):
        rows = [point for point in points if point["target"] == target]
        for name, size, quality in (("AIR", "bpp", "psnr"), ("JPEG", "jpeg_bpp", "jpeg_psnr")):
            mean = [float(np.mean([float(row[key]) for row in rows])) for key in (size, quality)]
            curves[name].append((mean[0], mean[1]))
    curves["GaussianImage"] = sorted(GAUSSIAN_IMAGE.items())
    return curves


def svg(curves: dict[str, list[tuple[float, float]]], width: int = 720, height: int = 440) -> str:
    """Lines of PSNR over bits per pixel."""
    points = [point for curve in curves.values() for point in curve]
    right = 1.05 * max(x for x, _ in points)
    low, high = math.floor(min(y for _, y in points)) - 1, math.ceil(max(y for _, y in points)) + 1
    margin = 50

    def place(bpp: float, quality: float) -> tuple[float, float]:
        x = margin + bpp / right * (width - 3.5 * margin)
        return x, height - margin - (quality - low) / (high - low) * (height - 2 * margin)

    shapes = []
    for quality in range(low, high + 1, 2):
        (x0, y), (x1, _) = place(0, quality), place(right, quality)
        shapes.append(f'<line x1="{x0:.0f}" y1="{y:.0f}" x2="{x1:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
        shapes.append(f'<text x="{x0 - 8:.0f}" y="{y + 4:.0f}" text-anchor="end">{quality}</text>')
    for bpp in (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0):
        if bpp <= right:
            (x, y0), (_, y1) = place(bpp, low), place(bpp, high)
            shapes.append(f'<line x1="{x:.0f}" y1="{y0:.0f}" x2="{x:.0f}" y2="{y1:.0f}" stroke="#eee"/>')
            shapes.append(f'<text x="{x:.0f}" y="{y0 + 18:.0f}" text-anchor="middle">{bpp:g}</text>')
    for colour, (name, curve) in zip(("#264653", "#d1495b", "#e9a23b"), curves.items(), strict=True):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        x, y = place(*curve[-1])
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shapes.append(f'<text x="{x + 6:.0f}" y="{y + 4:.0f}" fill="{colour}">{name}</text>')
    title = "mean PSNR in dB over bits per pixel"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/><text x="{margin}" y="24">{title}</text>'
        f"{''.join(shapes)}</svg>\n"
    )


if __name__ == "__main__":
    main()
