"""docs/cluster.md, followed on a Ray cluster of two nodes on this machine, with an S3 server on loopback.

The commands run as they are written. Only the head's address and the ports are others, so that nothing else on the
machine is in the way, and the storage's variables lead to the server on loopback.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.cli import COMMANDS
from jobs.command import check_command
from pipeline.inputs.shards import list_shards
from pipeline.storage.open import open_storage
from pipeline.work.manifest import read_manifests
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
TYPED_BY_HAND = ("pip install ", "scp ", "export AWS_")
"""Commands that the walk leaves out: the package is there, the second node is this machine, the storage is another."""


def commands_of(section: str) -> list[str]:
    """The commands of a section of the page, in order."""
    text = re.split(r"\n#{2,3} ", PAGE.partition(f"## {section}\n")[2])[0]
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


def all_commands() -> list[str]:
    return re.findall(r"^\$ (.*)$", PAGE, re.MULTILINE)


def ours() -> list[str]:
    return [line for line in all_commands() if line.startswith("air ")]


@pytest.mark.parametrize("line", sorted(set(ours())))
def test_every_command_of_the_page_is_one_of_ours(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `air submit` with the command that they submit."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)[1:]
    if words[0] == "submit":
        place = words.index("--address")
        words = [word for word in (*words[1:place], *words[place + 2 :]) if word != "--no-wait"]
    assert words[0] in COMMANDS
    check_command(words[0], words[1:])


def test_the_configurations_that_jobs_ask_for_are_given_to_them() -> None:
    """The ConfigMap has every file that a manifest of configs/cluster/ names in /etc/air."""
    (line,) = [line for line in all_commands() if "configmap air-config" in line]
    given = {Path(name).name for name in re.findall(r"--from-file=(\S+)", line)}
    manifests = "".join(path.read_text() for path in (ROOT / "configs" / "cluster").glob("rayjob-*.yaml"))
    assert given == set(re.findall(r"--config /etc/air/(\S+)", manifests))


STATUS_SECONDS = 60
"""Within this time a node that has started is in Ray's status."""


class Walk:
    """Types a document's commands into a shell, in order.

    Attributes:
        said: What the commands printed, by command.
    """

    def __init__(self, environment: dict[str, str], folder: Path, replaced: dict[str, str]) -> None:
        self.said: dict[str, str] = {}
        self._environment = environment
        self._folder = folder
        self._replaced = replaced
        self._foreground: list[subprocess.Popen[bytes]] = []

    def type(self, command: str) -> None:
        """Runs a command to its end; one with --block in a terminal of its own."""
        line = command
        for written, here in self._replaced.items():
            line = line.replace(written, here)
        if line.startswith("ray start "):  # the agent of another Ray on this machine may have the usual port
            line = line.replace("ray start", f"ray start --dashboard-agent-listen-port={free_port()}")
        if line.startswith("export "):
            self._environment.update(word.split("=", 1) for word in shlex.split(line)[1:])
            return
        if line.endswith(" --block"):
            log = (self._folder / f"node-{len(self._foreground)}.log").open("wb")
            process = subprocess.Popen(
                shlex.split(line), env=self._environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
            self._foreground.append(process)
            self._until_started(Path(log.name), process)
            return
        done = subprocess.run(
            line, shell=True, env=self._environment, cwd=ROOT, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        self.said[command] = done.stdout

    def type_until(self, command: str, holds: Callable[[str], bool]) -> None:
        """Runs a command again until its output says so: Ray's status is some seconds behind."""
        deadline = time.monotonic() + STATUS_SECONDS
        while not holds(self.said.get(command, "")):
            assert time.monotonic() < deadline, self.said.get(command)
            time.sleep(1)
            self.type(command)

    def _until_started(self, log: Path, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + 120
        while b"Ray runtime started" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)

    def leave(self) -> None:
        """Ends the nodes, the head last."""
        for process in reversed(self._foreground):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def walk(s3_bucket: str, photographs: Path) -> Iterator[Walk]:
    """A shell with the photographs in s3://bucket/photos, and a home of its own, where Ray's token will lie."""
    pytest.importorskip("ray.train", reason="training on Ray needs ray[train]")
    store = open_storage(f"{s3_bucket}/photos")
    for file in photographs.iterdir():
        store.write(file.name, file.read_bytes())
    folder = Path(tempfile.mkdtemp(prefix="walk-", dir="/tmp"))  # short: Ray makes sockets below it
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TMPDIR": str(folder),
        "HOME": str(folder),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    replaced = {"10.0.0.1": "127.0.0.1", "6379": str(free_port()), "8265": str(free_port())}
    shell = Walk(environment, folder, replaced)
    try:
        yield shell
    finally:
        shell.leave()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_the_page_is_followed_from_two_nodes_to_submitted_jobs(walk: Walk, s3_bucket: str) -> None:
    """In one test, as the sections follow each other."""
    for command in (*commands_of("A Ray cluster by hand"), *commands_of("From a machine outside")):
        if not command.startswith(TYPED_BY_HAND):
            walk.type(command)
        if command.startswith("ray status"):
            walk.type_until(command, lambda said: len(re.findall(r"^ 1 node_\w+$", said, re.MULTILINE)) == 2)

    shards, targets, encoded, more = (
        open_storage(f"{s3_bucket}/{name}") for name in ("shards", "targets", "encoded", "more")
    )
    assert sum(unit.samples for unit in list_shards(shards)) == 4
    for output in (targets, encoded, more):
        assert sum(manifest.samples for manifest in read_manifests(output)) == 4
    assert {"best.safetensors", "last.safetensors"} <= {path for path, _ in open_storage(f"{s3_bucket}/run").list()}

    submitted, left = (walk.said[line] for line in commands_of("From a machine outside")[:2])
    assert submitted.startswith("submitted air-distill-")
    assert "of 4 images" in submitted
    assert "the job goes on. Its log: `ray job logs --follow air-verify-" in left
    assert left.split()[1] in walk.said[commands_of("From a machine outside")[2]]
