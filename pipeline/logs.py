"""Log records as lines on stderr, of text or of JSON, in drivers, in workers and in their children alike.

A line of JSON says when, where and what: the keys `time` (UTC), `level`, `message`, `node`, `pid`, `logger`; `job`,
`unit` and `attempt` where they are known; `exception` with a traceback if there is one. This module must not know what
is logged.
"""

from __future__ import annotations

import json
import logging
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import MappingProxyType, TracebackType
from typing import Literal, get_args

LogFormat = Literal["text", "json"]

FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

logger = logging.getLogger(__name__)

_OUR_PACKAGES = ("air", "pipeline", "jobs")
_KNOWN = ("job", "unit", "attempt")
_NODE = platform.node()

_fields: ContextVar[Mapping[str, object]] = ContextVar("fields", default=MappingProxyType({}))
"""What the records of this thread are about, beside what those of the whole process are about."""


@dataclass(frozen=True)
class LogSettings:
    """How a process logs. Travels from a process to those that it starts.

    Attributes:
        format: Of the lines.
        level: The least level that is logged. None for warnings and, with JSON, what this project says at level INFO.
        fields: What the records of the process are about, among `job`, `unit` and `attempt`.
    """

    format: LogFormat = "text"
    level: str | None = None
    fields: Mapping[str, object] = field(default_factory=dict)


class _Handler(logging.StreamHandler):
    """The handler that `configure` replaces."""


_present = LogSettings()


def configure(settings: LogSettings) -> None:
    """Lets this process log to its present stderr, in place of earlier calls and of a library's handler for stderr."""
    global _present
    _present = settings
    _fields.set(MappingProxyType({}))
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _Handler) or getattr(handler, "stream", None) is sys.stderr:  # ray.train has one
            root.removeHandler(handler)
    handler = _Handler()
    as_json = settings.format == "json"
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter("%(message)s"))
    root.addHandler(handler)
    root.setLevel(settings.level or logging.WARNING)
    if not as_json:
        handler.setLevel(root.level)  # a library may have given its logger a level of its own
    for package in _OUR_PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO if as_json and not settings.level else logging.NOTSET)
    logging.captureWarnings(as_json)
    sys.excepthook = _log_exception if as_json else sys.__excepthook__


def present() -> LogSettings:
    """The settings of this process, with what its records are about now: for a process that it starts."""
    return replace(_present, fields={**_present.fields, **_fields.get()})


@contextmanager
def about(**fields: object) -> Iterator[None]:
    """Within the block, records are about that `job`, `unit` or `attempt`."""
    token = _fields.set({**_fields.get(), **fields})
    try:
        yield
    finally:
        _fields.reset(token)


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON. `extra` of a record wins over what its process is about."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        known = {**present().fields, **record.__dict__}
        event: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "message": record.getMessage(),
            **{name: known[name] for name in _KNOWN if name in known},
            "node": _NODE,
            "pid": record.process,
            "logger": record.name,
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str)


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logger.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))
