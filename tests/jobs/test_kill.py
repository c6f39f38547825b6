"""Commits survive `kill -9`: the same command keeps them and does only the rest again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.distill import distill
from jobs.encode import encode
from jobs.shard import shard
from pipeline.bulk.distill import DistillConfig
from pipeline.bulk.encode import EncodeConfig
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.formats import images
from pipeline.storage.open import open_storage
from pipeline.work.audit import verify
from pipeline.work.manifest import committed_units, read_manifests
from tests.support.toys import committed_bytes

INLINE = RunnerConfig(executor="inline")
CONFIG = DistillConfig(patch_size=8, stages=2, steps=(25,), min_view_pixels=10_000, max_view_pixels=20_000)
ENCODE = EncodeConfig(pixels_per_gaussian=60, steps=40, stored_steps=10)
NUM_SHARDS = 6


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighteen generated images in six shards."""
    folder = tmp_path_factory.mktemp("kill")
    (folder / "in").mkdir()
    random = np.random.default_rng(0)
    for number in range(3 * NUM_SHARDS):
        coarse = random.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        (folder / "in" / f"{number:02d}.png").write_bytes(images.encode_png(coarse.repeat(16, 0).repeat(16, 1)))
    shard([str(folder / "in")], str(folder / "shards"), ShardConfig(max_count=3), INLINE)
    return folder / "shards"


@pytest.fixture(scope="module")
def undisturbed(shards: Path) -> pa.Table:
    """The rows of a run without a kill."""
    distill(str(shards), str(shards.parent / "undisturbed"), CONFIG, INLINE)
    return rows_of(shards.parent / "undisturbed")


def rows_of(folder: Path) -> pa.Table:
    """Everything under data/, whether or not a manifest names it, in a fixed order."""
    tables = [pq.read_table(file) for file in sorted((folder / "data").glob("*.parquet"))]
    return pa.concat_tables(tables).sort_by([("key", "ascending"), ("view", "ascending")])


def start_job(shards: Path, output: Path, executor: str) -> subprocess.Popen:
    """`air distill` in a process group of its own."""
    steps = ",".join(map(str, CONFIG.steps))
    options = ["--patch-size", "8", "--stages", "2", "--steps", steps]
    options += ["--min-view-pixels", "10000", "--max-view-pixels", "20000"]
    return start("distill", shards, output, executor, options)


def start(job: str, shards: Path, output: Path, executor: str, options: list[str]) -> subprocess.Popen:
    """A job in a process group of its own."""
    command = [sys.executable, "-m", "jobs.cli", job, str(shards), str(output), "--executor", executor, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 120) -> None:
    """Waits until the condition holds; fails if the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def ray_workers(process: subprocess.Popen) -> list[psutil.Process]:
    """Processes of the job's own Ray that are running a task."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any("ray::_work" in part for part in child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def check_resumed(shards: Path, output: Path, undisturbed: pa.Table, executor: str) -> None:
    """The same command ends well, and its rows equal the rows of the undisturbed run, value by value."""
    process = start_job(shards, output, executor)
    text = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, text
    assert list(verify(open_storage(output))) == []
    assert rows_of(output).equals(undisturbed)


def test_kill_of_an_inline_driver(shards: Path, undisturbed: pa.Table, tmp_path: Path) -> None:
    output = tmp_path / "targets"
    process = start_job(shards, output, "inline")
    wait_for(lambda: len(committed_units(open_storage(output))) >= 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {manifest.unit: manifest for manifest in read_manifests(open_storage(output))}
    assert 0 < len(before) < NUM_SHARDS
    check_resumed(shards, output, undisturbed, "inline")
    after = {manifest.unit: manifest for manifest in read_manifests(open_storage(output))}
    assert {unit: after[unit] for unit in before} == before  # committed units were not done again


@pytest.mark.slow
def test_kill_of_a_ray_driver(shards: Path, undisturbed: pa.Table, tmp_path: Path) -> None:
    output = tmp_path / "targets"
    process = start_job(shards, output, "ray")
    wait_for(lambda: len(committed_units(open_storage(output))) >= 1, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    check_resumed(shards, output, undisturbed, "ray")


def survive_the_loss_of_a_worker(process: subprocess.Popen, output: Path) -> None:
    """Kills a busy worker after the first commit; the job must still end well."""
    wait_for(lambda: ray_workers(process) and committed_units(open_storage(output)), process)
    victims = ray_workers(process)
    assert victims, "no worker was at work"
    victims[0].kill()
    text = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, text


@pytest.mark.slow
def test_kill_of_a_ray_worker(shards: Path, undisturbed: pa.Table, tmp_path: Path) -> None:
    output = tmp_path / "targets"
    process = start_job(shards, output, "ray")
    survive_the_loss_of_a_worker(process, output)
    assert list(verify(open_storage(output))) == []
    assert rows_of(output).equals(undisturbed)


@pytest.fixture(scope="module")
def encoded(shards: Path) -> Path:
    """Encoded images of a run without a kill."""
    encode([str(shards)], str(shards.parent / "encoded"), ENCODE, INLINE)
    return shards.parent / "encoded"


def start_encoding(shards: Path, output: Path, executor: str) -> subprocess.Popen:
    """`air encode` as ENCODE says."""
    return start(
        "encode", shards, output, executor, ["--pixels-per-gaussian", "60", "--steps", "40", "--stored-steps", "10"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_kill_of_an_encoding_driver(shards: Path, encoded: Path, tmp_path: Path, executor: str) -> None:
    """The files are the same, byte for byte, and committed units are not done again."""
    output = tmp_path / "encoded"
    process = start_encoding(shards, output, executor)
    wait_for(lambda: committed_units(open_storage(output)), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {manifest.unit: manifest for manifest in read_manifests(open_storage(output))}
    assert 0 < len(before) < NUM_SHARDS
    process = start_encoding(shards, output, executor)
    text = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, text
    after = {manifest.unit: manifest for manifest in read_manifests(open_storage(output))}
    assert {unit: after[unit] for unit in before} == before
    assert committed_bytes(output) == committed_bytes(encoded)
    assert not list(verify(open_storage(output)))


@pytest.mark.slow
def test_kill_of_an_encoding_worker(shards: Path, encoded: Path, tmp_path: Path) -> None:
    output = tmp_path / "encoded"
    process = start_encoding(shards, output, "ray")
    survive_the_loss_of_a_worker(process, output)
    assert committed_bytes(output) == committed_bytes(encoded)
    assert not list(verify(open_storage(output)))
