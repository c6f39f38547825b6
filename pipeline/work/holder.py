"""Who holds the lease of a folder, as stored for other processes: machine, process, command, and signs of life.

This module must not know when a lease may be taken over, which is the business of `pipeline.work.lease`.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pipeline.config import Config
from pipeline.identity import printable


class Holder(Config):
    """The process that holds a lease, as its entry of the journal names it.

    Attributes:
        id: Drawn at random for each lease.
        purpose: What the process does in the folder, such as "distill".
        host: Name of its machine.
        pid: Its process number there.
        command: Its command line.
        since: When it took the lease, UTC, ISO 8601; for people.
        lease_seconds: Without a sign of life for so long, its lease may be taken over.
        machine: The start of the machine and the space of process numbers that `pid` belongs to; empty if unknown.
        started: When the process started, in ticks of that machine; empty if unknown.
    """

    id: str
    purpose: str
    host: str
    pid: int
    command: str
    since: str
    lease_seconds: float
    machine: str
    started: str

    @staticmethod
    def of_this_process(purpose: str, lease_seconds: float) -> Holder:
        """The process that calls this, with a new id."""
        return Holder(
            id=uuid.uuid4().hex,
            purpose=purpose,
            host=socket.gethostname(),
            pid=os.getpid(),
            command=printable(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
            since=utc_now(),
            lease_seconds=lease_seconds,
            machine=_this_machine(),
            started=_state_and_start(os.getpid())[1],
        )

    def state(self) -> str:
        """What this machine knows about the process: "running", "ended", or "unknown".

        A stopped process, and one on another machine or in another container, is "unknown".
        """
        if not self.machine or self.machine != _this_machine():
            return "unknown"
        letter, started = _state_and_start(self.pid)
        if started != self.started or letter in "ZX":  # another process has the number now; or it is dead, not reaped
            return "ended"
        return "unknown" if letter in "Tt" else "running"

    def __str__(self) -> str:
        return f"{self.purpose} (pid {self.pid} on {self.host}, since {spoken(self.since)}: {self.command})"


class Beat(Config):
    """A sign of life of a holder. A contender compares beats, and never their times, with one another.

    Attributes:
        count: Rises with every beat.
        at: When it was written, UTC by the holder's clock, ISO 8601; for people.
        released: The holder has ended in order, and the lease is free.
    """

    count: int
    at: str
    released: bool = False


def utc_now() -> str:
    """The time in UTC, ISO 8601, to milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def spoken(time: str) -> str:
    """A stored time for people."""
    return f"{datetime.fromisoformat(time):%Y-%m-%d %H:%M:%S} UTC"


def seconds_since(time: str) -> float:
    """Seconds from a stored time until now, 0 at least. The clocks of two machines may differ: for people only."""
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds())


def _this_machine() -> str:
    """Identifies this start of this machine, and the space of process numbers; empty where there is no /proc."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _state_and_start(pid: int) -> tuple[str, str]:
    """State and start of a process, as /proc/PID/stat has them; "X" and an empty string if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return "X", ""
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold spaces
    return fields[0], fields[19]
