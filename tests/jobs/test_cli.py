"""The command line: arguments, printed text and messages, and the exit status 0 (done), 1 (failed) or 2 (usage)."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

import air
from jobs.cli import COMMANDS, main
from jobs.sections import sections
from pipeline.config import read_sections
from pipeline.inputs.shards import list_shards
from pipeline.storage.open import open_storage
from tests.support import toys
from tests.support.paths import ROOT

DONE, FAILED, USAGE = 0, 1, 2
INLINE = ("--executor", "inline")


class Said(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run_air(capfd: pytest.CaptureFixture[str]):
    """Runs one command line in this process."""

    def run(*arguments: object) -> Said:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return Said(status, *capfd.readouterr())

    return run


@pytest.fixture
def shards(run_air, pictures: Path, tmp_path: Path) -> Path:
    """The output of `air shard`: three shards of two pictures."""
    assert run_air("shard", pictures, tmp_path / "shards", "--max-count", 2, *INLINE).status == DONE
    return tmp_path / "shards"


def test_shard_says_what_it_did(run_air, pictures: Path, tmp_path: Path):
    (pictures / "bad.png").write_bytes(b"")
    said = run_air("shard", pictures, tmp_path / "out", "--max-count", 3, *INLINE)
    assert said.status == DONE
    assert re.fullmatch(r"6 images \(0\.0 MB\) in 3 shards; 1 quarantined \(empty 1\)\. Output: .*/out\n", said.out), (
        said.out
    )
    assert len(list_shards(open_storage(tmp_path / "out"))) == 3


def test_shard_takes_relative_paths_and_several_inputs(run_air, pictures: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_air("shard", "pictures/0.png", "pictures/below", "pictures/[34].png", "out", *INLINE).status == DONE
    units = list_shards(open_storage(tmp_path / "out"))
    assert [unit.samples for unit in units] == [5]


def test_shard_again_goes_on_and_with_another_plan_is_refused(run_air, shards: Path, pictures: Path):
    manifest = shards / "manifest" / "shard-00001.json"
    manifest.unlink()
    untouched = (shards / "manifest" / "shard-00000.json").stat()
    again = run_air("shard", pictures, shards, "--max-count", 2, *INLINE)
    assert (again.status, manifest.exists()) == (DONE, True)
    assert (shards / "manifest" / "shard-00000.json").stat() == untouched

    other = run_air("shard", pictures, shards, "--max-count", 3, *INLINE)
    assert other.status == FAILED
    assert "belongs to another plan" in other.err
    assert "max_count: 2 -> 3" in other.err
    (pictures / "new.png").write_bytes(toys.encode_picture(9))
    assert run_air("shard", pictures, shards, "--max-count", 2, *INLINE).status == FAILED


def test_shard_refuses_to_write_into_what_it_reads(run_air, pictures: Path, monkeypatch):
    """Otherwise the second run would take the shards of the first run for input."""
    monkeypatch.chdir(pictures)
    said = run_air("shard", ".", "shards", *INLINE)
    assert said.status == USAGE
    assert "lies in the input" in said.err
    assert not (pictures / "shards").exists()


@pytest.mark.parametrize("command", ["shard", "distill", "train", "encode", "decode"])
def test_a_missing_input_is_one_sentence_in_every_job(run_air, tmp_path: Path, command: str):
    said = run_air(command, tmp_path / "nowhere", tmp_path / "out", *INLINE)
    assert said.status == USAGE
    assert f"{tmp_path / 'nowhere'} does not exist, or is empty" in said.err
    assert not (tmp_path / "out").exists()


def test_shard_without_images_or_with_too_many_bad_ones(run_air, pictures: Path, tmp_path: Path):
    said = run_air("shard", tmp_path / "nowhere", tmp_path / "out", *INLINE)
    assert said.status == USAGE
    assert f"{tmp_path / 'nowhere'} does not exist, or is empty" in said.err
    for file in pictures.rglob("*.png"):
        file.write_bytes(b"no picture")
    said = run_air("shard", pictures, tmp_path / "out", *INLINE)
    assert said.status == FAILED
    first, *shown, more, last = said.err.splitlines()
    assert "6 of 6 images are bad (not_an_image 6)" in first
    assert len(shown) == 3
    for line in shown:  # the key, the file, what is wrong with it, the reason
        assert re.match(r"  pictures/(below/)?(\d)-[0-9a-f]{8}: pictures/(below/)?\2\.png: .+ \(not_an_image\)$", line)
    assert more == "  and 3 more"
    assert str(tmp_path / "out" / "quarantine") in last


def test_status_of_a_finished_and_of_an_unfinished_job(run_air, shards: Path):
    said = run_air("status", shards)
    assert said.status == DONE
    assert re.search(r"job\W+shard\b", said.out)
    assert re.search(r"shards done\W+3 of 3", said.out)
    assert re.search(r"images seen\W+6\b", said.out)
    assert "none quarantined" in said.out
    assert said.out.endswith("complete\n")
    (shards / "manifest" / "shard-00001.json").unlink()
    said = run_air("status", shards)
    assert said.status == DONE
    assert re.search(r"shards done\W+2 of 3", said.out)
    assert "to do: shard-00001. Run the same `air shard` again to go on." in said.out


def test_status_shows_names_as_they_are(run_air, shards: Path):
    moved = shards.rename(shards.parent / "run [final]")
    assert "run [final]" in run_air("status", moved).out


def test_verify_of_an_intact_and_of_a_damaged_output(run_air, shards: Path):
    said = run_air("verify", shards)
    assert said.status == DONE
    assert "verified 3 shards, 3 files, 6 rows" in said.out
    assert "complete and intact" in said.out

    tar = next((shards / "data").glob("shard-00000-*.tar"))
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    (shards / "manifest" / "shard-00002.json").write_text("{")
    said = run_air("verify", shards)
    assert said.status == FAILED
    assert f"data/{tar.name} is damaged" in said.err
    assert "shard-00002.json is not a manifest" in said.err
    assert "unit shard-00002 is not done" in said.err
    assert f"{shards}: 3 problems" in said.err


def test_one_of_a_thing_is_no_plural(run_air, pictures: Path, tmp_path: Path):
    said = run_air("shard", pictures / "0.png", tmp_path / "one", *INLINE)
    assert said.out.startswith("1 image (0.0 MB) in 1 shard; none quarantined")
    assert "verified 1 shard, 1 file, 1 row, " in run_air("verify", tmp_path / "one").out
    next((tmp_path / "one" / "manifest").iterdir()).unlink()
    assert "1 problem. The job's own command" in run_air("verify", tmp_path / "one").err


def test_gc_removes_what_killed_attempts_left(run_air, shards: Path):
    before = toys.bytes_without_lease(shards)
    (shards / "data" / "shard-00000-killed.tar").write_bytes(bytes(2_000_000))
    (shards / "quarantine").mkdir()
    (shards / "quarantine" / "shard-00000-killed.parquet").write_bytes(b"x")
    temporary = shards / "data" / ".tmp-0123"
    temporary.touch()
    os.utime(temporary, (0, 0))
    said = run_air("gc", shards)
    assert said.status == DONE
    assert "removed 2 files (2.0 MB) and 1 temporary file" in said.out
    assert toys.bytes_without_lease(shards) == before
    assert run_air("verify", shards).status == DONE


@pytest.mark.parametrize("command", ["status", "verify", "gc"])
def test_a_folder_that_is_no_output_is_left_alone(run_air, tmp_path: Path, command: str):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.doc").touch()
    said = run_air(command, tmp_path)
    assert said.status == FAILED
    assert "is not the output of a job" in said.err
    assert (tmp_path / "data" / "thesis.doc").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_and_shows_the_default_of_every_option(run_air, command: str):
    said = run_air(command, "--help")
    assert said.status == DONE
    assert f"usage: air {command}" in said.out
    fields = sections()[command].model_fields if command in sections() else {}
    options = " ".join(said.out.partition("\noptions:")[2].split())
    flags = [(field.alias or name).replace("_", "-") for name, field in fields.items()]
    without = [flag for flag in flags if not re.search(rf"--{flag}(, --no-{flag})? ((?! --).)*default: ", options)]
    assert without == []


def test_help_shows_bounds_units_and_defaults(run_air):
    said = " ".join(run_air("shard", "--help").out.split())
    assert "--max-count N" in said
    assert "most images in a shard (>= 1 and <= 1000000; default: 256)" in said
    assert "--check {decode,header}" in said
    assert "--executor {ray,inline}" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["shard", "in", "out", "--max-cuont", "3"], "unrecognized arguments: --max-cuont"),
        (["shard", "in", "out", "--max-coun", "3"], "unrecognized arguments: --max-coun"),
        (["shard", "in", "out", "--check", "twice"], "invalid choice: 'twice'"),
        (["shard", "in", "out", "--max-count"], "expected one argument"),
        (["shard", "in"], "required: OUT"),
        (["status"], "required: OUT"),
        (["status", "out", "--max-count", "3"], "unrecognized arguments: --max-count"),
        (["shard", "in", "out", "--max-count", "many"], "max_count = 'many'"),
        (["shard", "in", "out", "--max-count", "0"], "greater than or equal to 1"),
        (["shard", "in", "out", "--num-cpus", "nan"], "num_cpus = 'nan'"),
        (["shard", "in", "out", "--max-bad-share", "1.5"], "less than or equal to 1"),
        (["shard", "in", "ftp://host/out"], "ftp:// is not supported"),
    ],
)
def test_wrong_usage_is_explained(run_air, pictures: Path, monkeypatch, arguments: list[str], said: str):
    monkeypatch.chdir(pictures.parent)
    pictures.rename(pictures.parent / "in")
    answer = run_air(*arguments)
    assert said in answer.err
    assert answer.status == (FAILED if "ftp" in said else USAGE)
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("typed", "meant"), [("shrad", "shard"), ("stat", "stats"), ("verfy", "verify"), ("quux", None)]
)
def test_an_unknown_command_is_named_and_the_nearest_suggested(run_air, typed: str, meant: str | None):
    said = run_air(typed)
    assert said.status == USAGE
    assert f"unknown command '{typed}'" in said.err
    assert (f"did you mean '{meant}'?" in said.err) == (meant is not None)
    assert "commands:" in said.err


def test_the_overview_lists_every_command(run_air):
    for arguments, status in (((), USAGE), (("--help",), DONE), (("help",), DONE)):
        said = run_air(*arguments)
        assert said.status == status
        assert all(f"\n  {command} " in said.out for command in COMMANDS)
    assert run_air("--version") == (DONE, f"air {air.__version__}\n", "")


@pytest.mark.parametrize(
    ("command", "typed", "now"),
    [
        ("distill", "--rate 2", "--rate is now called --learning-rate-factor"),
        ("evaluate", "--rate=2", "--rate is now called --learning-rate-factor"),
        ("fit", "--rate 2", "--rate is now called --learning-rate-factor"),
        ("train", "--rate 0.1", "--rate is now called --learning-rate"),
        ("train", "--final-share 0.1", "--final-share is now called --final-fraction"),
        ("train", "--clip 1", "--clip is now called --max-grad-norm"),
    ],
)
def test_a_former_option_is_refused_with_its_new_name(run_air, command: str, typed: str, now: str):
    said = run_air(command, "in", "out", *typed.split())
    assert said.status == USAGE
    assert f"({now})\n" in said.err


def write_config(folder: Path, text: str) -> Path:
    file = folder / "air.yaml"
    file.write_text(text)
    return file


def test_a_file_configures_and_options_win_over_it(run_air, pictures: Path, tmp_path: Path):
    file = write_config(tmp_path, "shard:\n  max_count: 2\n  check: header\nrunner:\n  executor: inline\n")
    out = tmp_path / "out"
    assert run_air("shard", pictures, out, "--config", file, "--max-count", 4).status == DONE
    config = json.loads((out / "plan.json").read_text())["config"]
    assert (config["max_count"], config["check"]) == (4, "header")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("shard:\n  max_cuont: 2\n", ["section 'shard'", "unknown key 'max_cuont'", "did you mean 'max_count'?"]),
        ("distill:\n  patch_sise: 7\n", ["section 'distill'", "'patch_sise'", "did you mean 'patch_size'?"]),
        ("runner:\n  num_gpu: 1\n", ["section 'runner'", "'num_gpu'", "did you mean 'num_gpus'?"]),
        ("fit:\n  rate: 2\n", ["section 'fit'", "unknown key 'rate': it is now called 'learning_rate_factor'"]),
        ("evaluate:\n  rate: 2\n", ["unknown key 'rate': it is now called 'learning_rate_factor'"]),
        ("distill:\n  rate: 2\n", ["unknown key 'rate': it is now called 'learning_rate_factor'"]),
        ("train:\n  rate: 1\n", ["section 'train'", "unknown key 'rate': it is now called 'learning_rate'"]),
        ("train:\n  clip: 1\n", ["unknown key 'clip': it is now called 'max_grad_norm'"]),
        ("train:\n  final_share: 1\n", ["unknown key 'final_share': it is now called 'final_fraction'"]),
        ("shards:\n  max_count: 2\n", ["unknown section 'shards'", "did you mean 'shard'?"]),
        ("shard:\n  max_count: .inf\n", ["max_count = inf"]),
        ("shard: {\n", ["not valid YAML"]),
    ],
)
def test_a_misspelt_file_is_refused_whoever_asks(run_air, pictures: Path, tmp_path: Path, text: str, said: list[str]):
    file = write_config(tmp_path, text)
    answer = run_air("shard", pictures, tmp_path / "out", "--config", file, *INLINE)
    assert answer.status == USAGE
    assert [part for part in [str(file), *said] if part not in answer.err] == []
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_wrong_usage(run_air, pictures: Path, tmp_path: Path):
    answer = run_air("shard", pictures, tmp_path / "out", "--config", tmp_path / "nowhere.yaml")
    assert answer.status == USAGE
    assert "nowhere.yaml" in answer.err


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_configuration_of_the_project_can_be_read(file: Path):
    assert read_sections(file, sections())


def air_process(*arguments: object, **options) -> subprocess.Popen:
    """`air` in a process of its own. ^C reaches it even where these tests ignore ^C, as under `nohup make test &`:
    a child inherits the signals that its parent ignores, but not the signals that its parent handles.
    """
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    finally:
        signal.signal(signal.SIGINT, before)


def test_exit_statuses_reach_the_shell(shards: Path, tmp_path: Path):
    for arguments, status in ((("verify", shards), DONE), (("verify", tmp_path), FAILED), (("verify",), USAGE)):
        process = air_process(*arguments)
        _, err = process.communicate(timeout=120)
        assert process.returncode == status, err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("stop", "status", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_stopped_run_says_so_and_goes_on(
    pictures: Path, tmp_path: Path, stop: signal.Signals, status: int, said: str
):
    """^C, or SIGTERM from a scheduler, stops a run without a traceback, and the same command finishes the job."""
    for number in range(10, 160):
        shutil.copyfile(pictures / "0.png", pictures / f"{number}.png")
    command = ("shard", pictures, tmp_path / "out", "--max-count", 1, *INLINE)
    process = air_process(*command)
    manifests = tmp_path / "out" / "manifest"
    while process.poll() is None and not list(manifests.glob("*.json")):
        time.sleep(0.01)
    process.send_signal(stop)
    _, err = process.communicate(timeout=120)
    assert process.returncode == status
    assert err == f"air shard: {said}; run the same command again to go on\n"
    assert 0 < len(list(manifests.glob("*.json"))) < 156
    process = air_process(*command)
    out, err = process.communicate(timeout=120)
    assert process.returncode == DONE, err
    assert out.startswith("156 images")


def test_a_log_level_that_is_none_is_no_crash(run_air, shards: Path, monkeypatch):
    monkeypatch.setenv("AIR_LOG_LEVEL", "loud")
    said = run_air("status", shards)
    assert said.status == USAGE
    assert "AIR_LOG_LEVEL=LOUD is not a log level" in said.err


@pytest.mark.slow
def test_shard_on_a_ray_of_its_own(pictures: Path, tmp_path: Path):
    process = air_process("shard", pictures, tmp_path / "out", "--max-count", 2, "--executor", "ray")
    out, err = process.communicate(timeout=300)
    assert process.returncode == DONE, err
    assert out.startswith("6 images")
    assert err == ""
    assert [unit.samples for unit in list_shards(open_storage(tmp_path / "out"))] == [2, 2, 2]


@pytest.mark.slow
def test_a_ray_of_its_own_ends_with_the_job_that_a_scheduler_ends(pictures: Path, tmp_path: Path):
    """Left to itself, Ray would exit with a report of a crash."""
    for number in range(10, 160):
        shutil.copyfile(pictures / "0.png", pictures / f"{number}.png")
    process = air_process("shard", pictures, tmp_path / "out", "--max-count", 1, "--executor", "ray")
    manifests = tmp_path / "out" / "manifest"
    while process.poll() is None and not list(manifests.glob("*.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert err == "air shard: terminated; run the same command again to go on\n"


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_job_does_not_join_the_ray_of_another(pictures: Path, tmp_path: Path):
    """That Ray would end with its owner. It has more slots than there are cores, so a job that joined it would fit."""
    process = air_process("shard", pictures, tmp_path / "out", "--num-cpus", (os.cpu_count() or 1) + 1)
    _, err = process.communicate(timeout=300)
    assert process.returncode == USAGE, err
    assert "but this machine has" in err


@pytest.mark.slow
def test_a_cluster_that_cannot_be_reached_and_one_that_is_too_small(pictures: Path, tmp_path: Path):
    for options, said in (
        (("--address", "127.0.0.1:1"), "cannot reach the Ray cluster 127.0.0.1:1"),
        (("--num-gpus", "64"), "num_gpus = 64, but this machine has"),
    ):
        process = air_process("shard", pictures, tmp_path / "out", *options)
        _, err = process.communicate(timeout=300)
        assert process.returncode == USAGE, err
        assert said in err
        assert "Traceback" not in err


def test_training_by_pod_says_what_is_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "missing"), str(tmp_path / "run"), "--phase", "pod"]) != 0
    assert "--phase finetune reached a better network" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "missing"), str(tmp_path / "run"), "--phase", "finetune"]) != 0
    assert "reached a better network" not in capsys.readouterr().out
