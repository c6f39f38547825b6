"""Training on a Ray of two nodes, one of which goes: it says so within seconds, and goes on when another one joins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage.open import open_storage
from pipeline.training.state import checkpoints

pytest.importorskip("pandas", reason="ray.train needs pandas")
pytestmark = pytest.mark.slow

OPTIONS = (
    *("--patch-size", "8", "--stages", "2", "--settings", '{"channels": 16, "depth": 1}', "--batch", "4"),
    *("--min-crop", "32", "--max-crop", "40", "--valid-images", "2", "--threads", "1", "--workers", "2"),
    *("--steps", "100000", "--log-every", "1", "--checkpoint-every", "5"),
)
SECONDS_TO_NOTICE = 45  # Ray itself takes up to 15 on a machine that is not busy


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head with one CPU; its processes end with the test."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def test_a_lost_node_is_reported_and_its_successor_used(cluster: Any, shards: Path, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=1)
    out, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "jobs.cli", "train", str(shards), str(out), "--valid", str(shards), *OPTIONS]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, "--address", cluster.address], stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        wait_for(lambda: checkpoints(open_storage(out)), process, log, 180)
        cluster.remove_node(node, allow_graceful=False)
        wait_for(lambda: "training waits for room for 2 workers" in log.read_text(), process, log, SECONDS_TO_NOTICE)
        assert "the cluster has room for 1; gone: " in log.read_text()
        reached = checkpoints(open_storage(out))[-1]
        cluster.add_node(num_cpus=1)
        wait_for(lambda: checkpoints(open_storage(out))[-1] > reached, process, log, 180)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert log.read_text().endswith("air train: interrupted; run the same command again to go on\n")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
