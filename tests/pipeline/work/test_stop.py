"""A signal waits for the checkpoint, a second one does not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from pipeline.work.stop import Stopped, StopSignals


@pytest.fixture(autouse=True)
def _handlers_stay() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_takes_effect_when_the_run_has_stopped() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:  # noqa: PT012
        assert not signals.came
        signal.raise_signal(signal.SIGINT)
        assert signals.came
        done.append("checkpoint")
        raise Stopped
    assert done == ["checkpoint"]


def test_sigterm_comes_as_sigterm() -> None:
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with pytest.raises(Stopped), StopSignals():  # noqa: PT012
            signal.raise_signal(signal.SIGTERM)
            assert came == []
            raise Stopped
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_signal_takes_effect_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignals():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal was put off, too")


def test_work_that_loses_nothing_is_cut_off_at_once_and_not_begun_after_a_signal() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals, signals.at_once():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the signal was put off")
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:  # noqa: PT012
        with signals.at_once():
            pass
        signal.raise_signal(signal.SIGINT)
        with signals.at_once():
            pytest.fail("the work has begun")


def test_a_run_that_ends_all_the_same_is_not_interrupted() -> None:
    with StopSignals():
        signal.raise_signal(signal.SIGINT)


def test_in_another_thread_signals_stay_as_they_are() -> None:
    handler = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler]
