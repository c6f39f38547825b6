"""Runs one of the other commands on a Ray cluster, from a machine that is no node of it, and shows what it prints.

What follows `submit` is the command as it would be typed on the cluster, and is checked here before it is sent. The
cluster's nodes need this package, and see what the command reads and writes: inputs and outputs are URIs, or absolute
paths on a file system that all nodes share. Of this machine's files only that of --config is sent along. The exit
status is the job's. ^C leaves the job running.

  air submit distill s3://bucket/shards s3://bucket/targets --config configs/cluster.yaml --address http://head:8265
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import logging
import os
import secrets
import shlex
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.command import Checked, check_command, make_parser
from pipeline.config import suggestion
from pipeline.errors import ConfigError, JobFailedError
from pipeline.storage.uri import SCHEME

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

logger = logging.getLogger(__name__)

JOBS = ("shard", "distill", "train", "evaluate", "encode", "decode", "verify", "retrain")
"""The commands that can be submitted: those whose positional arguments are all inputs and outputs."""

_PLACES = ("registry", "work", "shards", "frozen", "valid")
"""The keys of configurations that say where things are."""

_ANSWER_SECONDS = 10.0  # for the dashboard to answer
_LOST_SECONDS = 120.0  # without an answer until the job counts as out of reach
_PAUSE_SECONDS = 1.0  # between looks at a job whose log has ended
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Ray's loggers that print each upload and each end of a connection."""
_TERMINATED = 143  # the status of a job that was stopped, as of a command that SIGTERM ended


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("submit", __doc__)
    parser.usage = "air submit JOB ... --address URL [--no-wait]"
    parser.epilog = f"JOB is one of {', '.join(JOBS)}; `air JOB --help` shows what may follow it."
    parser.add_argument("--address", metavar="URL", help="dashboard of the cluster, such as http://head:8265")
    parser.add_argument("--no-wait", action="store_true", help="leave when the cluster has accepted the job")
    given, command = parser.parse_known_args(arguments)
    checked = _check(parser, command)
    if given.log_format != parser.get_default("log_format"):
        command += ["--log-format", given.log_format]  # the job's lines, too
    if not given.address:
        raise ConfigError("which cluster? Add --address with the address of its dashboard, such as http://head:8265")
    address = given.address.rstrip("/")
    check_dashboard(address)
    client, job = connect(address), f"air-{command[0]}-{secrets.token_hex(4)}"
    logs, stop = (f"ray job {what} {job} --address {address}" for what in ("logs --follow", "stop"))
    later = f"the job goes on. Its log: `{logs}`. To stop it: `{stop}`"
    try:
        _send(client, job, command, checked)
        print(f"submitted {job} to {address}", flush=True)
        if given.no_wait:
            print(later)
            return 0
        return _status(job, follow(client, job))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(later) from None


def _check(parser: argparse.ArgumentParser, command: Sequence[str]) -> Checked:
    """Checks the job's command line here, where a mistake costs nothing.

    Raises:
        ConfigError: The job cannot be submitted, or names files that only this machine has.
    """
    if not command:
        parser.error(f"the following arguments are required: JOB, one of {', '.join(JOBS)}")
    if command[0] not in JOBS:
        hint = suggestion(command[0], JOBS)
        raise ConfigError(f"cannot submit '{command[0]}'{hint}; what follows `submit` is one of {', '.join(JOBS)}")
    checked = check_command(command[0], command[1:])
    relative = [value for value in (*checked.positionals, *_places(checked)) if not _is_absolute(value)]
    local = [value for value in _texts(checked) if Path(value).name != value or Path(value).suffix]
    relative += [value for value in local if not _is_absolute(value) and os.path.exists(value)]
    if relative:
        raise ConfigError(
            f"{', '.join(dict.fromkeys(relative))}: a relative path leads elsewhere on the cluster; give "
            "a URI, or an absolute path on a file system that all nodes share"
        )
    if "--address" not in checked.flags:
        for config in checked.configs:
            if getattr(config, "executor", None) == "ray" and getattr(config, "address", None) is None:
                raise ConfigError(
                    f"air {command[0]} has no --address, and would start a Ray of its own on the head: write "
                    "`address: auto` into the sections `runner` and `trainer` of the file of --config"
                )
    return checked


def _is_absolute(value: str) -> bool:
    return bool(SCHEME.match(value)) or os.path.isabs(value)


def _places(checked: Checked) -> Iterator[str]:
    for config in checked.configs:
        yield from _texts_of([getattr(config, key, None) for key in _PLACES])


def _texts(checked: Checked) -> Iterator[str]:
    """The texts among a command's options and configurations, but for the file of --config, which is sent along."""
    yield from _texts_of([value for key, value in checked.options.items() if key != "config"])
    yield from _texts_of([config.model_dump() for config in checked.configs])


