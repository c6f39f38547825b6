"""`air registry`: what it says, and its exit statuses."""

from pathlib import Path

import pytest

from jobs.cli import main
from tests.support.networks import save_network

DONE, FAILED, USAGE = 0, 1, 2


@pytest.fixture
def air(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs `air registry` with the registry `models` in a new folder, and returns the exit status and what was said."""
    monkeypatch.chdir(tmp_path)

    def run(action: str, *arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        status = main(["registry", action, "models", *arguments])
        return status, "".join(capfd.readouterr())

    return run


def add(air, seed: int, *options: str) -> str:
    """Adds a network; returns the digits of its version."""
    save_network(Path(f"{seed}.safetensors"), seed=seed, metrics={"valid_psnr": 30.0 + seed})
    status, said = air("add", f"{seed}.safetensors", *options)
    assert status == DONE
    assert said.startswith("@")
    return said.split()[0]


def test_from_the_first_version_to_a_rollback(air) -> None:
    assert air("list") == (DONE, "models holds no version; `air registry add` adds one\n")
    Path("figures.parquet").write_bytes(b"x")
    first, second = add(air, 0), add(air, 1, "--evidence", "figures.parquet")
    assert add(air, 1) == second
    assert air("promote", first, "--reason", "begin", "--expect", "none") == (DONE, f"champion: nothing -> {first}\n")
    assert air("promote", second, "--reason", "better", "--expect", first) == (DONE, f"champion: {first} -> {second}\n")
    status, said = air("promote", first, "--reason", "late", "--expect", first)
    assert status == FAILED
    assert f"champion of {Path.cwd()}/models points to {second[1:]}" in said
    assert air("promote", "champion", "--alias", "stable", "--reason", "a week old")[0] == DONE

    status, said = air("list")
    assert status == DONE
    rows = [line.split("│") for line in said.splitlines() if line.startswith("│")]
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [(first, "-"), (second, "champion, stable")]
    assert "valid_psnr 31" in said
    status, said = air("show")
    assert status == DONE
    for word in (second, "evidence/figures.parquet", "sha256", "begin", "better"):
        assert word in said
    assert air("rollback", "--reason", "worse") == (DONE, f"champion: {second} -> {first}\n")
    status, said = air("rollback", "--reason", "worse")
    assert status == FAILED
    assert "nothing to go back to" in said


def test_gc_lists_and_then_removes(air) -> None:
    first, second = add(air, 0), add(air, 1)
    air("promote", first, "--reason", "begin")
    assert air("gc") == (DONE, "removed 0 versions and 0 incomplete publications\n")
    status, said = air("gc", "--days", "0", "--dry-run")
    assert status == DONE
    assert said.startswith(second)
    assert said.endswith("would remove 1 version and 0 incomplete publications\n")
    assert air("show", second)[0] == DONE
    status, said = air("gc", "--days", "0")
    assert said.startswith(second)
    assert said.endswith("removed 1 version and 0 incomplete publications\n")
    assert air("show", second)[0] == FAILED
    assert air("show", first)[0] == DONE


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["lst", "models"], USAGE, "invalid choice: 'lst'"),
        ([], USAGE, "ACTION"),
        (["--keep=3", "gc", "models"], USAGE, "unrecognized arguments: --keep"),
        (["promote", "models", "@1234"], USAGE, "--reason"),
        (["promote", "models", "@1234", "--reason", "x"], FAILED, "is no registry"),
        (["show", "models"], FAILED, "is no registry"),
        (["gc", "models", "--keep", "-1"], USAGE, "not a number of 0 or more"),
        (["gc", "models", "--days", "nan"], USAGE, "not a number of 0 or more"),
        (["add", "models", "none.safetensors"], FAILED, "none.json"),
        (["add", "models", "none.pt"], FAILED, "NAME.safetensors"),
        (["add", "models", "x.safetensors", "--evidence", "a/x", "--evidence", "b/x"], USAGE, "the same file name"),
        (["show", "registry://models"], FAILED, "registry:// is not supported"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    arguments: list[str], status: int, said: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["registry", *arguments]) == status
    assert said in capfd.readouterr().err
    assert not (tmp_path / "models").exists()


def test_every_action_has_a_help_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    options = {"promote": "--expect", "rollback": "--reason", "gc": "--dry-run", "add": "--evidence"}
    for action, option in options.items():
        assert main(["registry", action, "--help"]) == DONE
        assert option in capfd.readouterr().out
