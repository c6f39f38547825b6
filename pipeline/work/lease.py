"""The lease of an output folder: of all processes on all machines, one at a time writes there.

    with hold(storage, "distill", config) as lease:
        output = storage.guarded(lease.check)     # refuses every write once the lease is lost

An output folder holds

    lease/<number>.json         who took the lease (`pipeline.work.holder`): a journal, so each number has one owner
    lease/beat-<number>.json    the latest sign of life of that holder, which it rewrites three times in `lease_seconds`

The numbers are the fencing numbers. A lease is taken by appending the next number, which one of any contenders can do.
It is free if its last beat says so, or if its process has ended and the contender runs on the same machine. Otherwise
a contender watches the beat: if that does not change for `lease_seconds` of the contender's own clock, the contender
takes over. No clock of one machine is compared with that of another.

A holder writes while less than `lease_seconds` have passed since its last beat *began*, less a margin. After that, no
matter whether it was stopped, cut off or asleep, it must first append a number itself, and finds out whether another
process was faster. A worker in another process has a `Fence`, which looks for newer numbers of other holders.

What remains: a process that is stopped after its check and before the write that the check allows, for longer than the
margin, makes that one write when it goes on. On a local disk these are two system calls in a row; on an object store it
is one request. That write cannot spoil a job's output, as a manifest is created with put-if-absent and every attempt at
a unit gives the same values. It can put back an older `last.safetensors` of a training run until the next checkpoint.

This module must not know what is written into the folder.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from pipeline.config import LeaseConfig
from pipeline.errors import DamagedDataError, LeaseHeldError, LeaseLostError, StorageError
from pipeline.storage.base import MissingFileError, Storage
from pipeline.storage.journal import Journal
from pipeline.work.holder import Beat, Holder, seconds_since, spoken, utc_now
from pipeline.work.plan import parse_json

logger = logging.getLogger(__name__)

FOLDER = "lease"
"""The folder of the lease below an output folder."""

DEFAULTS = LeaseConfig.model_validate({})
"""Times of a command that has no configuration."""

_KEPT = 16  # newest entries that stay
_BEATS = 3  # in `lease_seconds`
_MARGIN = 0.25  # of `lease_seconds`: a holder stops writing so long before others may take over
_LOOK_SECONDS = 0.1  # a holder looks for newer numbers before a write, unless it has just done so
_LONGEST_PAUSE = 2.0  # between a contender's looks at the beat


@dataclass(frozen=True)
class Standing:
    """The lease of a folder as it is found.

    Attributes:
        number: The fencing number.
        holder: Who took it.
        beat: The holder's latest sign of life; None before the first one.
    """

    number: int
    holder: Holder
    beat: Beat | None

    @property
    def is_free(self) -> bool:
        """Whether nobody holds the lease, as far as is known without watching."""
        return (self.beat is not None and self.beat.released) or self.holder.state() == "ended"

    @property
    def silence(self) -> float:
        """Seconds since the last sign of life, for people: the holder's clock may differ from this machine's."""
        return seconds_since(self.beat.at if self.beat else self.holder.since)


def read_standing(storage: Storage) -> Standing | None:
    """The lease of an output folder; None if nobody has ever taken it.

    Raises:
        DamagedDataError: A file of the lease is not valid.
    """
    journal = Journal(storage, FOLDER)
    numbers = journal.numbers()
    if not numbers:
        return None
    number = numbers[-1]
    try:
        holder = parse_json(Holder, storage, journal.path(number))
        with suppress(MissingFileError):
            return Standing(number, holder, parse_json(Beat, storage, _beat_path(number)))
    except DamagedDataError as error:
        remedy = f"if no command works in this folder, delete {storage.uri(FOLDER)}"
        raise DamagedDataError(f"{error}; {remedy}") from None
    return Standing(number, holder, None)


@dataclass(frozen=True)
class Fence:
    """Lets a worker write for a holder in another process, while no other holder has a newer number.

    Attributes:
        storage: The output folder.
        number: The holder's fencing number when the worker got its task.
        id: The holder's id.
    """

    storage: Storage
    number: int
    id: str

    def check(self) -> None:
        """Looks for newer numbers of other holders: call this before each write.

        Raises:
            LeaseLostError: There is one.
        """
        numbers = Journal(self.storage, FOLDER).numbers()
        if not numbers or numbers[-1] < self.number:
            raise LeaseLostError(f"{self.storage.uri(FOLDER)} was deleted: this process may not write any more")
        if numbers[-1] > self.number:
            standing = read_standing(self.storage)
            if standing is not None and standing.holder.id != self.id:
                raise LeaseLostError(
                    f"lost the lease of {self.storage.uri()} to {standing.holder}. This process has written nothing "
                    "since; if the other one fails, run the same command again"
                )


class Lease:
    """A lease that this process holds. `hold` makes one and keeps it alive. Threads may share it.

    Pickled, as part of a worker's task, it becomes a `Fence`.

    Attributes:
        holder: This process.
        number: The fencing number. It rises if this process was out of touch for long and has taken its lease anew.
    """

    def __init__(self, storage: Storage, holder: Holder, number: int, since: float) -> None:
        self.holder = holder
        self.number = number
        self._storage = storage
        self._journal = Journal(storage, FOLDER)
        self._lock = threading.RLock()
        self._count = 0
        self._lost: str | None = None
        self._until = since + holder.lease_seconds
        self._looked = -math.inf

    def __reduce__(self) -> tuple[type[Fence], tuple[Storage, int, str]]:
        return Fence, (self._storage, self.number, self.holder.id)

    def raise_if_lost(self) -> None:
        """Reads nothing.

        Raises:
            LeaseLostError: This process knows that it has lost the lease.
        """
        if self._lost is not None:
            raise LeaseLostError(self._lost)

    def check(self) -> None:
        """Makes sure that this process still holds the lease: call this before each write. Cheap if called often.

        Raises:
            LeaseLostError: Another process has taken over.
            StorageError: The storage cannot be read, so nobody knows.
        """
        with self._lock:
            self.raise_if_lost()
            if now() - self._looked > _LOOK_SECONDS:
                self._look()
            if now() > self._until - _MARGIN * self.holder.lease_seconds:
                self._take_anew()

    def renew(self) -> None:
        """Gives a sign of life. Does nothing once the lease is lost.

        Raises:
            StorageError: The storage cannot be read or written.
        """
        with self._lock:
            if self._lost is not None:
                return
            begin = now()
            try:
                if begin < self._until:
                    self._beat()
                    if now() < self._until:  # a beat that took longer may have come after another process took over
                        self._until = begin + self.holder.lease_seconds
                self.check()
            except LeaseLostError as error:
                logger.debug("%s", error)

    def release(self) -> None:
        """Gives the lease back, so that the next process need not wait. Does nothing if the lease is lost."""
        with self._lock:
            try:
                self.check()
                self._beat(released=True)
            except LeaseLostError:
                return
            except StorageError as error:
                logger.warning(
                    "the lease of %s could not be given back; the next command waits %g s: %s",
                    self._storage.uri(),
                    self.holder.lease_seconds,
                    error,
                )
            self._lost = f"the lease of {self._storage.uri()} was given back: this process may not write any more"

    def _beat(self, released: bool = False) -> None:
        self._count += 1
        beat = Beat(count=self._count, at=utc_now(), released=released)
        self._storage.write(_beat_path(self.number), beat.model_dump_json().encode())

    def _look(self) -> None:
        begin = now()
        try:
            Fence(self._storage, self.number, self.holder.id).check()
        except LeaseLostError as error:
            self._lost = str(error)
            raise
        self._looked = begin

    def _take_anew(self) -> None:
        """Appends the next number in this process's own name, since others may do so by now."""
        begin = now()
        if self._journal.append(self.number, self.holder.model_dump_json().encode()):
            self.number += 1
            self._until = begin + self.holder.lease_seconds
        self._look()
        self._beat()  # the new number has no sign of life yet, and `since` is old