def _texts_of(value: Any) -> Iterator[str]:
    """The texts in a value, a list or a mapping of values."""
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts_of(inner)


def check_dashboard(address: str) -> None:
    """Checks that a dashboard of Ray answers at the address, within seconds. Ray's own client may wait for minutes.

    Raises:
        ConfigError: Nothing answers there, or something else.
    """
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"{address} is not the address of a dashboard; it looks like http://head:8265")
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=_ANSWER_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):  # a cluster that asks for a token, which Ray's client sends
            raise ConfigError(
                f"{address} is not the dashboard of a Ray cluster: /api/version answers {error.code}"
            ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:  # no such host, no URL, no HTTP
        reason = getattr(error, "reason", error)
        raise ConfigError(
            f"cannot reach a Ray dashboard at {address}: {reason}. The head needs ray[default] and "
            "`--dashboard-host=0.0.0.0`, or a tunnel to its port 8265"
        ) from None


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's job server.

    Raises:
        ConfigError: ray[default] is not installed here, or the cluster refuses this client.
    """
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets this variable, and RAY_ADDRESS, win over the argument
    try:
        from ray.job_submission import JobSubmissionClient

        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.getLogger().level)
        return JobSubmissionClient(address)
    except ImportError as error:
        raise ConfigError(f"air submit needs ray[default] ({error}): pip install 'air-gaussians[cluster]'") from None
    except Exception as error:  # RuntimeError, ConnectionError, Ray's own and those of requests
        raise ConfigError(f"the cluster at {address} does not take jobs from here: {error}") from error


def _send(client: JobSubmissionClient, job: str, command: Sequence[str], checked: Checked) -> None:
    """Sends the command and the file of its --config. The driver is a node's process, so the cluster is `auto` to it.

    Raises:
        JobFailedError: The cluster did not accept the job.
    """
    words = ["air", *_without_config(command)]
    if "--address" in checked.flags:
        words += ["--address", "auto"]
    file = checked.options.get("config")
    with tempfile.TemporaryDirectory(prefix="air-") as folder:
        if file:  # Ray unpacks the folder on the cluster and starts the command in it
            name = Path(file).name
            shutil.copyfile(file, Path(folder) / name)
            words += ["--config", name]
        try:
            client.submit_job(
                entrypoint=shlex.join(words),
                submission_id=job,
                runtime_env={"working_dir": folder} if file else None,
            )
        except Exception as error:  # bare RuntimeErrors, and those of requests
            raise JobFailedError(f"the cluster did not accept the job: {error}") from error


def _without_config(command: Sequence[str]) -> Iterator[str]:
    """A command line without `--config FILE` and `--config=FILE`."""
    words = iter(command)
    for word in words:
        if word == "--config":
            next(words, None)
        elif not word.startswith("--config="):
            yield word


def follow(client: JobSubmissionClient, job: str) -> JobDetails:
    """Prints the job's log until the job ends. A connection that is lost is made again.

    Raises:
        JobFailedError: The cluster has not answered for two minutes.
    """
    log, answered = _Log(client, job), time.monotonic()
    while True:
        try:
            asyncio.run(log.show())
            info = client.get_job_info(job)
            answered = time.monotonic()
            if info.status.is_terminal():
                return info
        except (RuntimeError, OSError, EOFError) as error:  # OSError: also of aiohttp and requests
            logger.debug("%s", error)
            if time.monotonic() - answered > _LOST_SECONDS:
                raise JobFailedError(
                    f"{job} is out of reach for {_LOST_SECONDS:.0f} s ({error}). If the cluster is gone, what was "
                    "committed stays: submit the same command to another one"
                ) from None
        time.sleep(_PAUSE_SECONDS)


class _Log:
    """A job's log on this process's stdout. After a lost connection it goes on where it stopped."""

    def __init__(self, client: JobSubmissionClient, job: str) -> None:
        self._client = client
        self._job = job
        self._shown = 0  # characters

    async def show(self) -> None:
        """Prints what is not printed yet, until the job or the connection ends."""
        position = 0
        async for text in self._client.tail_job_logs(self._job):  # from the log's beginning, whenever it is asked
            new = text[max(0, self._shown - position) :]
            position += len(text)
            self._shown = max(self._shown, position)
            print(new, end="", flush=True)


def _status(job: str, info: JobDetails) -> int:
    """The exit status of a job that has ended; says on stderr how it ended, unless it ended well."""
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        logger.error("air submit: %s was stopped; submit the same command again to go on", job)
        return _TERMINATED
    code = info.driver_exit_code
    if code is None:
        logger.error("air submit: %s failed: %s", job, (info.message or "no reason given").strip())
        return 1
    code = code if code >= 0 else 128 - code  # a signal, as a shell reports it
    logger.error("air submit: %s failed with status %d", job, code)
    return code
