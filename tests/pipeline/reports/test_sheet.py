"""Contact sheets show what the table says."""

from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
import pytest
import torch

from air.rendering.render import render
from jobs.distill import distill
from pipeline.bulk.distill import DistillConfig
from pipeline.config import RunnerConfig
from pipeline.formats import images
from pipeline.reports.sheet import final_gaussians


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("canvas", ["target", "predicted"])
def test_the_sheet_shows_the_gaussians_that_the_psnr_is_about(
    shards: Path, tmp_path: Path, canvas: Literal["target", "predicted"], joint: bool
) -> None:
    steps = (0,) if joint and canvas == "predicted" else (6, 3)
    config = DistillConfig(
        predictor="grid",
        patch_size=7,
        stages=2,
        steps=steps,
        joint_steps=5 if joint else 0,
        min_crop=0.5,
        canvas=canvas,
    )
    distill(str(shards), str(tmp_path / "targets"), config, RunnerConfig(executor="inline"))
    rows = pq.read_table(tmp_path / "targets" / "data").to_pylist()
    assert len(rows) == 4
    for row in rows:
        picture = render(final_gaussians(row, canvas, joint), row["height"], row["width"]).clamp(0, 1)
        original = torch.from_numpy(images.decode_png(row["image"])).permute(2, 0, 1) / 255
        psnr = -10 * torch.log10((picture - original).square().mean()).item()
        assert psnr == pytest.approx(row["psnr_target"][-1], abs=5e-3)
