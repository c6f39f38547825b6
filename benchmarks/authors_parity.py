"""How far the authors' renders may be from ours, mechanism by mechanism (docs/method.md, section 9).

    python benchmarks/authors_parity.py IMAGE ... [--patch-size 5 7 14] [--seeds 0 1] [--gains 1 3] [--size 200 264]

The architecture "dinov3" with the backbone ViT-S/16 and random weights predicts two stages of the middle of each
IMAGE. Its last layer is multiplied by a gain, so that Gaussians differ from patch to patch as trained ones do. Then
one mechanism at a time is changed, in both stages, with the canvas of stage 0 as the input of stage 1:

- *3 sigma box*: the authors' rasteriser looks for a Gaussian only in the 16 x 16 tiles that its box of ceil(3 sigma)
  pixels meets, so the ring from 3 to 3.33 sigma is missing elsewhere.
- *256 of a tile*: it draws only the first 256 Gaussians of a tile.
- *centres not stretched*: centres as the paper has them.
- *TF32*: convolutions with operands of 10 bits of mantissa, which is PyTorch's default on their GPUs.
- *bfloat16*: convolutions and linear layers with operands of 7 bits.

The rasteriser is emulated in float64, from its description. The networks are random, so the figures show sizes and
patterns of differences, not those of a trained network. A difference is the largest of a pixel's three channels.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from air.arguments import image_tensor
from air.gaussians import SUPPORT_CUTOFF, Gaussians, activate
from air.predictor.network import build
from air.stages.control import StageControl, active_patches

TILE, MOST_OF_A_TILE = 16, 256
BOUNDS = (1e-5, 1e-3)
MECHANISMS = ("3 sigma box", "256 of a tile", "centres not stretched", "TF32", "bfloat16")


def draw(
    gaussians: Gaussians, height: int, width: int, *, box: bool = True, most: int | None = MOST_OF_A_TILE
) -> Tensor:
    """The picture (3, height, width), float64, as the authors' rasteriser draws it.

    Args:
        gaussians: In the order in which the rasteriser gets them.
        height: Pixels.
        width: Pixels.
        box: Draw a Gaussian only in tiles that its box of ceil(3 sigma) pixels meets. If not, in all of its support.
        most: Gaussians of a tile that are drawn; None for all.
    """
    exact = gaussians.to(torch.float64)
    a, b, c = exact.conic().unbind(1)
    determinant = 1 / (a * c - b * b)
    half_trace = (a + c) * determinant / 2
    largest = half_trace + (half_trace.square() - determinant).clamp(min=0.1).sqrt()
    radius = (3 * largest.sqrt()).ceil() if box else (3.34 * largest.sqrt()).ceil() + 1
    image = torch.zeros(3, height, width, dtype=torch.float64)
    first = ((exact.xy - radius[:, None]) / TILE).trunc()
    end = ((exact.xy + radius[:, None]) / TILE + 1).trunc()
    for tile_row in range(-(-height // TILE)):
        for tile_column in range(-(-width // TILE)):
            place = torch.tensor([tile_column, tile_row])
            hit = ((first <= place) & (place < end)).all(dim=1).nonzero()[:most, 0]
            rows = torch.arange(tile_row * TILE, min(height, (tile_row + 1) * TILE), dtype=torch.float64)
            columns = torch.arange(tile_column * TILE, min(width, (tile_column + 1) * TILE), dtype=torch.float64)
            dx = columns[None, None, :] - exact.xy[hit, 0, None, None]
            dy = rows[None, :, None] - exact.xy[hit, 1, None, None]
            ha, hb, hc = (part[hit, None, None] for part in (a, b, c))
            weight = torch.exp(-0.5 * (ha * dx * dx + 2 * hb * dx * dy + hc * dy * dy))
            weight = torch.where(weight >= SUPPORT_CUTOFF, weight, 0)
            tile = torch.einsum("nhw,nc->chw", weight, exact.colour[hit])
            image[:, int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1] = tile
    return image


def rounded(values: Tensor, mantissa_bits: int) -> Tensor:
    """float32 values rounded to nearest, to this many bits of mantissa."""
    dropped = 23 - mantissa_bits
    bits = values.contiguous().view(torch.int32)
    return ((bits + (1 << (dropped - 1))) & -(1 << dropped)).view(torch.float32)


def coarser(network: nn.Module, kinds: tuple[type[nn.Module], ...], mantissa_bits: int) -> nn.Module:
    """A copy whose layers of these kinds multiply operands of fewer bits; sums stay float32."""
    network = copy.deepcopy(network)

    def shorten(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(rounded(value, mantissa_bits) for value in inputs)

    for module in network.modules():
        if isinstance(module, kinds):
            module.register_forward_pre_hook(shorten)
            module.weight.data = rounded(module.weight.data, mantissa_bits)  # pyright: ignore - a layer has weights
    return network


def renders(network: Any, image: Tensor, mechanism: str | None) -> list[Tensor]:
    """The canvases after stage 0 and after stage 1."""
    _, height, width = image.shape
    canvas = torch.zeros_like(image)
    so_far: list[Gaussians] = []
    canvases = []
    for stage in range(2):
        active = active_patches(canvas, image, network.patch_size, StageControl())
        with torch.no_grad():
            raw, anchor = network.predict(image, canvas, active, stage)
        gaussians = activate(raw[active].double(), anchor[active].double(), network.patch_size)
        if mechanism == "centres not stretched":
            shrink = torch.tensor([(width - 1) / width, (height - 1) / height], dtype=torch.float64)
            gaussians = Gaussians(gaussians.xy * shrink, gaussians.scale, gaussians.angle, gaussians.colour)
        so_far.append(gaussians)
        most = MOST_OF_A_TILE if mechanism == "256 of a tile" else None
        box = mechanism in ("3 sigma box", "256 of a tile")
        drawn = draw(Gaussians.concatenate(so_far), height, width, box=box, most=most)
        canvases.append(drawn)
        canvas = drawn.float()
    return canvases


def compare(image: Tensor, patch_size: int, seed: int, gain: float) -> dict[str, list[tuple[float, ...]]]:
    """By mechanism and stage: the largest difference, and the fraction of pixels above each of `BOUNDS`."""
    torch.manual_seed(seed)
    network = build("dinov3", {"patch_size": patch_size, "num_stages": 2, "backbone": "vits16", "pixel_stretch": True})
    network.eval()
    for name, parameter in network.named_parameters():
        if name.endswith(".linear.weight") and name.startswith("heads."):
            parameter.data *= gain
    convolutions = (nn.Conv2d, nn.ConvTranspose2d)
    makers: dict[str, Callable[[], Any]] = {
        "TF32": lambda: coarser(network, convolutions, 10),
        "bfloat16": lambda: coarser(network, (*convolutions, nn.Linear), 7),
    }
    ours = renders(network, image, None)
    found = {}
    for mechanism in MECHANISMS:
        base = renders(network, image, "3 sigma box") if mechanism == "256 of a tile" else ours
        theirs = renders(makers.get(mechanism, lambda: network)(), image, mechanism)
        found[mechanism] = []
        for one, other in zip(theirs, base, strict=True):
            difference = (one - other).abs().amax(dim=0)
            found[mechanism].append(
                (float(difference.max()), *(float((difference > b).double().mean()) for b in BOUNDS))
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--patch-size", nargs="+", type=int, default=[5, 7, 14])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--gains", nargs="+", type=float, default=[1, 3])
    parser.add_argument("--size", nargs=2, type=int, default=[200, 264], metavar=("HEIGHT", "WIDTH"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    height, width = options.size
    runs = []
    for path in options.images:
        whole = image_tensor(np.asarray(Image.open(path).convert("RGB")))
        top, left = (whole.shape[1] - height) // 2, (whole.shape[2] - width) // 2
        image = whole[:, top : top + height, left : left + width].contiguous()
        for patch_size in options.patch_size:
            for seed in options.seeds:
                runs.extend(compare(image, patch_size, seed, gain) for gain in options.gains)
    print(f"{len(runs)} runs, {height} x {width}; each cell: the smallest to the largest of the runs\n")
    print("| mechanism | stage | largest difference | " + " | ".join(f"% of pixels above {b:g}" for b in BOUNDS) + " |")
    print("| --- | --- | --- |" + " --- |" * len(BOUNDS))
    for mechanism in MECHANISMS:
        for stage in range(2):
            table = np.array([run[mechanism][stage] for run in runs])
            least, most = table.min(axis=0), table.max(axis=0)
            cells = [f"{least[0]:.1e} to {most[0]:.1e}"]
            cells += [f"{100 * low:.1f} to {100 * high:.1f}" for low, high in zip(least[1:], most[1:], strict=True)]
            print(f"| {mechanism} | {stage} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
