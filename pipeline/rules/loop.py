"""The run of a rule that learns: steps, validations, checkpoints, from the start or from the last checkpoint.

The step number and the state determine a step, so a run that was stopped goes on with the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from torch import Tensor

from air.compute.threads import limit_torch
from air.warmup import warm_up
from pipeline.rules.online import Lessons
from pipeline.rules.plan import PHASE, RoundsJob, RuleJob
from pipeline.rules.reference import fresh_rule, is_whole_rule, load_rule
from pipeline.rules.rounds import RoundsTeacher
from pipeline.rules.state import RULE, RuleState, keep_rule
from pipeline.rules.teachers import OnlineTeacher, StoredTeacher, Teacher
from pipeline.rules.validation import validate_rule
from pipeline.storage.open import open_storage
from pipeline.training.log import TrainingLog, read_metrics
from pipeline.training.state import checkpoints, refuse_strangers, remove_old_checkpoints
from pipeline.training.validation import load_images
from pipeline.work.lease import Lease, hold
from pipeline.work.stop import Stopped, StopSignals

logger = logging.getLogger(__name__)

Report = Callable[[Mapping[str, float]], None]
"""Takes figures by name, for a display."""


def train_rule(job: RuleJob | RoundsJob, report: Report = lambda figures: None) -> dict[str, float]:
    """Learns a rule to the end, from the last checkpoint if there is one.

    Args:
        job: What to learn.
        report: Takes the figures of logged steps and of validations.

    Returns:
        The last figures: step, samples, seconds, and those of the last validation.

    Raises:
        DamagedDataError: A stored file or a checkpoint cannot be read.
        NonFiniteLossError: A fit of the validation diverged.
        JobFailedError: Roll-outs of a round failed; what was committed stays.
        TrainingError: The checkpoint does not fit, or too many pictures cannot be used.
        LeaseHeldError: Another process works in the run's folder.
        LeaseLostError: Another process has taken over the run's folder. This one wrote nothing since.
        KeyboardInterrupt: SIGINT or SIGTERM came, and the run has written a checkpoint.
    """
    warm_up("fit")
    # One thread: sums of another order would make other weights on another machine.
    with hold(open_storage(job.output), "train", job.lease) as lease, limit_torch(1):
        return _Run(job, report, lease)()


class _Run:
    """A run from its start or restart to the end."""

    def __init__(self, job: RuleJob | RoundsJob, report: Report, lease: Lease) -> None:
        self._job = job
        self._config = job.config
        self._report = report
        self._output = open_storage(job.output).guarded(lease.check)
        self._about = {"plan": job.plan, "phase": PHASE, "seed": job.config.seed}
        rule = fresh_rule(job.config.seed)
        if job.begin.sha256:
            rule.load_state_dict(load_rule(job.begin).state_dict())
        self._state = RuleState(rule, job.config)
        saved = checkpoints(self._output)
        if saved:
            self._state.load(self._output, saved[-1], self._about)
        self._saved_seconds = self._state.seconds
        self._pictures: list[Tensor] | None = None
        self._log = TrainingLog(self._output, self._state.step)

    def __call__(self) -> dict[str, float]:
        state, config, steps = self._state, self._config, self._job.steps
        with ExitStack() as open_parts:
            open_parts.callback(self._log.close)
            if state.step == steps and not is_whole_rule(self._output.uri(RULE)):
                self._validate()  # a stop or a person has removed what the run has made
            elif state.step < steps:
                signals = open_parts.enter_context(StopSignals())
                teacher = self._teacher(signals)
                open_parts.callback(teacher.close)
                while state.step < steps:
                    self._step(teacher)
                    over = state.step == steps
                    stops = signals.came and not over
                    late = state.seconds - self._saved_seconds >= config.checkpoint_seconds
                    if over or state.step % config.validate_every == 0:
                        self._validate()
                    if over or late or stops or state.step % config.checkpoint_every == 0:
                        self._save()
                    if stops:
                        raise Stopped
        rows = [row for row in read_metrics(self._output) if "valid_psnr" in row]
        validation = {name: value for name, value in (rows[-1] if rows else {}).items() if name.startswith("valid_")}
        return {**self._position(), **validation}

    def _teacher(self, signals: StopSignals) -> Teacher:
        job = self._job
        if isinstance(job, RoundsJob):
            return RoundsTeacher(job, self._output, signals)
        if job.blocks:
            return StoredTeacher(job.blocks, job.config, job.config.feed())
        return OnlineTeacher(Lessons(job.pictures, job.config))

    def _step(self, teacher: Teacher) -> None:
        state = self._state
        begin, before = time.perf_counter(), state.samples
        gradient, figures = teacher.teach(state)
        done = state.update(gradient, self._job.steps)
        seconds = time.perf_counter() - begin
        state.seconds += seconds
        if gradient and not done.taken:
            logger.warning("the gradient of step %d is not finite: the rule stays as it is", state.step - 1)
        if state.step % self._config.log_every == 0 or state.step == self._job.steps:
            told = {
                **self._position(),
                **figures,
                "learning_rate": done.learning_rate,
                "grad_norm": done.norm,
                "skipped": state.skipped,
                "samples_per_second": (state.samples - before) / max(seconds, 1e-9),
            }
            self._log.add(state.step, {name: value for name, value in told.items() if name != "step"})
            self._report(told)

    def _position(self) -> dict[str, float]:
        state = self._state
        return {"step": state.step, "samples": state.samples, "seconds": round(state.seconds, 3)}

    def _validate(self) -> None:
        """Validates the rule, and writes it for others with its figures."""
        job, state = self._job, self._state
        if self._pictures is None:
            self._pictures = load_images(job.valid, self._config.valid_images, self._config.valid_side, 0, 1)
        figures = validate_rule(state.rule, self._pictures, self._config)
        self._log.add(state.step, figures)
        self._log.flush()
        notes = {**job.notes, "begins_with": job.begin.model, "seconds": state.seconds}
        keep_rule(self._output, state.rule, step=state.step, plan=job.plan, metrics=figures, notes=notes)
        self._report({**self._position(), **figures})

    def _save(self) -> None:
        """Writes the metrics, and then the checkpoint, whose presence says that all is written."""
        self._saved_seconds = self._state.seconds
        refuse_strangers(self._output, self._state.step)
        self._log.flush()
        self._state.save(self._output, self._about)
        remove_old_checkpoints(self._output, self._config.keep)
