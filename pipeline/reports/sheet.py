"""Contact sheets of distilled targets: original, prediction, optimised Gaussians, and where the stages added them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from air.arguments import to_levels
from air.gaussians import Gaussians, grid_shape
from air.rendering.render import render
from pipeline.formats import images
from pipeline.formats.targets import gaussians_of
from pipeline.storage.base import Storage
from pipeline.work.manifest import read_manifests
from pipeline.work.plan import read_plan

_CELL_WIDTH, _CELL_HEIGHT = 300, 230
_MARGIN, _CAPTION, _HEADER = 10, 20, 64
_PAPER, _INK, _FAINT = (250, 250, 248), (30, 30, 30), (110, 110, 110)

# Colours by the number of stages that added a Gaussian: cold for one, hot for many.
_STAGE_COLOURS = ((43, 61, 114), (46, 134, 171), (246, 174, 45), (214, 64, 69), (140, 30, 120), (60, 0, 60))
_NO_STAGE_COLOUR = (15, 15, 15)


def final_gaussians(row: Mapping[str, Any], canvas: str, joint: bool) -> Gaussians:
    """The Gaussians that the last PSNR of a row belongs to.

    Args:
        row: A row of the targets table.
        canvas: The value of `canvas` in the configuration.
        joint: Whether the configuration has joint steps. Then, and with canvas `target`, all stages are optimised.
            Otherwise only the last one is.
    """
    stages = list(range(len(row["gaussians"])))
    if joint or canvas == "target" or not stages:
        return gaussians_of(row, "target", stages)
    earlier, last = gaussians_of(row, "predicted", stages[:-1]), gaussians_of(row, "target", stages[-1:])
    return Gaussians.concatenate([earlier, last])


def stage_map(row: Mapping[str, Any]) -> np.ndarray:
    """The number of stages that gave each patch a Gaussian, shape (rows, columns), int."""
    rows, columns = grid_shape(row["height"], row["width"], row["patch_size"])
    return np.bincount(np.asarray(row["anchor"], np.int64), minlength=rows * columns).reshape(rows, columns)


def save_sheet(targets: Storage, picture: Path) -> None:
    """Draws the contact sheet of all views that a distill job committed, and writes it as PNG."""
    config = read_plan(targets).config
    rows = []
    for manifest in read_manifests(targets):
        for file in manifest.files:
            with targets.local_file(file.path) as local:
                rows += pq.read_table(local).to_pylist()
    contact_sheet(rows, config["canvas"], bool(config["joint_steps"])).save(picture)


def contact_sheet(rows: Sequence[Mapping[str, Any]], canvas: str, joint: bool) -> Image.Image:
    """Draws a line of four pictures for every target row.

    Args:
        rows: Rows of the targets table.
        canvas: The value of `canvas` in the configuration.
        joint: Whether the configuration has joint steps.
    """
    titles = ("original", "predicted by stage 0", "optimised, all stages", "Gaussians per patch")
    width = _MARGIN + len(titles) * (_CELL_WIDTH + _MARGIN)
    line = _CELL_HEIGHT + _CAPTION + _MARGIN
    sheet = Image.new("RGB", (width, _HEADER + len(rows) * line), _PAPER)
    draw = ImageDraw.Draw(sheet)
    bold, small = ImageFont.load_default(16), ImageFont.load_default(13)
    for column, title in enumerate(titles):
        draw.text((_MARGIN + column * (_CELL_WIDTH + _MARGIN), 14), title, _INK, bold)
    _draw_legend(
        draw, _MARGIN + 3 * (_CELL_WIDTH + _MARGIN), max((len(row["gaussians"]) for row in rows), default=0), small
    )
    for number, row in enumerate(rows):
        top = _HEADER + number * line
        for column, (picture, caption) in enumerate(_cells(row, canvas, joint)):
            left = _MARGIN + column * (_CELL_WIDTH + _MARGIN)
            picture.thumbnail((_CELL_WIDTH, _CELL_HEIGHT), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + (_CELL_WIDTH - picture.width) // 2, top))
            draw.text((left, top + picture.height + 3), caption, _FAINT, small)
    return sheet


def _draw_legend(draw: ImageDraw.ImageDraw, left: int, stages: int, font: Any) -> None:
    for count in range(stages + 1):
        x = left + count * 44
        draw.rectangle((x, 40, x + 14, 54), _patch_colour(count))
        draw.text((x + 19, 39), str(count), _FAINT, font)


def _patch_colour(count: int) -> tuple[int, int, int]:
    return _NO_STAGE_COLOUR if count == 0 else _STAGE_COLOURS[min(count, len(_STAGE_COLOURS)) - 1]


def _cells(row: Mapping[str, Any], canvas: str, joint: bool) -> list[tuple[Image.Image, str]]:
    height, width = row["height"], row["width"]
    original = Image.fromarray(images.decode_png(row["image"]))
    name = row["key"].rpartition("/")[2].rpartition("-")[0]
    total = sum(row["gaussians"])
    added = " + ".join(f"{count:,}" for count in row["gaussians"])
    if not row["gaussians"]:
        black = Image.new("RGB", (width, height))
        return [
            (picture, caption)
            for picture, caption in ((original, name), (black, ""), (black.copy(), ""), (black.copy(), "0"))
        ]
    counts = stage_map(row)
    colours = np.array([_patch_colour(count) for count in range(int(counts.max()) + 1)], np.uint8)[counts]
    return [
        (original, f"{name}, {width} x {height}"),
        (_picture(gaussians_of(row, "predicted", [0]), height, width), f"{row['psnr_predicted'][0]:.2f} dB"),
        (
            _picture(final_gaussians(row, canvas, joint), height, width),
            f"{row['psnr_target'][-1]:.2f} dB, {total:,} Gaussians, {height * width / total:.0f} px each",
        ),
        (Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST), f"by stage: {added}"),
    ]


def _picture(gaussians: Gaussians, height: int, width: int) -> Image.Image:
    return Image.fromarray(to_levels(render(gaussians, height, width)))
