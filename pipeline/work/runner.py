"""Runs the units of a plan, in this process or on Ray, until all are committed.

The runner repeats attempts whose failure may pass, isolates images that kill their worker, runs stragglers twice, and
stops when too many images are bad. It must not know what a job does: workers call `pipeline.work.process.execute`,
which also commits.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import islice
from typing import Protocol

from pipeline.config import RunnerConfig
from pipeline.errors import JobFailedError, StorageError
from pipeline.storage.base import Storage
from pipeline.work.audit import check_present, remove_garbage
from pipeline.work.executor import Executor, Failure, Handle, InlineExecutor, Report, Task
from pipeline.work.lease import Lease, hold
from pipeline.work.manifest import Manifest, read_manifests, read_quarantine
from pipeline.work.plan import Plan, Unit
from pipeline.work.process import Job, Progress
from pipeline.work.ray import RayExecutor, ray_session
from pipeline.work.tally import Tally

logger = logging.getLogger(__name__)

MIN_SAMPLES_TO_JUDGE = 100
"""The fraction of bad images is not judged before this many images, except at the end."""

CRASHES_BEFORE_ISOLATION = 2
"""After this many crashes, a unit runs each image in a process of its own. One crash may be the machine's fault."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
"""Pauses of a unit between attempts after storage failed. Each pause is twice the one before, up to the longest."""

_OLD_SECONDS = 24 * 3600.0  # the writer of a temporary file this old has died
_MAX_SHOWN = 3  # bad images that the message names
_MIN_DURATIONS = 5  # finished units that the search for stragglers needs


class Display(Protocol):
    """Shows the progress of a run to a person. `update` is called often."""

    def update(self, tally: Tally) -> None: ...


class Silent:
    """Shows nothing."""

    def update(self, tally: Tally) -> None:
        """Does nothing."""


def run(job: Job, plan: Plan, output: Storage, config: RunnerConfig, display: Display | None = None) -> Tally:
    """Runs every unit of the plan that is not committed yet, while this process holds the lease of the output folder.

    Returns:
        The totals over all units, including those that earlier runs committed.

    Raises:
        JobFailedError: Units failed in their last attempt, or too many images are bad. What was committed stays.
        DamagedDataError: A committed file is missing or has another size.
        LeaseHeldError: Another process works in the output folder.
        LeaseLostError: Another process has taken over the output folder, as this one gave no sign of life for long.
    """
    with hold(output, plan.job, config) as lease:
        return _run(job, plan, output.guarded(lease.check), config, display or Silent(), lease)


def _run(job: Job, plan: Plan, output: Storage, config: RunnerConfig, display: Display, lease: Lease) -> Tally:
    manifests = list(read_manifests(output))
    check_present(output, manifests)
    done = {manifest.unit for manifest in manifests}
    todo = [unit for unit in plan.units if unit.name not in done]
    counts = [unit.samples for unit in plan.units]
    tally = Tally(
        units_total=len(plan.units),
        samples_total=None if None in counts else sum(count or 0 for count in counts),
    )
    for manifest in manifests:
        tally.add(manifest)
    tally.samples_before = tally.samples
    display.update(tally)
    if todo:
        failures = _Drive(job, plan, output, config, tally, display, lease)(todo)
        if failures:
            listed = "".join(f"\n  {unit}: {cause}" for unit, cause in sorted(failures.items())[:5])
            raise JobFailedError(
                f"{len(failures)} of {len(plan.units)} shards failed; the others are committed. "
                f"Run the same command again to go on.{listed}"
            )
    _judge(tally, config, output, final=True)
    remove_garbage(output)
    output.sweep_temporaries(older_than=_OLD_SECONDS)
    return tally


def _judge(tally: Tally, config: RunnerConfig, output: Storage, final: bool = False) -> None:
    """Checks the fraction of bad images.

    Raises:
        JobFailedError: Too many images are bad. The message shows the first of them.
    """
    bad = tally.rejected.total()
    enough = final or tally.samples >= MIN_SAMPLES_TO_JUDGE
    if enough and tally.samples and bad > config.max_bad_share * tally.samples:
        reasons = ", ".join(f"{reason} {count}" for reason, count in tally.rejected.most_common())
        shown = "".join(
            f"\n  {row['key']}: {row['message']} ({row['reason']})"
            for row in islice(read_quarantine(output), _MAX_SHOWN)
        )
        more = f"\n  and {bad - _MAX_SHOWN} more" if bad > _MAX_SHOWN else ""
        raise JobFailedError(
            f"{bad} of {tally.samples} images are bad ({reasons}), above the fraction max_bad_share = "
            f"{config.max_bad_share:g}:{shown}{more}\n"
            f"{output.uri('quarantine')} lists all of them. Raise max_bad_share if so many bad images are expected."
        )


