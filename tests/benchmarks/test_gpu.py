"""The GPU benchmark's stage loop, on the CPU: it times what distilling does, and counts what comes out."""

import pytest
import torch

from air.optimization.config import OptimizeConfig
from air.predictor.base import GridPredictor
from air.stages.loop import run_stages
from tests.support.paths import ROOT


def test_the_stage_loop_is_timed_and_its_gaussians_counted(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu
    from workload import Size

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    images = gpu.detailed_images(2, Size(0, 30, 41), "cpu")
    config = [OptimizeConfig(steps=2), OptimizeConfig(steps=1)]
    row = gpu.measure_stages(images, config)
    alone = [len(stage) for image in images for stage in run_stages(image, GridPredictor(gpu.PATCH_SIZE), config)]
    assert row.gaussians == pytest.approx(sum(alone) / 2)
    assert len(alone) == 4  # there is detail left for a second stage
    assert min(row.batch_images_per_second, row.single_images_per_second) > 0
