"""Stops a run between two steps, so that it can write a checkpoint before it ends.

This module must not know what a step is, nor who runs the loop.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The run was told to stop. It has written a checkpoint."""


class StopSignals:
    """A context that puts off SIGINT and SIGTERM, until the run has written a checkpoint and raised `Stopped`.

    Then the signal takes its usual effect. A second signal takes effect at once. Outside the main thread, such as in
    a worker of Ray, and for a signal that the process ignores, the context does nothing.

    Attributes:
        came: Whether a signal has come: the run should stop after this step.
    """

    def __init__(self) -> None:
        self.came = False
        self._number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._put_in_place()
        return self

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block a signal takes effect at once: for work that loses nothing, right after a checkpoint.

        Raises:
            Stopped: A signal has come before.
        """
        if self.came:
            raise Stopped
        self._restore()
        try:
            yield
        finally:
            self._put_in_place()

    def _put_in_place(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._put_off)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._restore()
        if self.came and isinstance(error, Stopped):
            signal.raise_signal(self._number)

    def _put_off(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            self._restore()
            signal.raise_signal(number)
            return
        self.came, self._number = True, number
        logger.warning("stopping after this step, with a checkpoint; once more stops at once")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._before.clear()
