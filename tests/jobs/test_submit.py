"""`air submit` without a cluster: what is refused before anything is sent, what is sent, and how a log is followed.

tests/jobs/test_cluster_document.py submits to a real cluster.
"""

from __future__ import annotations

import http.server
import json
import shlex
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import submit
from jobs.cli import COMMANDS, main
from jobs.command import check_command
from pipeline.errors import ConfigError, JobFailedError

job_submission = pytest.importorskip("ray.job_submission")
Status = job_submission.JobStatus

INPUT, OUTPUT = "s3://bucket/shards", "s3://bucket/targets"


class FakeClient:
    """A cluster that keeps what it is sent, and whose job says and ends as it is told.

    Attributes:
        sent: What `submit_job` was given, with the texts of the files in the working directory.
    """

    def __init__(self, *ends: Any, log: tuple[str, ...] = ("a line\n", "another line\n"), lose_after: int = 0) -> None:
        self.sent: dict[str, Any] = {}
        self._ends = list(ends)
        self._log = log
        self._lose_after = lose_after

    def submit_job(self, **given: Any) -> str:
        folder = (given["runtime_env"] or {}).get("working_dir")
        files = {path.name: path.read_text() for path in Path(folder).iterdir()} if folder else {}
        self.sent = {**given, "files": files}
        return given["submission_id"]

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for number, text in enumerate(self._log):
            if self._lose_after and number == self._lose_after:
                self._lose_after = 0
                raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
            yield text

    def get_job_info(self, job: str) -> Any:
        end = self._ends.pop(0) if len(self._ends) > 1 else self._ends[0]
        if isinstance(end, BaseException):
            raise end
        status, code = end
        return SimpleNamespace(status=status, driver_exit_code=code, message=None if code is not None else "no driver")


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch):
    """Runs `air submit` against a fake cluster; returns the exit status."""
    monkeypatch.setattr(submit, "check_dashboard", lambda address: None)
    monkeypatch.setattr(submit, "_PAUSE_SECONDS", 0.0)

    def run(client: FakeClient, *arguments: str) -> int:
        monkeypatch.setattr(submit, "connect", lambda address: client)
        return main(["submit", *arguments, "--address", "http://head:8265"])

    return run


