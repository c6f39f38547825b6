"""Phase quantize: a network learns the quantiser that its Gaussians are stored with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from air.codec.file import decode, encode_stages
from air.codec.symbols import Stage
from air.codec.uniform import DEFAULT_BITS
from air.errors import CodecError
from air.gaussians import activate
from air.metrics import psnr
from air.optimization.config import OptimizeConfig
from air.predictor.checkpoint import load_checkpoint
from air.predictor.network import PredictorNetwork
from air.predictor.quantized import learned_table
from air.rendering.render import render
from air.stages.loop import run_stages
from jobs.cli import main
from jobs.train import train
from pipeline.errors import TrainingError
from pipeline.storage.open import open_storage
from pipeline.training.batches import Feed, LocalBatch
from pipeline.training.config import TrainConfig, TrainerConfig
from pipeline.training.group import Group
from pipeline.training.log import read_metrics
from pipeline.training.loop import train as train_here
from pipeline.training.plan import plan_training
from pipeline.training.start import make_network
from pipeline.training.validation import load_images, validate

TINY: dict[str, Any] = {
    "patch_size": 8,
    "stages": 2,
    "settings": {"channels": 16, "depth": 1},
    "batch": 4,
    "min_crop": 96,
    "max_crop": 96,
    "min_zoom": 1,
    "steps": 40,
    "warmup_steps": 0,
    "learning_rate": 3e-3,
    "ema_decay": 0.0,
    "valid_images": 2,
    **dict.fromkeys(["flip", "colour_jitter", "noise", "jpeg", "blur"], 0),
}
"""Every batch is the same four whole pictures, so that losses can be compared from step to step."""

INLINE: dict[str, Any] = {"executor": "inline", "threads": 1, "log_every": 1, "checkpoint_every": 100, "cache_mb": 10}


def configure(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**TINY, **changes})


def run(shards: Path, out: Path, trainer: dict[str, Any] | None = None, **changes: Any) -> list[dict[str, float]]:
    """A tiny run; returns its metrics."""
    where = TrainerConfig.model_validate({**INLINE, **(trainer or {})})
    train(str(shards), str(out), configure(**changes), where, valid=str(shards))
    return read_metrics(open_storage(out))


def losses(rows: list[dict[str, float]]) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def finetuned(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("finetuned") / "run"
    run(shards, out, steps=10)
    return str(out / "last.safetensors")


@pytest.fixture(scope="module")
def quantized(shards: Path, finetuned: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "run"
    run(shards, out, phase="quantize", **{"from": finetuned})
    return out


def valid_psnr(network: PredictorNetwork, shards: Path, quantised: bool) -> float:
    images = load_images(str(shards), 2, 768, 0, 1)
    return validate(network, images, 2, configure().control(), 1, 0, quantised=quantised).psnr / 2


def test_the_quantised_picture_gets_better(shards: Path, finetuned: str, quantized: Path) -> None:
    found = [loss for _, loss in losses(read_metrics(open_storage(quantized)))]
    assert np.mean(found[-5:]) < found[0] - 0.02
    untrained, _ = make_network(configure(phase="quantize", **{"from": finetuned}))
    trained, card = load_checkpoint(quantized / "best.safetensors")
    before, after = (valid_psnr(network.eval(), shards, quantised=True) for network in (untrained, trained))
    assert after > before + 0.3
    assert card.phase == "quantize"
    assert card.metrics["valid_psnr"] == pytest.approx(after, abs=1e-3)


def test_a_network_without_quantiser_is_the_same_as_ever(finetuned: str, shards: Path) -> None:
    network, card = load_checkpoint(finetuned)
    assert "quantizer_bits" not in card.settings
    with pytest.raises(CodecError, match=r"no quantiser: train one with `air train --phase quantize --from"):
        learned_table(network, torch.zeros(3, 16, 16), [])
    untrained, _ = make_network(configure(phase="quantize", **{"from": finetuned}))
    assert valid_psnr(untrained.eval(), shards, quantised=False) == valid_psnr(network, shards, quantised=False)


def test_a_file_written_with_the_learned_quantiser_holds_the_validated_picture(shards: Path, quantized: Path) -> None:
    network, card = load_checkpoint(quantized / "last.safetensors")
    assert card.settings["quantizer_bits"] == list(DEFAULT_BITS)
    reached, tables = 0.0, []
    for image in load_images(str(shards), 2, 768, 0, 1):
        results = run_stages(image, network, [OptimizeConfig(steps=0)] * 2, canvas="predicted")
        stages = [Stage(part.patch.numpy(), activate(part.predicted, part.anchor, 8)) for part in results]
        tables.append(learned_table(network, image, stages))
        _, height, width = image.shape
        blob = encode_stages(stages, height, width, 8, tables[-1])
        reached += psnr(render(decode(blob), height, width), image) / 2
    assert reached == pytest.approx(valid_psnr(network, shards, quantised=True), abs=1e-4)
    assert tables[0] != tables[1]  # it adapts to the image


def test_the_quantiser_alone_leaves_the_network_as_it_was(shards: Path, finetuned: str, tmp_path: Path) -> None:
    run(shards, tmp_path / "run", phase="quantize", quantizer_alone=True, steps=2, **{"from": finetuned})
    before, after = (safetensors.torch.load_file(file) for file in (finetuned, tmp_path / "run" / "last.safetensors"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    fresh, _ = make_network(configure(phase="quantize", **{"from": finetuned}))
    assert not torch.equal(after["quantizer.step_logit"], fresh.state_dict()["quantizer.step_logit"])
    assert not torch.equal(after["quantizer.adapt.weight"], fresh.state_dict()["quantizer.adapt.weight"])


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(shards: Path, finetuned: str, tmp_path: Path) -> None:
    settings = {"phase": "quantize", "from": finetuned, "steps": 4}
    whole = losses(run(shards, tmp_path / "whole", **settings))

    class Stopped(Exception):
        pass

    class Stopping(Feed):
        def batch(self, step: int) -> LocalBatch:
            if step == 3:
                raise Stopped
            return super().batch(step)

    where = TrainerConfig.model_validate({**INLINE, "checkpoint_every": 2})
    job = plan_training(str(shards), str(tmp_path / "run"), configure(**settings), where, str(shards))
    with pytest.raises(Stopped):
        train_here(job, Group(), make_feed=Stopping)
    assert losses(run(shards, tmp_path / "run", {"checkpoint_every": 2}, **settings)) == whole
    ours, theirs = (safetensors.torch.load_file(tmp_path / name / "last.safetensors") for name in ("run", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_bits_are_configuration_and_a_quantiser_of_other_bits_begins_anew(
    quantized: Path, shards: Path, tmp_path: Path
) -> None:
    coarse = [2] * 8
    begun = str(quantized / "last.safetensors")
    config = configure(phase="quantize", quantizer_bits=coarse, **{"from": begun})
    network, _ = make_network(config)
    assert network.settings["quantizer_bits"] == coarse
    stored = safetensors.torch.load_file(begun)
    same, _ = make_network(configure(phase="quantize", **{"from": begun}))
    assert torch.equal(same.state_dict()["quantizer.step_logit"], stored["quantizer.step_logit"])
    assert not torch.equal(network.state_dict()["quantizer.low"], stored["quantizer.low"])
    assert torch.equal(network.state_dict()["stem.weight"], stored["stem.weight"])
    assert valid_psnr(network.eval(), shards, quantised=True) < valid_psnr(same.eval(), shards, quantised=True) - 1


def test_what_cannot_be_quantised_is_refused(
    shards: Path, finetuned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(shards), str(tmp_path / "run"), "--phase", "quantize"]
    assert main(command) == 2
    assert "phase = 'quantize' needs a checkpoint to begin with: set from" in capsys.readouterr().err
    assert main([*command, "--from", finetuned, "--quantizer-bits", "8,8,7,7,7,8,4,17"]) == 2
    assert "quantizer_bits must be eight whole numbers from 1 to 16" in capsys.readouterr().err
    assert main([*command, "--from", "grid"]) == 2
    assert "the grid has no weights to begin with" in capsys.readouterr().err
    with pytest.raises(TrainingError, match=r"has patch size 8, the run 6: set patch_size to 8"):
        run(shards, tmp_path / "run", phase="quantize", patch_size=6, **{"from": finetuned})
    assert not (tmp_path / "run").exists()


def test_the_default_bits_are_the_published_ones() -> None:
    assert configure().quantizer_bits == DEFAULT_BITS
