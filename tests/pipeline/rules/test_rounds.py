"""`air train --phase rule --rounds N`: what a round draws, and that no stop and no executor changes a bit."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

import pipeline.rules.rounds as rounds_module
from air.optimization.rule_file import load_rule
from jobs.cli import main
from jobs.distill_rule import distill_rule
from jobs.shard import shard
from jobs.train_rounds import train_rounds
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.errors import PlanMismatchError, TrainingError
from pipeline.inputs.shards import list_shards, read_samples
from pipeline.rules.audit import repair_rule, standing, verify_rule
from pipeline.rules.config import DistillRuleConfig, RoundsConfig
from pipeline.rules.draw import draw_images, draw_shards
from pipeline.rules.loop import train_rule as learn
from pipeline.rules.plan import plan_rounds
from pipeline.storage.open import open_storage
from pipeline.training.log import read_metrics
from pipeline.work.audit import verify
from pipeline.work.manifest import read_manifests
from pipeline.work.plan import Unit, read_plan

INLINE = RunnerConfig(executor="inline")
SHORT: dict[str, Any] = {
    "rounds": 3,
    "round_steps": 4,
    "images": 1,
    "shards": 2,
    "samples": 200,
    "batch": 150,
    "crop": 32,
    "max_steps": 10,
    "min_pixels_per_gaussian": 20,
    "valid_steps": (5,),
    "valid_images": 1,
    "valid_side": 32,
    "validate_every": 100,
    "log_every": 2,
}
"""Three rounds of two roll-outs each."""


class Stop(Exception):
    """Ends a run in the middle, as a kill does."""


def config_of(**changes: Any) -> RoundsConfig:
    return RoundsConfig.model_validate({**SHORT, **changes})


def keys_of(folder: Path) -> list[str]:
    """The keys of all rows."""
    files = [file for manifest in read_manifests(open_storage(folder)) for file in manifest.files]
    return sorted(key for file in files for key in pq.read_table(folder / file.path)["key"].to_pylist())


def same_runs(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same rule, figures and rules of rounds."""
    files = ["rule.safetensors", *(f"rounds/{number:04d}/rule.safetensors" for number in (1, 2, 3))]
    rows = [
        [(row["step"], row.get("loss"), row.get("psnr"), row.get("valid_psnr")) for row in read_metrics(storage)]
        for storage in (open_storage(one), open_storage(other))
    ]
    return rows[0] == rows[1] and all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


