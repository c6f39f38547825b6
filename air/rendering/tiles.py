"""Which Gaussians touch which tile of an image: the lists that the deterministic forward pass reads.

There are two ways to make them: `tile_lists`, a sort in torch, works everywhere; gsplat's `isect_tiles` and
`isect_offset_encode` (1.5.3) work where its extension loads, which needs nvcc once to build it. Within a tile both list
Gaussians in ascending order. gsplat rounds supports up to whole pixels and so may list a Gaussian in a tile that the
Gaussian does not touch, where it adds exactly 0. So both give the same image, bit for bit.

gsplat is imported only when a list is asked for. This module knows nothing of kernels.
"""

from __future__ import annotations

import functools
import logging
import shutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TileLists:
    """Gaussians by tile, tiles in row-major order.

    Attributes:
        starts: int32 (tiles + 1,). The list of tile k is members[starts[k] : starts[k + 1]].
        members: int32, indices of Gaussians, ascending within a tile.
        rows, columns: Number of tiles down and across.
    """

    starts: Tensor
    members: Tensor
    rows: int
    columns: int


def tile_lists(centre: Tensor, half: Tensor, height: int, width: int, tile: int) -> TileLists:
    """Lists by a stable sort of all (tile, Gaussian) pairs.

    Args:
        centre: (N, 2) x and y in pixels.
        half: (N, 2) half width and height of the box around the support, in pixels.
        height: Rows of the image.
        width: Its columns.
        tile: Edge of a tile in pixels.
    """
    columns, rows = -(-width // tile), -(-height // tile)
    last_pixel = torch.tensor([width - 1, height - 1], dtype=centre.dtype, device=centre.device)
    # Boxes are rounded to whole pixels before tiles are found: a box between two pixels of neighbouring tiles touches
    # neither. The clamps keep boxes that lie far off the image on their side of it, and within int64.
    first = torch.ceil(centre - half).clamp(min=0).minimum(last_pixel + 1).long()
    last = torch.floor(centre + half).clamp(min=-1).minimum(last_pixel).long()
    touches = (first <= last).all(dim=1)
    first_tile = first // tile
    extent = (last // tile - first_tile + 1) * touches[:, None]
    across = extent[:, 0]
    pairs = across * extent[:, 1]
    gaussian = torch.repeat_interleave(torch.arange(len(centre), device=centre.device), pairs)
    within = torch.arange(len(gaussian), device=centre.device) - (pairs.cumsum(0) - pairs)[gaussian]
    row = first_tile[gaussian, 1] + within // across[gaussian]
    column = first_tile[gaussian, 0] + within % across[gaussian]
    tiles, order = torch.sort(row * columns + column, stable=True)
    starts = torch.searchsorted(tiles, torch.arange(rows * columns + 1, device=centre.device))
    return TileLists(starts.int(), gaussian[order].int(), rows, columns)


def gsplat_tile_lists(centre: Tensor, half: Tensor, height: int, width: int, tile: int, gsplat: Any) -> TileLists:
    """The same lists from `gsplat`, which has isect_tiles and isect_offset_encode; other arguments as `tile_lists`."""
    columns, rows = -(-width // tile), -(-height // tile)
    count = len(centre)
    # gsplat takes radii in whole pixels and leaves out the pixel on the far border of a box: hence one more.
    radii = (half.ceil() + 1).int()
    # gsplat sorts a tile's Gaussians by the bits of their depth, which here are the index, read as a float.
    depths = torch.arange(count, dtype=torch.int32, device=centre.device).view(torch.float32)
    _, keys, members = gsplat.isect_tiles(centre[None], radii[None], depths[None], tile, columns, rows)
    starts = gsplat.isect_offset_encode(keys, 1, columns, rows).flatten().int()
    end = torch.full((1,), len(members), dtype=torch.int32, device=centre.device)
    return TileLists(torch.cat([starts, end]), members.int(), rows, columns)


@functools.cache
def load_gsplat() -> ModuleType | None:
    """The module if its CUDA extension loads here, else None. The first call on a machine may build it, for minutes."""
    if shutil.which("nvcc") is None:
        return None
    try:
        import gsplat  # pyright: ignore[reportMissingImports] - optional
        from gsplat.cuda import _backend  # builds and loads the extension  # pyright: ignore[reportMissingImports]
    except Exception as error:  # noqa: BLE001 - a compiler that fails must not stop a render that needs none
        log.info("gsplat's extension does not load, using the project's own binning: %s", error)
        return None
    return gsplat if getattr(_backend, "_C", None) is not None else None
