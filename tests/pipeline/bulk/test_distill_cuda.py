"""Distilling on CUDA: many views in the same launches, and rows as from the CPU up to rounding.

Runs on a GPU, or on a CPU in triton's interpreter, started by tests/air/test_cuda_interpreter.py.
"""

import os
from functools import partial

import numpy as np
import pytest
import torch

from air.stages import joint, loop
from pipeline.bulk.distill import DistillConfig, DistillJob
from pipeline.errors import Rejected
from pipeline.formats.images import encode_png
from pipeline.storage.open import open_storage
from pipeline.work.process import EncodedImage

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytest.importorskip("triton", reason="the cuda backend needs triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def smooth_picture(height: int, width: int, seed: int) -> np.ndarray:
    """Generated, (height, width, 3) uint8."""
    coarse = torch.rand(1, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)[0]
    return (fine.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def test_rows_are_those_of_the_cpu_up_to_rounding(tmp_path, monkeypatch):
    sizes = [(4, 8), (3, 9), (8, 4)]
    images = [
        EncodedImage("unit", f"image-{k}", f"{k}.png", encode_png(smooth_picture(*size, seed=k)))
        for k, size in enumerate(sizes)
    ]
    config = DistillConfig(patch_size=4, stages=2, steps=(1,), joint_steps=2, device="cpu", batch=1)
    expected = DistillJob(config, open_storage(tmp_path)).process_many(images)
    if INTERPRETED:  # the kernels then take tensors of the CPU
        monkeypatch.setattr(loop, "run_stages_batch", partial(loop.run_stages_batch, backend="cuda"))
        monkeypatch.setattr(joint, "optimize_jointly", partial(joint.optimize_jointly, backend="cuda"))
    else:
        config = config.model_copy(update={"device": "cuda"})
    job = DistillJob(config.model_copy(update={"batch": 3}), open_storage(tmp_path))
    assert job.batch_size() == 3
    found = job.process_many(images)
    assert [type(rows) for rows in found] == [list, Rejected, list]
    for rows, expected_rows in zip(found, expected, strict=True):
        if isinstance(rows, Rejected):
            assert str(rows) == str(expected_rows)
            continue
        for row, expected_row in zip(rows, expected_rows, strict=True):
            for name in ("key", "view", "seed", "height", "width", "image", "gaussians", "steps"):
                assert row[name] == expected_row[name]
            assert (row["anchor"] == expected_row["anchor"]).all()
            for name in ("psnr_predicted", "psnr_target"):
                assert row[name] == pytest.approx(expected_row[name], abs=0.01)
            for name in ("target_x", "target_scale_1", "target_red"):
                assert row[name] == pytest.approx(expected_row[name], abs=1e-2)