@pytest.fixture(scope="module")
def whole(shards: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has stopped; to be read only."""
    folder = tmp_path_factory.mktemp("rounds") / "run"
    train_rounds(str(shards), str(folder), config_of(), INLINE, str(photographs))
    return folder


def test_shards_are_drawn_by_seed_and_name_alone() -> None:
    units = [Unit(name=f"shard-{number}", input="x", bytes=1, sha256="x", samples=number) for number in range(40)]
    drawn = draw_shards(units, DistillRuleConfig(shards=7, images=5, seed=3))
    assert len(drawn) == 7
    assert [unit.samples for unit in drawn] == [min(5, int(unit.name.removeprefix("shard-"))) for unit in drawn]
    assert draw_shards(units[::-1], DistillRuleConfig(shards=7, images=5, seed=3)) == drawn
    # Without a shard that was not drawn, the draw is the same.
    other = next(unit for unit in units if unit.name not in {one.name for one in drawn})
    left = [unit for unit in units if unit != other]
    assert draw_shards(left, DistillRuleConfig(shards=7, images=5, seed=3)) == drawn
    configs = [DistillRuleConfig(shards=7, seed=seed) for seed in range(400)]
    often = Counter(unit.name for config in configs for unit in draw_shards(units, config))
    assert len(often) == 40
    assert max(often.values()) < 120  # 70 on average
    assert len(draw_shards(units, DistillRuleConfig())) == len(draw_shards(units, DistillRuleConfig(shards=99))) == 40


def test_images_are_drawn_by_seed_and_key_and_counted_so(shards: Path, pictures: Path, tmp_path: Path) -> None:
    shard([str(pictures)], str(tmp_path / "shards"), ShardConfig(), INLINE)
    source = open_storage(tmp_path / "shards")
    (unit,) = list_shards(source)
    whole = [sample.key for sample in read_samples(source, unit)]
    seen: Counter[str] = Counter()
    for seed in range(60):
        config = DistillRuleConfig(images=2, seed=seed)
        drawn = [sample.key for sample in draw_images(read_samples(source, unit), config)]
        assert drawn == [key for key in whole if key in drawn]  # in the shard's order
        assert len(drawn) == 2
        seen.update(drawn)
    assert len(seen) == 6
    assert max(seen.values()) < 40  # 20 on average

    quick = DistillRuleConfig(images=2, seed=5, max_steps=8, crop=16, samples=50)
    tally = distill_rule(str(tmp_path / "shards"), str(tmp_path / "out"), quick, INLINE)
    assert (tally.samples, tally.samples_total) == (2, 2)
    assert [unit.samples for unit in read_plan(open_storage(tmp_path / "out")).units] == [2]
    assert not list(verify(open_storage(tmp_path / "out")))
    for command in ("verify", "status", "stats"):
        assert main([command, str(tmp_path / "out")]) == 0


def test_every_round_rolls_out_the_rule_of_its_first_step_on_other_images(whole: Path, shards: Path) -> None:
    steps, plans = [], []
    for number in (1, 2, 3):
        folder = whole / "rounds" / f"{number:04d}"
        _, card = load_rule(folder / "rule.safetensors")
        plan = read_plan(open_storage(folder))
        assert plan.config["rule"].endswith(card.sha256)
        assert len(keys_of(folder)) == 2
        steps.append(card.step)
        plans.append(plan)
    assert steps == [0, 4, 8]
    assert len({plan.config["seed"] for plan in plans}) == 3
    assert load_rule(whole / "rule.safetensors")[1].step == 12
    # A round is what `air distill --rule` makes of the round's rule and seed.
    config = DistillRuleConfig.model_validate({**plans[1].config, "rule": str(whole / "rounds/0002/rule.safetensors")})
    distill_rule(str(shards), str(whole.parent / "again"), config, INLINE)
    assert read_plan(open_storage(whole.parent / "again")).hash == plans[1].hash
    assert keys_of(whole.parent / "again") == keys_of(whole / "rounds" / "0002")


@pytest.mark.parametrize("step", [4, 6], ids=["between rounds", "while learning"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    step: int, whole: Path, shards: Path, photographs: Path, tmp_path: Path
) -> None:
    def stop(figures: Mapping[str, float]) -> None:
        if figures["step"] == step:
            raise Stop

    job = plan_rounds(str(shards), str(tmp_path / "run"), config_of(), INLINE, str(photographs))
    with pytest.raises(Stop):
        learn(job, stop)
    committed = sorted((tmp_path / "run").glob("rounds/*/manifest/*"))
    before = [path.read_bytes() for path in committed]
    train_rounds(str(shards), str(tmp_path / "run"), config_of(), INLINE, str(photographs))
    assert [path.read_bytes() for path in committed] == before  # no roll-out was made twice
    assert same_runs(tmp_path / "run", whole)
    assert not list(verify_rule(open_storage(tmp_path / "run")))


def test_a_stop_while_rolling_out_costs_no_committed_shard(
    whole: Path, shards: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = plan_rounds(str(shards), str(tmp_path / "run"), config_of(), INLINE, str(photographs))
    process = rounds_module.RollOutJob.process
    images: list[str] = []

    def killed(self: Any, image: Any) -> Any:
        images.append(image.key)
        if len(images) == 4:  # the second shard of the second round
            raise KeyboardInterrupt
        return process(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(rounds_module.RollOutJob, "process", killed)
        with pytest.raises(KeyboardInterrupt):
            learn(job)
    found = standing(open_storage(tmp_path / "run"))
    assert (found.step, found.steps) == (4, 12)
    (committed,) = (tmp_path / "run").glob("rounds/0002/manifest/*")
    before = committed.read_bytes()
    assert len(list(verify_rule(open_storage(tmp_path / "run")))) == 2  # one shard to do, and the run
    train_rounds(str(shards), str(tmp_path / "run"), config_of(), INLINE, str(photographs))
    assert committed.read_bytes() == before
    assert same_runs(tmp_path / "run", whole)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_rolling_out_is_not_put_off(
    signal_number: int, shards: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = plan_rounds(str(shards), str(tmp_path / "run"), config_of(), INLINE, str(photographs))
    process = rounds_module.RollOutJob.process
    images: list[str] = []

    def interrupted(self: Any, image: Any) -> Any:
        images.append(image.key)
        signal.raise_signal(signal_number)
        return process(self, image)

    monkeypatch.setattr(rounds_module.RollOutJob, "process", interrupted)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            learn(job)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(images) == 1
    assert not list((tmp_path / "run").glob("rounds/*/manifest/*"))


def test_a_checkpoint_within_a_round_goes_on_with_the_rule_that_rolled_out(
    whole: Path, shards: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(figures: Mapping[str, float]) -> None:
        if figures["step"] == 8:
            raise Stop

    job = plan_rounds(str(shards), str(tmp_path / "run"), config_of(), INLINE, str(photographs))
    with monkeypatch.context() as patch:
        patch.setattr(RoundsConfig, "checkpoint_every", 3)
        with pytest.raises(Stop):
            learn(job, stop)
    assert standing(open_storage(tmp_path / "run")).step == 6
    kept = (tmp_path / "run/rounds/0002/rule.safetensors").read_bytes()
    (tmp_path / "run/rounds/0002/rule.safetensors").unlink()
    with pytest.raises(TrainingError, match="the rule of this round is lost"):
        train_rounds(str(shards), str(tmp_path / "run"), config_of(), INLINE, str(photographs))
    (tmp_path / "run/rounds/0002/rule.safetensors").write_bytes(kept)
    train_rounds(str(shards), str(tmp_path / "run"), config_of(), INLINE, str(photographs))
    assert same_runs(tmp_path / "run", whole)


@pytest.mark.slow
def test_ray_gives_the_same_rule(whole: Path, shards: Path, photographs: Path, tmp_path: Path, local_ray: None) -> None:
    train_rounds(str(shards), str(tmp_path / "run"), config_of(), RunnerConfig(workers=2), str(photographs))
    assert same_runs(tmp_path / "run", whole)


def test_a_folder_of_another_rule_keeps_its_rule(whole: Path, shards: Path, photographs: Path, tmp_path: Path) -> None:
    job = plan_rounds(str(shards), str(tmp_path / "run"), config_of(), INLINE, str(photographs))
    shutil.copytree(whole / "rounds" / "0002", tmp_path / "run" / "rounds" / "0001")
    before = (tmp_path / "run/rounds/0001/rule.safetensors").read_bytes()
    with pytest.raises(PlanMismatchError, match=r"rule: rule:"):
        learn(job)
    assert (tmp_path / "run/rounds/0001/rule.safetensors").read_bytes() == before
    with pytest.raises(PlanMismatchError, match="rounds: 3 -> 4"):
        plan_rounds(str(shards), str(tmp_path / "run"), config_of(rounds=4), INLINE, str(photographs))


def test_images_that_cannot_be_used_are_judged_over_all_rounds(
    photographs: Path, pictures: Path, tmp_path: Path
) -> None:
    for path in pictures.rglob("*.png"):
        Image.new("RGB", (32, 32)).save(path)
    shutil.copy(next(photographs.glob("*.png")), pictures)
    shard([str(pictures)], str(tmp_path / "shards"), ShardConfig(max_count=1), INLINE)
    few = config_of(shards=1, rounds=9)
    with pytest.raises(TrainingError, match=r"of 9 images are bad.*max_bad_share = 0\.5"):
        train_rounds(str(tmp_path / "shards"), str(tmp_path / "run"), few, INLINE, str(photographs))
    all_bad = INLINE.model_copy(update={"max_bad_share": 1.0})
    train_rounds(str(tmp_path / "shards"), str(tmp_path / "run"), few, all_bad, str(photographs))
    found = standing(open_storage(tmp_path / "run"))
    assert found.finished
    rows = [len(keys_of(tmp_path / f"run/rounds/{number:04d}")) for number in range(1, 10)]
    rejected = rows.count(0)
    assert found.skipped == rejected > 4
    assert found.samples == 4 * 150 * (9 - rejected)
    assert not list(verify_rule(open_storage(tmp_path / "run")))


def test_commands_about_folders_know_rounds(
    whole: Path, shards: Path, photographs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for command in ("status", "verify", "gc"):
        assert main([command, str(run)]) == 0
    said = capfd.readouterr().out
    assert "3 of 3, 2 of 2 shards rolled out" in said
    assert "all rounds" in said
    assert len(list(run.glob("rounds/*/data/*.parquet"))) == 6
    # Damage in a round that was learned from: the round goes, and nothing else.
    sorted(run.glob("rounds/0001/data/*.parquet"))[0].write_bytes(b"damaged")
    (run / "rounds/0002/rule.json").unlink()
    assert main(["verify", str(run)]) == 1
    assert "rounds/0001: manifest/" in capfd.readouterr().err
    assert repair_rule(open_storage(run)) == ["rounds/0001", "rounds/0002"]
    assert not list(verify_rule(open_storage(run)))
    # Damage in the newest checkpoint and in the round before it: the run makes both again.
    (run / "checkpoints/step-00000012/model.safetensors").write_bytes(b"damaged")
    (manifest, *_) = sorted(run.glob("rounds/0003/manifest/*.json"))
    sorted(run.glob(f"rounds/0003/data/{manifest.stem}-*"))[0].write_bytes(b"damaged")
    assert repair_rule(open_storage(run)) == ["checkpoints/step-00000012", f"rounds/0003/manifest/{manifest.name}"]
    train_rounds(str(shards), str(run), config_of(), INLINE, str(photographs))
    assert (run / "rule.safetensors").read_bytes() == (whole / "rule.safetensors").read_bytes()
    assert not list(verify_rule(open_storage(run)))


def test_the_command_takes_the_sections_of_a_file(
    shards: Path, photographs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rounds.yaml"
    section = {**SHORT, "valid_steps": [5]}
    file.write_text(f"rounds: {section}\nrunner: {{executor: inline}}\n".replace("'", '"'))
    arguments = ["train", str(shards), str(tmp_path / "run"), "--phase", "rule", "--config", str(file)]
    assert main([*arguments, "--valid", str(photographs), "--rounds", "1"]) == 0
    assert "4 steps, 600 samples" in capfd.readouterr().out
    assert main([*arguments, "--rounds", "1", "--passes", "2"]) == 2
    assert "unrecognized arguments: --passes" in capfd.readouterr().err
