"""`air retrain`: rounds that promote, refuse, and go on after any stop."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import main
from pipeline.bulk.distill import DistillConfig
from pipeline.config import RunnerConfig
from pipeline.evaluation.config import EvaluateConfig
from pipeline.predictors import find_predictor
from pipeline.registry.aliases import CANDIDATE, CHAMPION, existing_move, history, promote, roll_back
from pipeline.registry.names import named_version
from pipeline.registry.versions import publish
from pipeline.retraining.config import GatesConfig, RetrainConfig
from pipeline.storage.open import open_storage
from pipeline.training.config import TrainConfig, TrainerConfig
from pipeline.work.lease import hold
from tests.support.cycles import ALWAYS, TinyCycle
from tests.support.networks import save_network
from tests.support.toys import times_without_lease

DONE, FAILED, USAGE, REFUSED = 0, 1, 2, 3


@pytest.fixture
def cycle(photographs: Path, shards: Path, tmp_path: Path) -> TinyCycle:
    return TinyCycle(tmp_path / "cycle", photographs, shards)


@pytest.fixture
def air(cycle: TinyCycle, capfd: pytest.CaptureFixture[str]):
    """Runs the cycle's command; returns the exit status and what was said."""

    def run(*options: str) -> tuple[int, str]:
        capfd.readouterr()
        status = main([*cycle.command, *options])
        return status, "".join(capfd.readouterr())

    return run


@pytest.mark.slow
def test_a_cycle_from_its_first_round_to_a_refusal(cycle: TinyCycle, air, caplog: pytest.LogCaptureFixture) -> None:
    status, said = air()
    assert (status, said) == (DONE, f"{cycle.work.uri()}: nothing new; seen 0 shards in 0 rounds\n")

    cycle.deliver("monday", 0)
    status, said = air()
    assert status == DONE, said
    (first,) = cycle.champions()
    assert f"round 1: promoted @{first[:12]}. psnr" in said
    version = named_version(cycle.registry, CHAMPION)
    assert sorted(Path(file.path).name for file in version.files) == [
        "evaluation.parquet",
        "predictor.json",
        "predictor.safetensors",
        "round.json",
        "train.json",
    ]
    assert version.figures["psnr"] > 5

    before = times_without_lease(cycle.folder)
    status, said = air()
    assert (status, said) == (DONE, f"{cycle.work.uri()}: nothing new; seen 1 shard in 1 round\n")
    assert times_without_lease(cycle.folder) == before

    cycle.deliver("monday again", 0)  # a copy under another name is not new
    assert air()[1].endswith("seen 1 shard in 1 round\n")
    assert cycle.rounds() == 1

    cycle.deliver("tuesday", 1)
    cycle.configure(retrain={"start": "scratch"}, train={"steps": 1})
    status, said = air()
    assert status == REFUSED, said
    assert cycle.champions() == [first]
    candidate = existing_move(cycle.registry, CANDIDATE).version
    assert candidate != first
    refusal = next(line for line in said.splitlines() if line.startswith("round 2: refused"))
    assert refusal.startswith(f"round 2: refused @{candidate[:12]}; @{first[:12]} stays champion. gate psnr_change: ")
    (numbers,) = re.findall(r"mean PSNR, dB: ([\d.]+), needs >= ([\d.]+) \(champion", refusal)[:1]
    reached, needed = map(float, numbers)
    assert reached < needed == pytest.approx(version.figures["psnr"], abs=1e-3)
    assert air()[0] == DONE  # the round is over: nothing is new

    cycle.deliver("wednesday", 1)
    (cycle.folder / "incoming" / "tuesday.tar").unlink()
    assert air()[1].endswith("seen 2 shards in 2 rounds\n")
    (cycle.folder / "incoming" / "half.tar").write_bytes(b"x" * 700)
    assert "seen 2 shards in 2 rounds\n" in air()[1]
    assert "half.tar is not a whole tar: invalid header: it waits for a later round" in caplog.text


@pytest.mark.slow
def test_a_better_candidate_is_promoted_and_rolled_back(cycle: TinyCycle, air) -> None:
    cycle.configure(train={"steps": 3})
    cycle.deliver("monday", 0)
    assert air()[0] == DONE
    (first,) = cycle.champions()
    cycle.configure(train={"steps": 120})
    cycle.deliver("tuesday", 1)
    status, said = air()
    assert status == DONE, said
    assert len(cycle.champions()) == 2
    assert f"in place of @{first[:12]}" in said
    plan = json.loads((cycle.folder / "work/rounds/0002/run/plan.json").read_text())
    assert first[:12] in plan["config"]["from_"]  # it began with the champion, and was trained on old and new targets
    assert [unit["name"].partition("-")[0] for unit in plan["units"]] == ["input", "input"]
    assert roll_back(cycle.registry, CHAMPION, "a person's choice").move.version == first
    assert air()[0] == DONE
    assert cycle.champions()[-1] == first


