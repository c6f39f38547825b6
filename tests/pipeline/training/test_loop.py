"""Training in this process: it learns, it goes on exactly where it stopped, and it says why it cannot."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from air.errors import NonFiniteLossError
from air.predictor.checkpoint import load_checkpoint
from jobs.cli import main
from jobs.train import train
from pipeline.errors import LeaseHeldError, LeaseLostError, PlanMismatchError, TrainingError
from pipeline.storage.journal import Journal
from pipeline.storage.open import open_storage
from pipeline.training.audit import verify_run
from pipeline.training.batches import Feed, LocalBatch
from pipeline.training.config import TrainConfig, TrainerConfig
from pipeline.training.group import Group
from pipeline.training.log import read_metrics
from pipeline.training.loop import MakeFeed
from pipeline.training.loop import train as train_here
from pipeline.training.plan import plan_training
from pipeline.training.state import checkpoints, remove_old_checkpoints
from pipeline.work.holder import Holder
from pipeline.work.lease import describe, hold, read_standing
from tests.support.toys import bytes_without_lease

TINY: dict[str, Any] = {
    "patch_size": 8,
    "stages": 2,
    "settings": {"channels": 16, "depth": 1},
    "batch": 3,
    "min_crop": 32,
    "max_crop": 40,
    "steps": 6,
    "warmup_steps": 2,
    "learning_rate": 3e-3,
    "ema_decay": 0.5,
    "valid_images": 2,
}
INLINE: dict[str, Any] = {"executor": "inline", "threads": 1, "log_every": 1, "checkpoint_every": 2, "cache_mb": 10}


def run(shards: Path, out: Path, trainer: dict[str, Any] | None = None, **changes: Any) -> dict[str, float]:
    """A tiny run in this process."""
    config = TrainConfig.model_validate({**TINY, **changes})
    where = TrainerConfig.model_validate({**INLINE, **(trainer or {})})
    return train(str(shards), str(out), config, where, valid=str(shards))


def run_fed_by(make_feed: MakeFeed, shards: Path, out: Path, **trainer: Any) -> dict[str, float]:
    """The same run with another source of batches."""
    config, where = TrainConfig.model_validate(TINY), TrainerConfig.model_validate({**INLINE, **trainer})
    return train_here(plan_training(str(shards), str(out), config, where, str(shards)), Group(), make_feed=make_feed)


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(open_storage(out)) if "loss" in row]


@pytest.fixture(scope="module")
def whole_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run(shards, out)
    return out


def test_training_raises_the_psnr_of_validation(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "run", {"validate_every": 1, "checkpoint_every": 100}, steps=25)
    reached = [row["valid_psnr"] for row in read_metrics(open_storage(tmp_path / "run")) if "valid_psnr" in row]
    assert len(reached) == 25
    assert max(reached) > reached[0] + 0.2
    _, card = load_checkpoint(tmp_path / "run" / "best.safetensors")
    assert card.metrics["valid_psnr"] == max(reached)


def test_a_run_leaves_a_checkpoint_that_predicts_and_says_what_it_is(whole_run: Path) -> None:
    network, card = load_checkpoint(whole_run / "last.safetensors")
    assert (card.phase, card.step, card.architecture) == ("finetune", 6, "compact")
    assert card.plan
    image = torch.rand(3, 40, 32)
    prediction = network.predict(image, torch.zeros_like(image), torch.ones(20, dtype=torch.bool), 1)
    assert prediction.raw.shape == (20, 8)
    assert [step for step, _ in losses(whole_run)] == [1, 2, 3, 4, 5, 6]
    assert list((whole_run / "tensorboard").iterdir())


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    class Stopping(Feed):
        def batch(self, step: int) -> LocalBatch:
            if step == 5:
                raise Stopped
            return super().batch(step)

    with pytest.raises(Stopped):
        run_fed_by(Stopping, shards, tmp_path / "run")
    assert [step for step, _ in losses(tmp_path / "run")][-1] == 5
    figures = run(shards, tmp_path / "run")
    assert (figures["step"], figures["samples"]) == (6, 18)
    assert losses(tmp_path / "run") == losses(whole_run)
    ours, theirs = (
        safetensors.torch.load_file(next(folder.glob("checkpoints/*6/optimizer.safetensors")))
        for folder in (tmp_path / "run", whole_run)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("stops", [False, True])
def test_a_run_closes_its_feed_when_it_ends(shards: Path, tmp_path: Path, stops: bool) -> None:
    closed = []

    class Watched(Feed):
        def batch(self, step: int) -> LocalBatch:
            if stops and step == 1:
                raise TrainingError("no step 1")
            return super().batch(step)

        def close(self) -> None:
            super().close()
            closed.append(True)

    with pytest.raises(TrainingError, match="no step 1") if stops else nullcontext():
        run_fed_by(Watched, shards, tmp_path / "run")
    assert closed == [True]


def test_of_old_checkpoints_nothing_is_left_and_nothing_of_broken_ones(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "run", {"checkpoint_every": 1, "keep": 2}, steps=5)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000005"]
    (folder / "step-00000003").mkdir()
    (folder / "step-00000003" / "model.safetensors").write_bytes(b"of a run that was stopped here")
    (folder / "notes.txt").write_text("not ours to delete")
    (folder / "kept by hand").mkdir()
    (folder / "kept by hand" / "state.json").write_text("{}")
    remove_old_checkpoints(open_storage(tmp_path / "run"), keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["kept by hand", "notes.txt", "step-00000005"]


def test_a_finished_run_is_left_alone(shards: Path, whole_run: Path) -> None:
    before = (whole_run / "last.safetensors").stat().st_mtime_ns
    assert run(shards, whole_run)["step"] == 6
    assert (whole_run / "last.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["best", "last"])
@pytest.mark.parametrize("how", ["deleted", "torn"])
def test_what_a_run_keeps_is_written_again_from_its_checkpoints(
    shards: Path, whole_run: Path, tmp_path: Path, name: str, how: str
) -> None:
    """Torn, as by a stop between the weights and their card."""
    weights = shutil.copytree(whole_run, tmp_path / "run") / f"{name}.safetensors"
    before = [file.read_bytes() for file in (weights, weights.with_suffix(".json"))]
    if how == "deleted":
        weights.unlink()
    else:
        network, _ = load_checkpoint(weights)
        next(network.parameters()).data.add_(1)
        safetensors.torch.save_file(network.state_dict(), weights)
    run(shards, tmp_path / "run")
    load_checkpoint(weights)
    assert [file.read_bytes() for file in (weights, weights.with_suffix(".json"))] == before


def test_a_run_says_that_the_best_network_is_lost_where_no_checkpoint_holds_it(
    shards: Path, whole_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole_run, tmp_path / "run")
    for state in out.glob("checkpoints/*/state.json"):
        state.write_text(json.dumps({**json.loads(state.read_text()), "best_step": 1}))
    (out / "best.safetensors").unlink()
    file = tmp_path / "train.yaml"
    file.write_text(f"train: {json.dumps(TINY)}\ntrainer: {json.dumps(INLINE)}\n")
    assert main(["train", str(shards), str(out), "--config", str(file), "--valid", str(shards)]) == 0
    said = capsys.readouterr().out
    assert "the network with the best validation is lost. Last: " in said
    assert "best.safetensors" not in said
    assert "the checkpoint of its step, 1, was removed" in caplog.text


def test_status_and_verify_and_gc_know_training(
    shards: Path, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole_run, tmp_path / "run")

    def air(command: str, *options: str) -> tuple[int, str]:
        status = main([command, str(out), *options])
        said = capsys.readouterr()
        return status, said.out + said.err

    status, said = air("status")
    assert status == 0
    assert "6 of 6" in said
    assert "best validation" in said
    assert said.endswith("finished\n")
    files = bytes_without_lease(out)
    assert air("gc") == (0, f"{out}: a training run keeps no garbage; removed 0 temporary files\n")
    assert bytes_without_lease(out) == files
    status, said = air("verify")
    assert (status, "the run is finished and intact" in said) == (0, True)

    (out / "best.json").unlink()
    newest = out / "checkpoints" / "step-00000006" / "average.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    with (out / "metrics.jsonl").open("a") as stream:
        stream.write("{")
    status, said = air("verify")
    assert status == 1
    assert f"{newest} is not the file that its state.json names" in said
    assert "metrics.jsonl, line 8, is not a row of figures" in said
    with (out / "metrics.jsonl").open("r+b") as stream:
        stream.seek(-1, io.SEEK_END)
        stream.truncate()
    status, said = air("verify", "--repair")
    assert status == 1
    assert "took back checkpoints/step-00000006" in said
    assert "best.json" in said
    assert "its newest checkpoint is of step 4 of 6" in said
    assert air("status")[1].endswith(
        "not finished. If no `air train` holds the lease, run the same command again to go on.\n"
    )
    run(shards, out)
    assert air("verify")[0] == 0


def test_a_run_in_an_object_store_is_verified_and_mended(shards: Path) -> None:
    output = open_storage("memory://bucket/run")
    config, trainer = TrainConfig.model_validate({**TINY, "steps": 2}), TrainerConfig.model_validate(INLINE)
    train(str(shards), output.uri(), config, trainer, str(shards))
    assert list(verify_run(output)) == []
    output.delete("best.json")
    output.delete("last.safetensors")
    told = "\n".join(verify_run(output))
    assert "best.json" in told
    assert "last.safetensors is missing" in told
    train(str(shards), output.uri(), config, trainer, str(shards))
    assert list(verify_run(output)) == []


def test_a_second_process_in_the_same_folder_stops(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"

    class BesideAnother(Feed):
        def batch(self, step: int) -> LocalBatch:
            if step == 5:
                while not (folder / "step-00000004" / "state.json").exists():
                    time.sleep(0.01)
                shutil.copytree(folder / "step-00000004", folder / "step-00000006")
            return super().batch(step)

    with pytest.raises(TrainingError, match=r"step-00000006 is there, .* another `air train` is at work"):
        run_fed_by(BesideAnother, shards, tmp_path / "run")


def test_a_second_training_in_a_folder_is_refused_and_told_who_is_there(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with hold(open_storage(tmp_path / "run"), "train"), pytest.raises(LeaseHeldError, match=f"pid {os.getpid()} on"):
        run(shards, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    run(shards, tmp_path / "run")


def test_a_training_that_lost_its_lease_writes_nothing_more(shards: Path, tmp_path: Path) -> None:
    """Another holder appends the next number in step 3, as if this process had been stopped for long."""
    before = {}

    class Overtaken(Feed):
        def batch(self, step: int) -> LocalBatch:
            if step == 3:
                while not (tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json").exists():
                    time.sleep(0.01)
                time.sleep(0.5)  # metrics and events of the step before are written
                other = Holder.of_this_process("theft", 30).model_dump_json().encode()
                assert Journal(open_storage(tmp_path / "run"), "lease").append(1, other)
                before.update(bytes_without_lease(tmp_path / "run"))
            return super().batch(step)

    with pytest.raises(LeaseLostError, match="theft"):
        run_fed_by(Overtaken, shards, tmp_path / "run")
    assert bytes_without_lease(tmp_path / "run") == before


def test_an_interrupted_training_keeps_its_last_step(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    class Stopping(Feed):
        def batch(self, step: int) -> LocalBatch:
            if step == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return super().batch(step)

    with pytest.raises(KeyboardInterrupt):
        run_fed_by(Stopping, shards, tmp_path / "run", checkpoint_every=1000)
    (kept,) = checkpoints(open_storage(tmp_path / "run"))
    assert kept < "checkpoints/step-00000006"
    assert describe(read_standing(open_storage(tmp_path / "run"))) == "no holder"
    run(shards, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole_run)
    for name in ("model", "average", "optimizer"):
        file = Path("checkpoints", "step-00000006", f"{name}.safetensors")
        assert (tmp_path / "run" / file).read_bytes() == (whole_run / file).read_bytes()


def test_a_checkpoint_is_due_after_so_many_seconds(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "run", {"checkpoint_every": 1000, "checkpoint_seconds": 1e-3, "keep": 10}, steps=3)
    assert len(checkpoints(open_storage(tmp_path / "run"))) == 3


@pytest.mark.parametrize(("key", "value"), [("seed", 5), ("batch", 4), ("learning_rate", 1e-4)])
def test_another_plan_is_refused_with_what_differs(shards: Path, whole_run: Path, key: str, value: float) -> None:
    with pytest.raises(PlanMismatchError, match=rf"{key}: {TINY.get(key, 0)} -> {value}"):
        run(shards, whole_run, **{key: value})


def test_a_state_of_another_run_is_refused_with_a_sentence(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "run", steps=2)
    state = next(tmp_path.glob("run/checkpoints/*/state.json"))
    state.write_text(json.dumps({**json.loads(state.read_text()), "batch": 8, "step": 1}))
    with pytest.raises(TrainingError, match=r"cannot go on from .*: it differs \(there -> now\) in batch: 8 -> 3"):
        run(shards, tmp_path / "run", steps=2)


def test_a_loss_that_is_not_a_number_stops_and_names_the_samples(shards: Path, tmp_path: Path) -> None:
    class Spoilt(Feed):
        def batch(self, step: int) -> LocalBatch:
            batch = super().batch(step)
            if step == 3:
                batch.groups[0].images[0, 0, 0, 0] = float("nan")
            return batch

    with pytest.raises(NonFiniteLossError, match=r"step 3, with the samples photographs\S*/\w+-\w{8}.*step-00000002"):
        run_fed_by(Spoilt, shards, tmp_path / "run")
    network, _ = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in network.state_dict().values())
    assert run(shards, tmp_path / "run")["step"] == 6


def test_a_checkpoint_of_another_patch_size_is_refused(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"has patch size 8, the run 5: set patch_size to 8"):
        run(shards, tmp_path / "run", **{"from": str(whole_run / "best.safetensors"), "patch_size": 5})


def test_training_goes_on_from_a_checkpoint(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    begun = str(whole_run / "last.safetensors")
    run(
        shards,
        tmp_path / "run",
        **{"from": begun, "steps": 1, "learning_rate": 1e-9, "ema_decay": 0.0, "weight_decay": 0},
    )
    before, after = (safetensors.torch.load_file(file) for file in (begun, tmp_path / "run" / "last.safetensors"))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_later_stages_join_as_copies(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "run", {"log_every": 1, "validate_every": 1}, stage_starts=[0, 0.5], steps=4)
    rows = read_metrics(open_storage(tmp_path / "run"))
    stages = [sum(name.startswith("valid_gaussians") for name in row) for row in rows if "valid_psnr" in row]
    assert stages == [1, 1, 2, 2]


def test_other_pictures_to_validate_on_are_another_plan(shards: Path, photographs: Path, tmp_path: Path) -> None:
    """Wherever they lie: what counts is what they are."""
    config, trainer = TrainConfig.model_validate({**TINY, "steps": 1}), TrainerConfig.model_validate(INLINE)
    arguments = (str(shards), str(tmp_path / "run"), config, trainer)
    here, there = (shutil.copytree(photographs, tmp_path / name) for name in ("here", "there"))
    train(*arguments, str(here))
    train(*arguments, str(there))
    (there / "astronaut.png").unlink()
    message = r"validation: 4 pictures, names and sizes \w+ -> 3 pictures, names and sizes"
    with pytest.raises(PlanMismatchError, match=message):
        train(*arguments, str(there))


def test_packaged_pictures_to_validate_on_are_copied_whole(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("skimage.data", reason="the pictures come with scikit-image")
    config = TrainConfig.model_validate({**TINY, "steps": 1, "valid_images": 1, "valid_side": 16})
    arguments = (str(shards), str(tmp_path / "run"), config, TrainerConfig.model_validate(INLINE))
    train(*arguments)
    kept = tmp_path / "run" / "validation"
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    assert len(before) == 12
    next(kept.iterdir()).unlink()  # as a stop in the middle of copying leaves it
    train(*arguments)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--valid", "nowhere"], "nowhere does not exist, or is empty"),
        (["--architecture", "compcat"], "unknown architecture 'compcat'; known are compact, dinov3"),
        (["--settings", '{"chanels": 8}'], "has no setting chanels; it has channels, colour_iterations, depth"),
        (["--settings", '{"depth": 0}'], "depth must be a whole number, at least 1, got 0"),
        (["--settings", '{"num_stages": 3}'], "settings holds num_stages, which is not set there: use stages"),
        (["--settings", "x"], "'x' is not a JSON object, such as '{\"name\": 1}'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    given = ["train", str(shards), str(tmp_path / "run"), "--executor", "inline", "--valid", str(shards), *options]
    assert main(given) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_within_its_input_is_refused(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(shards), str(shards / "run"), "--executor", "inline"]) == 2
    assert f"the output {shards / 'run'} lies in the input {shards}" in capsys.readouterr().err
    assert main(["train", str(shards), str(shards.parent), "--executor", "inline"]) == 2
    assert f"the input {shards} lies in the output {shards.parent}" in capsys.readouterr().err


def test_the_command_trains_from_a_configuration_file(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(f"train: {json.dumps({**TINY, 'steps': 100})}\ntrainer: {json.dumps(INLINE)}\n")
    options = ["--config", str(file), "--steps", "1", "--valid", str(shards)]
    assert main(["train", str(shards), str(tmp_path / "run"), *options]) == 0
    assert "1 steps, 3 samples" in capsys.readouterr().out
    assert main(["train", str(shards), str(tmp_path / "other"), "--settings", "[]"]) == 2
    assert main(["train", str(shards), str(tmp_path / "other"), "--executor", "inline", "--workers", "2"]) == 2