def test_the_command_is_sent_with_the_file_of_its_configuration(
    submitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("distill:\n  patch_size: 7\n")
    client = FakeClient((Status.SUCCEEDED, 0))
    assert submitted(client, "distill", INPUT, "s3://bucket/a b", "--config", str(file), "--steps", "50") == 0
    words = ["air", "distill", INPUT, "s3://bucket/a b", "--steps", "50", "--address", "auto"]
    assert shlex.split(client.sent["entrypoint"]) == [*words, "--config", "cluster.yaml"]
    assert client.sent["files"] == {"cluster.yaml": "distill:\n  patch_size: 7\n"}
    said = capsys.readouterr().out
    assert said.startswith("submitted air-distill-")
    assert said.endswith("a line\nanother line\n")


def test_a_round_is_sent_as_its_file_says(submitted, tmp_path: Path) -> None:
    file = tmp_path / "cycle.yaml"
    file.write_text("retrain:\n  work: s3://b/work\nrunner:\n  address: auto\ntrainer:\n  address: auto\n")
    client = FakeClient((Status.FAILED, 3))
    assert submitted(client, "retrain", "--config", str(file), "--once") == 3
    assert client.sent["entrypoint"] == "air retrain --once --config cycle.yaml"


def test_the_job_logs_as_its_submission_does(submitted) -> None:
    client = FakeClient((Status.SUCCEEDED, 0))
    assert submitted(client, "verify", OUTPUT, "--log-format", "json") == 0
    assert client.sent["entrypoint"] == f"air verify {OUTPUT} --log-format json"


def test_what_is_sent_is_a_command_line(submitted) -> None:
    """The one that the cluster runs, with what was added to it."""
    for command in (("encode", INPUT, OUTPUT), ("verify", OUTPUT), ("train", INPUT, OUTPUT, "--workers", "2")):
        client = FakeClient((Status.SUCCEEDED, 0))
        assert submitted(client, *command) == 0
        air, name, *rest = shlex.split(client.sent["entrypoint"])
        assert air == "air"
        assert check_command(name, rest).positionals == command[1:3]
        assert client.sent["runtime_env"] is None


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ((Status.FAILED, 3), 3, "failed with status 3"),
        ((Status.FAILED, -9), 137, "failed with status 137"),
        ((Status.FAILED, None), 1, "failed: no driver"),
        ((Status.STOPPED, None), 143, "was stopped; submit the same command again to go on"),
    ],
)
def test_the_exit_status_is_the_jobs(
    submitted, end: tuple[Any, int | None], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted(FakeClient((Status.RUNNING, None), end), "verify", OUTPUT) == status
    assert said in capsys.readouterr().err


def test_a_lost_connection_neither_loses_nor_repeats_a_line(submitted, capsys: pytest.CaptureFixture[str]) -> None:
    client = FakeClient(ConnectionError("refused"), (Status.SUCCEEDED, 0), log=("one\n", "two\n"), lose_after=1)
    assert submitted(client, "verify", OUTPUT) == 0
    assert capsys.readouterr().out.partition("\n")[2] == "one\ntwo\n"


def test_a_cluster_that_is_gone_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_LOST_SECONDS", 0.1)
    monkeypatch.setattr(submit, "_PAUSE_SECONDS", 0.05)
    client: Any = FakeClient(ConnectionError("refused"))
    with pytest.raises(JobFailedError, match=r"job-1 is out of reach .*refused.* submit the same command to another"):
        submit.follow(client, "job-1")


def test_no_wait_says_how_to_follow_and_to_stop(submitted, capsys: pytest.CaptureFixture[str]) -> None:
    assert submitted(FakeClient((Status.RUNNING, None)), "verify", OUTPUT, "--no-wait") == 0
    said = capsys.readouterr().out
    assert "a line" not in said
    assert "`ray job logs --follow air-verify-" in said
    assert "`ray job stop air-verify-" in said


def test_an_interrupted_watch_leaves_the_job(submitted, capsys: pytest.CaptureFixture[str]) -> None:
    assert submitted(FakeClient(KeyboardInterrupt()), "verify", OUTPUT) == 130
    assert "interrupted; the job goes on. Its log: `ray job logs --follow air-verify-" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "required: JOB, one of shard, distill"),
        ("distil s3://b/in s3://b/out", "cannot submit 'distil' (did you mean 'distill'?)"),
        ("demo", "cannot submit 'demo'"),
        ("submit verify s3://b/out", "cannot submit 'submit'"),
        ("distill s3://b/in", "air distill: the following arguments are required: OUT"),
        ("distill s3://b/in s3://b/out --max-cuont 3", "air distill: unrecognized arguments: --max-cuont"),
        ("distill s3://b/in s3://b/out --patch-size 0", "patch_size = '0'"),
        ("distill s3://b/in s3://b/out --config bad.yaml", "unknown key 'patch_sise' (did you mean 'patch_size'?)"),
        ("distill s3://b/in s3://b/out --config none.yaml", "cannot read configuration none.yaml"),
        ("distill shards s3://b/out", "shards: a relative path leads elsewhere on the cluster"),
        ("distill s3://b/in targets", "targets: a relative path leads elsewhere on the cluster"),
        ("distill s3://b/in s3://b/out --predictor best.safetensors", "best.safetensors: a relative path leads"),
        ("distill s3://b/in s3://b/out --config named.yaml", "best.safetensors: a relative path leads"),
        ("train s3://b/in s3://b/out --valid best.safetensors", "best.safetensors: a relative path leads"),
        ("retrain --config here.yaml", "work: a relative path leads elsewhere"),
        ("retrain --config alone.yaml", "write `address: auto` into the sections `runner` and `trainer`"),
        ("distill s3://b/in s3://b/out", "which cluster? Add --address"),
        ("distill s3://b/in s3://b/out --address ray://head:10001", "is not the address of a dashboard"),
        ("distill s3://b/in s3://b/out --address http://head:port", "cannot reach a Ray dashboard at http://head:port"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(
    tmp_path: Path, arguments: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("distill:\n  patch_sise: 7\n")
    (tmp_path / "named.yaml").write_text("distill:\n  predictor: best.safetensors\n")
    (tmp_path / "here.yaml").write_text("retrain:\n  work: work\n")
    (tmp_path / "alone.yaml").write_text("retrain:\n  work: s3://b/work\nrunner:\n  address: auto\n")
    (tmp_path / "best.safetensors").touch()
    (tmp_path / "ray").mkdir()  # also the name of an executor, which is no path
    monkeypatch.setattr(submit, "connect", lambda address: pytest.fail("it was sent"))
    assert main(["submit", *arguments.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", submit.JOBS)
def test_what_can_be_submitted_is_checked_and_not_run(command: str) -> None:
    assert command in COMMANDS
    given = ["/in", "/out"][: {"evaluate": 1, "verify": 1, "retrain": 0}.get(command, 2)]
    assert check_command(command, given).positionals == tuple(given)


class _Silent(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def other_server() -> Iterator[str]:
    """The address of a web server that is not Ray's."""
    server = http.server.HTTPServer(("127.0.0.1", 0), _Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_that_is_not_rays_is_refused(other_server: str) -> None:
    with pytest.raises(ConfigError, match="is not the dashboard of a Ray cluster: /api/version answers 404"):
        submit.check_dashboard(other_server)


def test_an_address_without_an_answer_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One where nobody listens, and one that takes connections and says nothing."""
    monkeypatch.setattr(submit, "_ANSWER_SECONDS", 0.5)
    with socket.socket() as nobody, socket.socket() as mute:
        nobody.bind(("127.0.0.1", 0))
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        for server, why in ((nobody, "refused"), (mute, "timed out")):
            began = time.monotonic()
            with pytest.raises(ConfigError, match=rf"cannot reach a Ray dashboard at \S+: .*{why}"):
                submit.check_dashboard(f"http://127.0.0.1:{server.getsockname()[1]}")
            assert time.monotonic() - began < 5


def test_a_check_leaves_later_commands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check_command("distill", ["only-one"])
    (tmp_path / "plan.json").write_text(json.dumps({}))
    assert main(["status", str(tmp_path)]) == 1  # it runs, and finds that this is no plan
    assert "plan.json" in capsys.readouterr().err