def acquire(storage: Storage, purpose: str, config: LeaseConfig) -> Lease:
    """Takes the lease of an output folder. Call `hold`, which also keeps it alive and gives it back.

    Raises:
        LeaseHeldError: A live process holds it, also after `lease_wait_seconds`. The message says who.
        StorageError: The storage cannot be read or written.
    """
    journal = Journal(storage, FOLDER)
    holder = Holder.of_this_process(purpose, config.lease_seconds)
    patience = now() + config.lease_wait_seconds
    seen: Standing | None = None
    unchanged_since = 0.0
    while True:
        begin = now()
        found = read_standing(storage)
        if found is None or found.is_free or (found == seen and begin - unchanged_since > found.holder.lease_seconds):
            number = found.number if found else 0
            if journal.append(number, holder.model_dump_json().encode()):
                _tell(found)
                lease = Lease(storage, holder, number + 1, begin)
                lease.check()
                _remove_old(journal)
                return lease
            continue
        lives = found.holder.state() == "running" or (seen is not None and found != seen)
        if lives and begin >= patience:
            raise LeaseHeldError(
                f"{storage.uri()} is in use by {found.holder}; last sign of life {found.silence:.0f} s ago. Wait until "
                "that has ended, or end it, and run this command again (lease_wait_seconds makes a command wait)"
            )
        if seen is None:
            logger.warning(
                "%s is in use by %s; %s",
                storage.uri(),
                found.holder,
                "waiting for its end" if lives else f"watching for {found.holder.lease_seconds:g} s whether that lives",
            )
        if found != seen:
            seen, unchanged_since = found, now()  # after the look: the beat may have come in the midst of it
        time.sleep(min(found.holder.lease_seconds / 10, _LONGEST_PAUSE))


