"""`air train --phase rule`: it resumes with the same bits, no worker changes one, and what does not fit is refused."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from air.optimization.rule_file import load_rule, save_rule
from jobs.cli import main
from jobs.distill_rule import distill_rule
from jobs.train_rule import train_rule
from pipeline.config import RunnerConfig
from pipeline.errors import DamagedDataError, LeaseHeldError, TrainingError
from pipeline.formats import tables
from pipeline.rules.audit import repair_rule, standing, verify_rule
from pipeline.rules.config import DistillRuleConfig, RuleConfig
from pipeline.rules.loop import train_rule as learn
from pipeline.rules.plan import plan_rule
from pipeline.rules.reference import fresh_rule
from pipeline.rules.stored import SampleFeed, find_roll_outs
from pipeline.storage.open import open_storage
from pipeline.training.log import read_metrics
from pipeline.work.lease import describe, hold, read_standing

INLINE = RunnerConfig(executor="inline")
SHORT: dict[str, Any] = {
    "max_steps": 20,
    "min_pixels_per_gaussian": 20,
    "crop": 64,
    "valid_steps": (5,),
    "valid_images": 2,
    "valid_side": 48,
    "steps": 8,
    "batch": 500,
    "checkpoint_every": 3,
    "validate_every": 100,
    "log_every": 2,
}


class Stop(Exception):
    """Ends a run in the middle, as a kill does."""


@pytest.fixture(scope="module")
def roll_outs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train-rule") / "roll-outs"
    keys = ("max_steps", "min_pixels_per_gaussian", "crop")
    config = DistillRuleConfig(fits=3, samples=600, **{key: SHORT[key] for key in keys})
    distill_rule(str(shards), str(folder), config, INLINE)
    return folder


def config_of(**changes: Any) -> RuleConfig:
    return RuleConfig.model_validate({**SHORT, **changes})


@pytest.mark.parametrize("kind", ["stored", "online"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    kind: str, roll_outs: Path, shards: Path, photographs: Path, tmp_path: Path
) -> None:
    source = str(roll_outs if kind == "stored" else shards)
    whole = train_rule([source], str(tmp_path / "whole"), config_of(), str(photographs))
    job = plan_rule([source], str(tmp_path / "stopped"), config_of(), str(photographs))

    def stop(figures: Mapping[str, float]) -> None:
        if figures["step"] == 4:
            raise Stop

    with pytest.raises(Stop):
        learn(job, stop)
    assert standing(open_storage(tmp_path / "stopped")).step == 3
    again = train_rule([source], str(tmp_path / "stopped"), config_of(), str(photographs))
    rules = [(tmp_path / name / "rule.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert rules[0] == rules[1]
    assert whole["valid_psnr_5"] == again["valid_psnr_5"]
    rows = [
        [(row["step"], row.get("loss"), row.get("psnr")) for row in read_metrics(open_storage(tmp_path / name))]
        for name in ("whole", "stopped")
    ]
    assert rows[0] == rows[1]
    assert not list(verify_rule(open_storage(tmp_path / "stopped")))


def test_an_interrupted_run_keeps_its_last_step(roll_outs: Path, photographs: Path, tmp_path: Path) -> None:
    """^C in step 4: the checkpoint is of step 4, though they are due after 3 and 6. Then nobody holds the folder."""

    def interrupt(figures: Mapping[str, float]) -> None:
        if figures["step"] == 4:
            signal.raise_signal(signal.SIGINT)

    output = open_storage(tmp_path / "run")
    job = plan_rule([str(roll_outs)], output.uri(), config_of(), str(photographs))
    with pytest.raises(KeyboardInterrupt):
        learn(job, interrupt)
    assert standing(output).step == 4
    assert describe(read_standing(output)) == "no holder"
    with hold(output, "train"), pytest.raises(LeaseHeldError):
        learn(job)


def test_processes_change_no_bit(shards: Path, photographs: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        config = config_of(roll_outs=2, steps=3, workers=workers)
        train_rule([str(shards)], str(tmp_path / str(workers)), config, str(photographs))
    rules = [(tmp_path / name / "rule.safetensors").read_bytes() for name in ("1", "2")]
    assert rules[0] == rules[1]


def test_learning_from_files_comes_nearer_to_the_goals(roll_outs: Path, photographs: Path, tmp_path: Path) -> None:
    train_rule([str(roll_outs)], str(tmp_path / "run"), config_of(steps=60, batch=4000), str(photographs))
    losses = [row["loss"] for row in read_metrics(open_storage(tmp_path / "run")) if "loss" in row]
    assert sum(losses[-5:]) < 0.99 * sum(losses[:5])
    _, card = load_rule(tmp_path / "run" / "rule.safetensors")
    assert card.step == 60
    assert set(card.metrics) == {"valid_psnr", "valid_psnr_5"}
    assert card.notes["settings"]["seed"] == 0
    assert card.notes["begins_with"] == "adam"


def test_a_pass_sees_every_sample_once(roll_outs: Path) -> None:
    stored = find_roll_outs([open_storage(roll_outs)])
    feed = SampleFeed(stored.blocks, RuleConfig(batch=stored.samples, window=1).feed())
    first, second = feed.batch(0), feed.batch(1)
    assert not torch.equal(first.move, second.move)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one.double().sum(0), other.double().sum(0))


def test_the_rule_to_begin_with_must_be_the_one_that_rolled_out(roll_outs: Path, tmp_path: Path) -> None:
    save_rule(tmp_path / "other.safetensors", fresh_rule(3))
    with pytest.raises(TrainingError, match=r"are of adam, and --from .*other\.safetensors is rule:"):
        plan_rule([str(roll_outs)], str(tmp_path / "run"), config_of(**{"from": str(tmp_path / "other.safetensors")}))
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_cut_short_is_named(roll_outs: Path, tmp_path: Path) -> None:
    shutil.copytree(roll_outs, tmp_path / "cut")
    file = sorted((tmp_path / "cut" / "data").glob("*.parquet"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DamagedDataError, match=file.name):
        plan_rule([str(tmp_path / "cut")], str(tmp_path / "run"), config_of())


@pytest.mark.parametrize(("change", "said"), [("version", "version 99 of the schema"), ("rule", "of different rules")])
def test_another_schema_or_rule_in_a_file_is_named(change: str, said: str, roll_outs: Path, tmp_path: Path) -> None:
    shutil.copytree(roll_outs, tmp_path / "other")
    file = sorted((tmp_path / "other" / "data").glob("*.parquet"))[0]
    table = pq.read_table(file)
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    if change == "version":
        metadata["air.schema_version"] = "99"
    rows = [{**row, "rule": "rule:1" if change == "rule" else row["rule"]} for row in table.to_pylist()]
    writer = tables.RowWriter(file, tables.ROLL_OUTS, {})
    writer.add(rows)
    writer.finish()
    if change == "version":
        pq.write_table(pq.read_table(file).replace_schema_metadata(metadata), file)
    with pytest.raises(TrainingError, match=said) as raised:
        plan_rule([str(tmp_path / "other")], str(tmp_path / "run"), config_of())
    assert file.name in str(raised.value)


def test_no_samples_and_mixed_inputs_are_refused(roll_outs: Path, shards: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="give one kind of input"):
        plan_rule([str(roll_outs), str(shards)], str(tmp_path / "run"), config_of())
    shutil.copytree(roll_outs, tmp_path / "empty")
    for file in (tmp_path / "empty" / "data").glob("*.parquet"):
        tables.RowWriter(file, tables.ROLL_OUTS, {}).finish()
    with pytest.raises(TrainingError, match="has no samples"):
        plan_rule([str(tmp_path / "empty")], str(tmp_path / "run"), config_of())
    shutil.copytree(roll_outs, tmp_path / "half")
    sorted((tmp_path / "half" / "manifest").glob("*.json"))[0].unlink()
    with pytest.raises(TrainingError, match="run the same `air distill --rule` again"):
        plan_rule([str(tmp_path / "half")], str(tmp_path / "run"), config_of())


def test_damage_in_a_run_is_found_and_repaired(
    roll_outs: Path, photographs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train_rule([str(roll_outs)], str(run), config_of(), str(photographs))
    for command in ("status", "verify", "gc"):
        assert main([command, str(run)]) == 0
    assert "8 of 8" in capfd.readouterr().out
    whole = (run / "rule.safetensors").read_bytes()
    newest = run / "checkpoints" / "step-00000008" / "model.safetensors"
    newest.write_bytes(b"damaged")
    (run / "rule.safetensors").unlink()
    assert len(list(verify_rule(open_storage(run)))) == 2
    assert main(["verify", str(run)]) == 1
    assert repair_rule(open_storage(run)) == ["checkpoints/step-00000008"]
    train_rule([str(roll_outs)], str(run), config_of(), str(photographs))
    assert (run / "rule.safetensors").read_bytes() == whole
    (run / "rule.json").unlink()
    train_rule([str(roll_outs)], str(run), config_of(), str(photographs))
    assert not list(verify_rule(open_storage(run)))


def test_the_command_learns_and_says_what_it_reached(
    roll_outs: Path, photographs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rule.yaml"
    file.write_text(
        "rule: {steps: 3, batch: 500, valid_steps: [5, 6], valid_images: 2, valid_side: 48, checkpoint_every: 2}\n"
    )
    arguments = ["train", str(roll_outs), str(tmp_path / "run"), "--phase", "rule", "--config", str(file)]
    assert main([*arguments, "--valid", str(photographs), "--seed", "4"]) == 0
    said = capfd.readouterr().out
    assert "3 steps, 1,500 samples" in said
    assert "dB after 5 steps" in said
    assert main(["train", str(roll_outs), str(tmp_path / "run"), "--phase=rule", "--sede", "4"]) == 2
    assert "did you mean '--seed'" in capfd.readouterr().err
