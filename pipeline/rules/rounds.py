"""Learning in rounds: roll the present rule out as a bulk job, learn from what that stored, and so on.

    OUT/rounds/0001/                the output folder of a bulk job, as `air distill --rule` makes it
    OUT/rounds/0001/rule.safetensors, rule.json
                                    the rule that the round rolls out, as it is before the round's first step

The step number says which round it is, and the rule which plan the round has. So a run that goes on finds the plan of
its round, and what was committed there. This module must not know how a bulk job runs its units.
"""

from __future__ import annotations

import logging
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from air.errors import CheckpointError
from air.optimization.rule_file import save_rule
from pipeline.errors import TrainingError
from pipeline.rules.plan import RoundsJob
from pipeline.rules.reference import RuleReference, find_rule
from pipeline.rules.rollouts import RollOutJob, settle_roll_outs
from pipeline.rules.state import RULE, RuleState, upload_rule
from pipeline.rules.stored import find_roll_outs
from pipeline.rules.teachers import StoredTeacher
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.work.ray import ray_session
from pipeline.work.runner import MIN_SAMPLES_TO_JUDGE, run
from pipeline.work.stop import StopSignals
from pipeline.work.tally import Tally

logger = logging.getLogger(__name__)

FOLDER = "rounds"
"""The folder of a run that holds its rounds."""


def folder_of(number: int) -> str:
    """The folder of a round, counted from 1, below the run's folder."""
    return f"{FOLDER}/{number:04d}"


class RoundsTeacher:
    """Rolls out at the first step of a round, and gives minibatches of the round's samples at all of its steps.

    One Ray session serves all rounds.

    Args:
        job: The run.
        output: The run's folder.
        signals: The run's. While it rolls out, they take effect at once: what was committed stays, and all steps
            before have a checkpoint.
    """

    def __init__(self, job: RoundsJob, output: Storage, signals: StopSignals) -> None:
        self._job = job
        self._output = output
        self._signals = signals
        self._source = open_storage(job.source)
        # A round is small: a few bad images may be many of its images. All rounds are judged together.
        self._runner = job.runner.model_copy(update={"max_bad_share": 1.0})
        self._session = ExitStack()
        if job.runner.executor == "ray":
            self._session.enter_context(ray_session(job.runner))
        self._number = 0
        self._teacher: StoredTeacher | None = None
        self._figures: dict[str, float] = {}
        self._images = self._bad = 0

    def teach(self, state: RuleState) -> tuple[list[Tensor], dict[str, float]]:
        """As `pipeline.rules.teachers.Teacher.teach`.

        Raises:
            JobFailedError: Roll-outs failed; what was committed stays.
            PlanMismatchError: The round's folder holds roll-outs of another rule.
            TrainingError: Too many images cannot be used, or the round's rule is lost.
        """
        number = state.step // self._job.config.round_steps + 1
        if number != self._number:
            self._begin(number, state)
        if self._teacher is None:
            return [], dict(self._figures)
        gradient, figures = self._teacher.teach(state)
        return gradient, {**self._figures, **figures}

    def close(self) -> None:
        """Ends the Ray session."""
        self._session.close()

    def _begin(self, number: int, state: RuleState) -> None:
        config = self._job.config
        first = (number - 1) * config.round_steps
        output = open_storage(self._output.uri(folder_of(number)))
        with self._signals.at_once():
            tally = self._roll_out(number, state, output)
        if state.step == first:
            state.skipped += tally.rejected.total()
        self._judge(tally, last=number == config.rounds)
        self._number, self._teacher, self._figures = number, None, {"round": float(number)}
        if not tally.summary["samples"]:
            logger.warning("%s has no samples: round %d teaches nothing", output.uri(), number)
            return
        self._figures["psnr"] = tally.summary["psnr_last_sum"] / tally.summary["fits"]
        blocks = find_roll_outs([output]).blocks
        self._teacher = StoredTeacher(blocks, config, config.feed_of(number), first)

    def _roll_out(self, number: int, state: RuleState, output: Storage) -> Tally:
        """Rolls the round's rule out, unless that is done."""
        job = self._job
        begins = state.step % job.config.round_steps == 0
        uri = output.uri(RULE)
        config = job.config.of_round(number, uri)
        with tempfile.TemporaryDirectory(prefix="air-") as scratch:
            local = Path(scratch) / RULE
            if begins:
                save_rule(local, state.rule, step=state.step, plan=job.plan)
                rule = replace(find_rule(str(local)), name=uri)
            else:
                rule = self._stored_rule(number, uri)
            plan = settle_roll_outs(output, config, self._source, job.shards, rule)
            if begins:  # only now: a folder with roll-outs of another rule keeps that rule
                upload_rule(self._output, local, folder_of(number))
        return run(RollOutJob(config, self._source, rule), plan, output, self._runner)

    def _stored_rule(self, number: int, uri: str) -> RuleReference:
        try:
            return find_rule(uri)
        except CheckpointError as error:
            raise TrainingError(
                f"the run stopped within round {number}, and the rule of this round is lost ({error}): remove the "
                f"newest folder of {self._output.uri('checkpoints')}, and the run goes on from the one before"
            ) from None

    def _judge(self, tally: Tally, last: bool) -> None:
        """Checks the fraction of bad images in the rounds that this process has seen.

        Raises:
            TrainingError: Too many images are bad.
        """
        self._images += tally.samples
        self._bad += tally.rejected.total()
        most = self._job.runner.max_bad_share
        if (last or self._images >= MIN_SAMPLES_TO_JUDGE) and self._bad > most * self._images:
            raise TrainingError(
                f"{self._bad} of {self._images} images are bad, above the fraction max_bad_share = {most:g}. "
                f"{self._output.uri(FOLDER)}/*/quarantine lists them. Raise max_bad_share if so many are expected."
            )
