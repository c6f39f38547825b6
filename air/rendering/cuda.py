"""The CUDA renderer: launches and autograd around the Triton kernels of `air.rendering.cuda_kernels`.

Where a gradient is asked for, the image is drawn with atomic additions: fast, with no copy to the host, and different
in the last bits from run to run. Where none is, it is drawn by tiles, which is deterministic. docs/cuda.md says why.

Importing this module needs triton. With TRITON_INTERPRET=1 set before triton is first imported, everything here runs on
CPU tensors, slowly: that is how the kernels are tested without a GPU.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
from torch import Tensor

from air.compute.launch import launch, selected
from air.compute.ragged import RaggedImages
from air.gaussians import Gaussians
from air.rendering import cuda_kernels as kernels
from air.rendering.parameters import half_turns
from air.rendering.tiles import TileLists, gsplat_tile_lists, load_gsplat, tile_lists

Binning = Literal["auto", "gsplat", "own"]

_GEOMETRY_BLOCK = 128

BLOCKS = {"ROWS": kernels.BLOCK_ROWS, "COLUMNS": kernels.BLOCK_COLUMNS, "warps": 1}
"""How kernels of one Gaussian per program are launched."""


def parameter_table(xy: Tensor, scale: Tensor, angle: Tensor, colour: Tensor) -> Tensor:
    """The kernels' table of Gaussians, float32 (N, 8)."""
    return torch.cat([xy, scale, half_turns(angle).float()[:, None], colour], dim=1).contiguous()


def launch_draw(parameters: Tensor, image_of: Tensor, layout: RaggedImages, planes: Tensor, clock: Tensor) -> None:
    """Adds all Gaussians to their images in `planes`, atomically; adds 1 to `clock` (int32, (1,)) if there are any."""
    launch(kernels.draw, len(parameters), parameters, image_of, layout.table, planes, clock, **BLOCKS)


class _Render(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, xy: Tensor, scale: Tensor, angle: Tensor, colour: Tensor, height: int, width: int
    ) -> Tensor:
        parameters = parameter_table(xy, scale, angle, colour)
        layout = RaggedImages([(height, width)], xy.device)
        image_of = torch.zeros(len(xy), dtype=torch.int32, device=xy.device)
        clock = torch.zeros(1, dtype=torch.int32, device=xy.device)
        planes = layout.buffer()
        with selected(xy.device):
            launch_draw(parameters, image_of, layout, planes, clock)
        ctx.save_for_backward(parameters, image_of)
        ctx.layout = layout
        return layout.image(planes, 0).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        parameters, image_of = ctx.saved_tensors
        rows = torch.zeros_like(parameters)
        planes = ctx.layout.pack([gradient])
        with selected(parameters.device):
            table = ctx.layout.table
            launch(kernels.gather, len(parameters), parameters, image_of, table, planes, rows, **BLOCKS)
        return rows[:, 0:2], rows[:, 2:4], rows[:, 4], rows[:, 5:8], None, None


def render_cuda(gaussians: Gaussians, height: int, width: int) -> Tensor:
    """The image of shape (3, height, width), float32; see `air.rendering.render.render`, which checks the arguments."""
    parts = (gaussians.xy, gaussians.scale, gaussians.angle, gaussians.colour)
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        image = _Render.apply(*parts, height, width)
        assert isinstance(image, Tensor)
        return image
    return render_tiles(gaussians.detach(), height, width)


def render_tiles(gaussians: Gaussians, height: int, width: int, binning: Binning = "auto") -> Tensor:
    """The image without gradients, bit for bit the same in every run and with either binning.

    Waits for the GPU once, since the length of the lists is known only there.
    """
    parameters = parameter_table(gaussians.xy, gaussians.scale, gaussians.angle, gaussians.colour)
    count = len(parameters)
    geometry = torch.zeros(count, kernels.GEOMETRY.value, device=parameters.device)
    image = torch.empty(3, height, width, device=parameters.device)
    with selected(parameters.device):
        blocks = triton.cdiv(count, _GEOMETRY_BLOCK)
        launch(kernels.derive_geometry, blocks, parameters, geometry, count, BLOCK=_GEOMETRY_BLOCK)
        lists = bin_tiles(geometry, height, width, binning)
        launch(
            kernels.draw_tiles,
            lists.rows * lists.columns,
            parameters,
            geometry,
            lists.starts,
            lists.members,
            image,
            height,
            width,
            lists.columns,
            SIDE=kernels.TILE,
        )
    return image


def bin_tiles(geometry: Tensor, height: int, width: int, binning: Binning = "auto") -> TileLists:
    """Tile lists for a geometry table (N, 8); "auto" takes gsplat where it loads.

    Raises:
        RuntimeError: gsplat was asked for and does not load here.
    """
    centre = geometry[:, 0:2]
    half = geometry[:, kernels.HALF_WIDTH.value : kernels.HALF_HEIGHT.value + 1]
    gsplat = load_gsplat() if binning != "own" and geometry.device.type == "cuda" and len(geometry) else None
    if gsplat is not None:
        return gsplat_tile_lists(centre, half, height, width, kernels.TILE, gsplat)
    if binning == "gsplat":
        raise RuntimeError("gsplat's extension does not load here; binning='own' needs none")
    return tile_lists(centre, half, height, width, kernels.TILE)
