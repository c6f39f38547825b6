"""Two rounds of rolling out and learning from files: each round learns what its credits and curvatures promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from air.optimization.rule_file import load_rule
from jobs.distill_rule import distill_rule
from jobs.shard import shard
from jobs.train_rule import train_rule
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.inputs.packaged import collect_pictures
from pipeline.rules.config import DistillRuleConfig, RuleConfig

PICTURES = 12
SIDE = 256
ROUNDS = 2
FITS = 10
DRAWN = {"max_steps": 50, "min_pixels_per_gaussian": 14, "max_pixels_per_gaussian": 14, "discount": 0.7}
LEARNED = {"passes": 8, "batch": 8192, "learning_rate": 3e-3}
INLINE = RunnerConfig(executor="inline")


@pytest.mark.slow
def test_two_rounds_from_files_learn_what_their_roll_outs_promise(tmp_path: Path) -> None:
    """The loss of stored samples is 0 for the rule that rolled out, and below 0 for one that promises better losses.

    Decibels are not asserted: with twelve packaged pictures a round makes fits worse (docs/training.md).
    """
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
    rule = "adam"
    for number in range(1, ROUNDS + 1):
        stored, run = (str(tmp_path / f"round-{number}" / name) for name in ("roll-outs", "run"))
        drawn = DistillRuleConfig.model_validate({**DRAWN, "rule": rule, "fits": FITS, "seed": number})
        assert distill_rule(str(tmp_path / "shards"), stored, drawn, INLINE).summary["fits"] == PICTURES * FITS
        learned = config.model_copy(update={**LEARNED, "from_": rule})
        figures = train_rule([stored], run, learned, valid=str(tmp_path / "training"))
        lines = (json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in lines if "loss" in line]
        later = losses[len(losses) // 2 :]
        assert sum(later) / len(later) < 0
        assert figures["valid_psnr_50"] > 30
        rule = f"{run}/rule.safetensors"
        assert load_rule(rule)[1].step == figures["step"]