class _Drive:
    """One run: submits units within the window, takes outcomes and repeats attempts, until no unit is left."""

    def __init__(
        self,
        job: Job,
        plan: Plan,
        output: Storage,
        config: RunnerConfig,
        tally: Tally,
        display: Display,
        lease: Lease,
    ) -> None:
        self._job = job
        self._plan_hash = plan.hash
        self._output = output
        self._config = config
        self._tally = tally
        self._display = display
        self._lease = lease
        self._attempts: Counter[str] = Counter()
        self._crashes: Counter[str] = Counter()
        self._at_work: dict[Handle, Unit] = {}
        self._first_seen: dict[str, float] = {}
        self._durations: list[float] = []
        self._failures: dict[str, str] = {}
        self._not_before: dict[str, float] = {}

    def __call__(self, todo: Sequence[Unit]) -> dict[str, str]:
        """Runs the units; returns the names of those that failed in their last attempt, with the causes."""
        pending = deque(todo)
        with open_executor(self._config, self._report, self._job.name, self._output.uri()) as self._executor:
            try:
                while pending or self._at_work:
                    self._lease.raise_if_lost()
                    self._executor.publish(self._tally)
                    while len(self._at_work) < self._executor.window() and (unit := self._next(pending)):
                        self._submit(unit)
                    if not pending:
                        self._repeat_stragglers()
                    self._take_what_ended(pending)
                    self._display.update(self._tally)
            finally:
                for handle in self._at_work:  # a run that stops early: the cluster may outlive the run
                    self._executor.cancel(handle)
        return self._failures

    def _next(self, pending: deque[Unit]) -> Unit | None:
        """Takes the first unit whose pause after a failure is over, if any."""
        now = time.monotonic()
        unit = next((unit for unit in pending if self._not_before.get(unit.name, 0.0) <= now), None)
        if unit is not None:
            pending.remove(unit)
        return unit

    def _take_what_ended(self, pending: deque[Unit]) -> None:
        if not self._at_work:
            time.sleep(FIRST_PAUSE_SECONDS / 4)  # all units that are left pause
            return
        for handle, outcome in self._executor.wait(list(self._at_work)):
            unit = self._at_work.pop(handle, None)
            if unit is None:
                continue  # the slower of two attempts, which was cancelled
            if isinstance(outcome, Manifest):
                self._finish(unit, outcome)
            elif unit not in self._at_work.values() and self._again(unit, outcome):
                pending.append(unit)

    def _report(self, progress: Progress) -> None:
        if any(unit.name == progress.unit for unit in self._at_work.values()):
            self._first_seen.setdefault(progress.unit, time.monotonic())
            self._tally.running[progress.unit] = progress
            self._display.update(self._tally)

    def _submit(self, unit: Unit) -> None:
        self._attempts[unit.name] += 1
        isolate = self._crashes[unit.name] >= CRASHES_BEFORE_ISOLATION
        number = self._attempts[unit.name]
        task = Task(self._job, unit, self._plan_hash, self._output.uri(), self._lease, isolate, number)
        self._at_work[self._executor.submit(task)] = unit

    def _finish(self, unit: Unit, manifest: Manifest) -> None:
        self._durations.append(manifest.seconds)
        self._tally.add(manifest)
        logger.info(
            "%s: committed after %.1f s (images %d, in quarantine %d)",
            unit.name,
            manifest.seconds,
            manifest.samples,
            sum(manifest.rejected.values()),
            extra={"unit": unit.name},
        )
        _judge(self._tally, self._config, self._output)
        for handle in [handle for handle, other in self._at_work.items() if other == unit]:
            self._executor.cancel(handle)
            del self._at_work[handle]

    def _again(self, unit: Unit, failure: Failure) -> bool:
        """Whether to try the unit again. If not, the failure is recorded as final."""
        if not failure.may_pass:
            with suppress(StorageError):
                self._lease.check()  # if the worker was fenced off, the run is over, and not the unit at fault
        attempt = self._attempts[unit.name]
        logger.warning(
            "%s: attempt %d of %d failed: %s",
            unit.name,
            attempt,
            self._config.max_attempts,
            failure.cause,
            extra={"unit": unit.name, "attempt": attempt},
        )
        self._crashes[unit.name] += failure.crashed
        self._first_seen.pop(unit.name, None)
        self._tally.running.pop(unit.name, None)
        if failure.may_pass and attempt < self._config.max_attempts:
            pause = 0.0 if failure.crashed else FIRST_PAUSE_SECONDS * 2 ** (attempt - 1)
            self._not_before[unit.name] = time.monotonic() + min(pause, LONGEST_PAUSE_SECONDS)
            return True
        self._failures[unit.name] = failure.cause
        self._tally.units_failed += 1
        return False

    def _repeat_stragglers(self) -> None:
        """Submits a second attempt at units that take several times as long as others. The first commit wins."""
        if len(self._durations) < _MIN_DURATIONS:
            return
        limit = self._config.straggler_factor * statistics.quantiles(self._durations, n=20, method="inclusive")[-1]
        for unit in list(self._at_work.values()):
            since = self._first_seen.get(unit.name)
            if since is None or time.monotonic() - since < limit or len(self._at_work) >= self._executor.window():
                continue
            if list(self._at_work.values()).count(unit) == 1:
                logger.warning(
                    "%s takes more than %.0f s; running it a second time", unit.name, limit, extra={"unit": unit.name}
                )
                self._submit(unit)


@contextmanager
def open_executor(config: RunnerConfig, report: Report, job: str, output: str) -> Iterator[Executor]:
    """The configured executor, ready to accept tasks.

    Args:
        config: Where and how work runs.
        report: Called with the progress of units.
        job: Name of the job, for metrics.
        output: URI of the output folder, for metrics.
    """
    if config.executor == "inline":
        yield InlineExecutor(report)
    else:
        with ray_session(config), closing(RayExecutor(config, report, job, output)) as executor:
            yield executor