def _tell(before: Standing | None) -> None:
    if before is not None and not (before.beat and before.beat.released):
        logger.info("took over from %s; last sign of life %.0f s ago", before.holder, before.silence)


def _remove_old(journal: Journal) -> None:
    """Removes old entries. The newest ones stay, for a slow contender must never find the number free that it tries."""
    for number in journal.numbers()[:-_KEPT]:
        journal.storage.delete(_beat_path(number))
        journal.storage.delete(journal.path(number))


@contextmanager
def hold(storage: Storage, purpose: str, config: LeaseConfig = DEFAULTS) -> Iterator[Lease]:
    """Holds the lease of an output folder for the block, and gives it back however the block ends.

    A folder whose lease is free is taken at once. Else this waits until it has seen whether the holder is alive, for
    its `lease_seconds` at most, and then for `lease_wait_seconds` if it is.

    Args:
        storage: The output folder.
        purpose: What this process does there, such as "distill", for messages to others.
        config: Times.

    Raises:
        LeaseHeldError: A live process holds it. The message says who, since when, and what to do.
        StorageError: The storage cannot be read or written.
    """
    lease = acquire(storage, purpose, config)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lease, ended), name="lease", daemon=True)
    renewing.start()
    try:
        yield lease
    finally:
        ended.set()
        lease.release()


def _renew(lease: Lease, ended: threading.Event) -> None:
    pause = lease.holder.lease_seconds / _BEATS
    while not ended.wait(pause):
        try:
            lease.renew()
        except StorageError as error:
            logger.warning("no sign of life could be written: %s", error)


def describe(standing: Standing | None) -> str:
    """One phrase about who holds a lease."""
    if standing is None or (standing.beat is not None and standing.beat.released):
        return "no holder"
    holder, silence = standing.holder, standing.silence
    about = f"{holder.purpose}, pid {holder.pid} on {holder.host}, since {spoken(holder.since)}"
    if holder.state() == "ended":
        return f"no holder; {about}, has died"
    stale = silence > holder.lease_seconds
    return f"{about}, last sign of life {silence:.0f} s ago" + (": it may have died" if stale else "")


def now() -> float:
    """Seconds of a clock of this machine that never goes back, and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _beat_path(number: int) -> str:
    return f"{FOLDER}/beat-{number:012d}.json"
