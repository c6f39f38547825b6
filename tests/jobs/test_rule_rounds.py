"""Two rounds of rolling out and learning from files on packaged pictures: the rule beats the Adam it began with."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image

from air.arguments import image_tensor
from jobs.distill_rule import distill_rule
from jobs.shard import shard
from jobs.train_rule import train_rule
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.formats import images
from pipeline.inputs.packaged import collect_pictures
from pipeline.rules.config import DistillRuleConfig, RuleConfig
from pipeline.rules.reference import fresh_rule
from pipeline.rules.validation import validate_rule

PICTURES = 12
SIDE = 256
ROUNDS = 2
FITS = 40
DRAWN = {"max_steps": 50, "min_pixels_per_gaussian": 14, "max_pixels_per_gaussian": 14, "discount": 0.7}
LEARNED = {"passes": 8, "batch": 8192, "learning_rate": 3e-3}
LEAST_GAIN = 0.2
"""dB after 10 updates, over the cautious Adam with kept moments, which is the rule before any training."""

INLINE = RunnerConfig(executor="inline")


@pytest.mark.slow
def test_two_rounds_from_files_raise_the_psnr_of_the_pictures(tmp_path: Path) -> None:
    pytest.importorskip("skimage.data", reason="the photographs come with scikit-image")
    pytest.importorskip("sklearn.datasets", reason="two photographs come with scikit-learn")
    collect_pictures(tmp_path / "all", PICTURES)
    (tmp_path / "training").mkdir()
    for path in sorted((tmp_path / "all").iterdir()):
        picture = Image.open(path).convert("RGB")
        picture.thumbnail((SIDE * 3 // 2, SIDE * 3 // 2))
        picture.save(tmp_path / "training" / f"{path.stem}.png")
    shard([str(tmp_path / "training")], str(tmp_path / "shards"), ShardConfig(max_count=3), INLINE)

    config = RuleConfig(valid_images=PICTURES, valid_side=SIDE, valid_steps=(10, 20, 50), validate_every=10_000)
    pictures = [
        image_tensor(images.decode(path.read_bytes())[:SIDE, :SIDE])
        for path in sorted((tmp_path / "training").iterdir())
    ]
    before = validate_rule(fresh_rule(0), pictures, config)
    reached = {}
    rule = "adam"
    for number in range(1, ROUNDS + 1):
        stored, run = (str(tmp_path / f"round-{number}" / name) for name in ("roll-outs", "run"))
        drawn = DistillRuleConfig.model_validate({**DRAWN, "rule": rule, "fits": FITS, "seed": number})
        assert distill_rule(str(tmp_path / "shards"), stored, drawn, INLINE).summary["fits"] == PICTURES * FITS
        learned = config.model_copy(update={**LEARNED, "from_": rule})
        reached = train_rule([stored], run, learned, valid=str(tmp_path / "training"))
        rule = f"{run}/rule.safetensors"
    stated = ", ".join(
        f"{before[f'valid_psnr_{steps}']:.2f} -> {reached[f'valid_psnr_{steps}']:.2f} dB after {steps}"
        for steps in config.valid_steps
    )
    logging.warning("reached: %s", stated)  # a warning, so that pytest -rA shows it
    assert reached["valid_psnr_10"] > before["valid_psnr_10"] + LEAST_GAIN, stated