@pytest.mark.slow
def test_a_damaged_candidate_is_refused_with_the_gates_that_fail(
    cycle: TinyCycle, air, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are not finite, so that it draws no image at all."""
    import torch

    from air.predictor.checkpoint import load_checkpoint, save_checkpoint
    from jobs import train as training

    cycle.deliver("monday", 0)
    assert air()[0] == DONE
    whole = training.train

    def damage(inputs, run, *arguments):
        figures = whole(inputs, run, *arguments)
        for name in ("best", "last"):
            network, _ = load_checkpoint(Path(run) / f"{name}.safetensors")
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.fill_(float("nan"))
            save_checkpoint(Path(run) / f"{name}.safetensors", network)
        return figures

    monkeypatch.setattr(training, "train", damage)
    cycle.configure(gates=ALWAYS)
    cycle.deliver("tuesday", 1)
    status, said = air()
    assert status == REFUSED, said
    assert "gate finite: images for which its numbers are not finite: 4; gate encodes: encoding one image: " in said
    assert len(cycle.champions()) == 1


@pytest.mark.slow
def test_a_champion_that_a_person_moves_during_the_round_stays(
    cycle: TinyCycle, air, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from jobs import train as training

    cycle.configure(gates=ALWAYS)
    cycle.deliver("monday", 0)
    other = publish(cycle.registry, str(save_network(tmp_path / "other.safetensors", patch_size=8, stages=1)))
    whole = training.train

    def move_meanwhile(*arguments):
        promote(cycle.registry, CHAMPION, other, "an emergency")
        return whole(*arguments)

    monkeypatch.setattr(training, "train", move_meanwhile)
    status, said = air()
    assert status == REFUSED
    assert "the champion is another one than when the round began" in said
    assert "an emergency" in said
    assert cycle.champions() == [other.id]


@pytest.mark.slow
def test_without_once_rounds_follow_while_shards_arrive(
    cycle: TinyCycle, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import train as training

    cycle.configure(gates=ALWAYS, train={"steps": 2})
    cycle.deliver("monday", 0)
    whole = training.train

    def deliver_meanwhile(*arguments):
        cycle.deliver("tuesday", 1)
        return whole(*arguments)

    monkeypatch.setattr(training, "train", deliver_meanwhile)
    assert main(cycle.command[:-1]) == DONE
    assert (cycle.rounds(), len(cycle.champions())) == (2, 2)
    assert "seen 2 shards in 2 rounds" in capfd.readouterr().out


def start(cycle: TinyCycle, code: str = "") -> subprocess.Popen:
    """The cycle's command in a process group of its own, after some code."""
    program = f"import sys\n{code}\nfrom jobs.cli import main\nsys.exit(main({cycle.command!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


KILL = """
import os, signal
from pipeline.storage.local import LocalStorage
def deadly(method):
    def call(self, *arguments):
        path = next(a for a in arguments[::-1] if isinstance(a, str))
        whole = self.uri(path)
        if BEFORE and MARK in whole: os.kill(os.getpid(), signal.SIGKILL)
        result = method(self, *arguments)
        if not BEFORE and MARK in whole: os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
for name in ("write", "upload", "put_if_absent"):
    setattr(LocalStorage, name, deadly(getattr(LocalStorage, name)))
"""
"""Kills the process just before or after it writes a file whose location holds MARK."""

MARKS = [
    ("rounds/0001/round.json", False),
    ("targets/0/data/", False),
    ("targets/0/manifest/", False),
    ("run/plan.json", False),
    ("run/checkpoints/", False),
    ("run/best.safetensors", False),
    ("rounds/0001/evaluation-", False),
    ("rounds/0001/evaluation.json", True),
    ("rounds/0001/evaluation.json", False),
    ("models/versions/", False),
    ("version.json", True),
    ("version.json", False),
    ("aliases/candidate/", False),
    ("aliases/champion/", True),
    ("aliases/champion/", False),
    ("outcome.json", True),
    ("outcome.json", False),
]
"""Every step of a round: its boundary, and where it has them, its middle."""


@pytest.fixture(scope="module")
def undisturbed(photographs: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyCycle:
    """A cycle whose first round was not disturbed."""
    cycle = TinyCycle(tmp_path_factory.mktemp("undisturbed"), photographs, shards)
    cycle.deliver("monday", 0)
    assert main(cycle.command) == DONE
    return cycle


@pytest.mark.slow
@pytest.mark.parametrize(("mark", "before"), MARKS)
def test_a_round_that_is_killed_goes_on_to_the_same_history(
    cycle: TinyCycle, air, undisturbed: TinyCycle, mark: str, before: bool
) -> None:
    cycle.deliver("monday", 0)
    process = start(cycle, KILL.replace("BEFORE", str(before)).replace("MARK", repr(mark)))
    said = process.communicate(timeout=240)[0].decode()
    assert process.returncode == -signal.SIGKILL, said
    status, said = air()
    assert status == DONE, said
    if mark != "outcome.json" or before:
        assert "round 1 goes on" in said
    assert cycle.rounds() == 1
    for alias in (CHAMPION, CANDIDATE):
        expected = [(move.version, move.before) for move in history(undisturbed.registry, alias)]
        assert [(move.version, move.before) for move in history(cycle.registry, alias)] == expected
    files = [
        {Path(file.path).name: file.sha256 for file in named_version(registry, CHAMPION).files}
        for registry in (cycle.registry, undisturbed.registry)
    ]
    assert files[0]["predictor.safetensors"] == files[1]["predictor.safetensors"]
    assert air()[1].endswith("seen 1 shard in 1 round\n")


@pytest.mark.slow
def test_a_round_in_a_bucket(
    photographs: Path, shards: Path, s3_bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Shards, rounds and registry are in an object store, and the champion is named by its alias there."""
    cycle = TinyCycle(tmp_path / "cycle", photographs, shards)
    bucket = open_storage(s3_bucket)
    bucket.upload(next((shards / "data").glob("*.tar")), "incoming/monday.tar")
    places = {name: f"{s3_bucket}/{name}" for name in ("registry", "work")}
    cycle.configure(retrain={**places, "shards": f"{s3_bucket}/incoming/*.tar"}, train={"steps": 4})
    assert main(cycle.command) == DONE
    (champion,) = history(open_storage(places["registry"]), CHAMPION)
    assert find_predictor(f"registry://{s3_bucket}/registry/champion", 8).sha256.startswith(champion.version)
    capfd.readouterr()
    assert main(cycle.command) == DONE
    assert "nothing new; seen 1 shard in 1 round" in capfd.readouterr().out


@pytest.mark.slow
def test_of_two_cycles_at_once_one_says_who_works(cycle: TinyCycle, air) -> None:
    cycle.deliver("monday", 0)
    with hold(cycle.work, "retrain"):
        process = start(cycle)
        said = process.communicate(timeout=120)[0].decode()
    assert process.returncode == FAILED
    assert f"{cycle.work.uri()} is in use by retrain (pid {os.getpid()} on " in said
    assert cycle.rounds() == 0
    first, second = start(cycle), start(cycle)
    statuses = sorted(process.wait(timeout=240) for process in (first, second))
    assert statuses in ([DONE, DONE], [DONE, FAILED])  # the second may begin after the first has ended
    assert (cycle.rounds(), len(cycle.champions())) == (1, 1)


@pytest.mark.slow
def test_a_round_keeps_its_settings_until_it_ends(cycle: TinyCycle, air) -> None:
    cycle.deliver("monday", 0)
    process = start(cycle, KILL.replace("BEFORE", "False").replace("MARK", "'run/plan.json'"))
    assert process.wait(timeout=240) == -signal.SIGKILL
    cycle.configure(train={"steps": 41}, gates={"min_psnr": 1})
    status, said = air()
    assert status == FAILED
    assert "gates.min_psnr: None -> 1.0\n  train.steps: 40 -> 41\n" in said
    cycle.deliver("tuesday", 1)
    cycle.configure(runner={"num_cpus": 2})  # where it runs may change
    assert air()[0] == DONE
    assert cycle.rounds() == 1  # what arrived meanwhile waits for the next round


def test_what_a_cycle_cannot_do_is_said_before_a_round_begins(cycle: TinyCycle, air) -> None:
    cycle.deliver("monday", 0)
    for section, key, value, status, said in (
        ("retrain", "work", None, USAGE, "set work in section retrain"),
        ("retrain", "registry", None, USAGE, "AIR_REGISTRY names a registry, too"),
        ("retrain", "shards", str(cycle.folder / "nowhere"), USAGE, "does not exist, or is empty"),
        ("retrain", "frozen", str(cycle.folder / "nowhere"), USAGE, "does not exist, or is empty"),
        ("evaluate", "predictor", "grid", USAGE, "leave predictor and codec out"),
        ("train", "settings", {"channels": -1}, FAILED, "no network can be built"),
        ("distill", "predictor", "none.safetensors", FAILED, "none.json"),
        ("gates", "min_psnr", 1000, USAGE, "min_psnr"),
        ("gates", "psnr", 1, USAGE, "unknown key 'psnr'"),
    ):
        cycle.configure(**{section: {key: value}})
        reached = air()
        assert reached[0] == status, reached
        assert said in reached[1]
    assert cycle.rounds() == 0


def test_a_round_waits_for_enough_shards(cycle: TinyCycle, air) -> None:
    cycle.configure(retrain={"min_shards": 2})
    cycle.deliver("monday", 0)
    assert air() == (DONE, f"{cycle.work.uri()}: nothing new (1 of min_shards = 2); seen 0 shards in 0 rounds\n")
    assert cycle.rounds() == 0


def test_an_option_of_the_command_is_a_key_of_one_section_only() -> None:
    """Otherwise an option that is meant for a gate would also change a step."""
    own = [*RetrainConfig.model_fields, *GatesConfig.model_fields]
    assert len(own) == len(set(own))
    for step in (DistillConfig, TrainConfig, EvaluateConfig, TrainerConfig, RunnerConfig):
        assert not set(own) & set(step.model_fields)
