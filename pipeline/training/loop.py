"""The training loop: what every worker runs, one or many, in this process or on Ray Train.

Workers share only the sum of their gradients, so a step is the same for any number of workers: the global batch is
constant, and every sample of it has the same weight. This module knows nothing of Ray; `pipeline.training.ray` starts
the loop there.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

from air.compute.threads import Workers, limit_torch
from air.errors import InvalidGaussiansError, NonFiniteLossError
from air.metrics import psnr_of
from air.warmup import warm_up
from pipeline.errors import TrainingError
from pipeline.identity import seed_of
from pipeline.storage.open import open_storage
from pipeline.training.batches import BatchSource, Crops, Feed, LocalBatch, Prefetcher
from pipeline.training.config import TrainConfig
from pipeline.training.group import Group
from pipeline.training.log import StepSums, TrainingLog
from pipeline.training.losses import (
    BatchLosses,
    finetune_losses,
    offline_pod_losses,
    online_pod_losses,
    quantize_losses,
)
from pipeline.training.plan import TrainJob
from pipeline.training.start import make_network
from pipeline.training.state import (
    KeptNetworks,
    TrainingState,
    checkpoints,
    refuse_strangers,
    remove_old_checkpoints,
)
from pipeline.training.validation import load_images, picture_grid, validate
from pipeline.work.lease import Fence, Lease, hold
from pipeline.work.runner import MIN_SAMPLES_TO_JUDGE
from pipeline.work.stop import Stopped, StopSignals

logger = logging.getLogger(__name__)

_MAX_KEYS_NAMED = 8
"""Samples that an error names, at most."""

_PICTURES_SHOWN = 4
"""Validation pictures of a worker that TensorBoard shows."""

Report = Callable[[Mapping[str, float]], None]
"""Takes figures by name, for a display; rank 0 calls it."""

MakeFeed = Callable[[TrainJob, Group], BatchSource]
"""Makes a worker's source of batches."""


def train(
    job: TrainJob,
    group: Group,
    report: Report = lambda figures: None,
    make_feed: MakeFeed = Feed,
    fence: Lease | Fence | None = None,
    told_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Trains to the end, from the last checkpoint if there is one. Every worker of the group calls this once.

    Args:
        job: What to train.
        group: The workers.
        report: Takes the figures of logged steps and of validations.
        make_feed: Makes this worker's source of batches.
        fence: The lease of the run's folder, if the caller holds it. Otherwise rank 0 takes it.
        told_to_stop: Whether the run should stop after this step; what one worker is told holds for all.

    Returns:
        The last figures: step, samples, seconds, best_psnr.

    Raises:
        NonFiniteLossError: A loss is not a number. The error names the keys of its batch; the last checkpoint stays.
        TrainingError: The checkpoint does not fit, or too many samples cannot be used.
        LeaseHeldError: Another process works in the run's folder.
        LeaseLostError: Another process has taken over the run's folder. This one wrote nothing since.
        Stopped: The run was told to stop, and has written a checkpoint.
        KeyboardInterrupt: SIGINT or SIGTERM came, and the run has written a checkpoint.
    """
    if fence is None and group.rank == 0:
        with hold(open_storage(job.output), "train", job.trainer) as lease:
            return train(job, group, report, make_feed, lease, told_to_stop)
    if group.device.type == "cpu":
        warm_up("predict")
    with limit_torch(job.threads), Workers(job.threads) as workers:
        return _Run(job, group, workers, report, fence, told_to_stop)(make_feed)


class _Run:
    """One worker's part in a run, from its start or restart to the end."""

    def __init__(
        self,
        job: TrainJob,
        group: Group,
        workers: Workers,
        report: Report,
        fence: Lease | Fence | None,
        told_to_stop: Callable[[], bool],
    ) -> None:
        self._job = job
        self._config = job.config
        self._group = group
        self._report = report
        self._told_to_stop = told_to_stop
        self._output = open_storage(job.output)
        if fence is not None:
            self._output = self._output.guarded(fence.check)
        network, taken = make_network(job.config)
        network.gradient_checkpointing = job.trainer.gradient_checkpointing
        self._state = TrainingState(network.to(group.device).train(), job.config, stages=0)
        parameters = dict(network.named_parameters())
        self._resting = [parameters[name] for name in taken if name in parameters and parameters[name].requires_grad]
        self._gradients = _Gradients(job.config, self._state, group, workers)
        self._about = {"plan": job.plan, "phase": job.config.phase, "batch": job.config.batch, "seed": job.config.seed}
        self._kept = KeptNetworks(self._output, job.config.phase, job.plan, job.config.seed)
        saved = checkpoints(self._output)
        if saved:
            self._state.load(self._output, saved[-1], self._about)
        self._saved_seconds = self._state.seconds
        self._stops = False
        self._sums = StepSums()
        self._refused: list[str] = []
        self._log: TrainingLog | None = None
        if group.rank == 0:
            if saved:
                self._kept.restore(self._state)
            self._log = TrainingLog(self._output, self._state.step)
        self._pictures: list[Tensor] | None = None

    def __call__(self, make_feed: MakeFeed) -> dict[str, float]:
        state, config, trainer = self._state, self._config, self._job.trainer
        with ExitStack() as open_parts:
            if self._log:
                open_parts.callback(self._log.close)
            feed = make_feed(self._job, self._group)
            open_parts.callback(feed.close)
            batches = Prefetcher(feed.batch, state.step, trainer.prefetch)
            open_parts.callback(batches.close)
            signals = open_parts.enter_context(StopSignals())
            self._mark = time.perf_counter()
            over = config.is_over(state.step, state.seconds)
            while not over:
                self._step(batches.take(), signals)
                over = config.is_over(state.step, state.seconds)
                validates = over or state.step % trainer.validate_every == 0
                # All workers see the same seconds, which are rank 0's.
                late = state.seconds - self._saved_seconds >= trainer.checkpoint_seconds
                saves = over or late or self._stops or state.step % trainer.checkpoint_every == 0
                self._check_samples(validates or saves, over)
                if validates:
                    self._validate()
                if saves:
                    self._save()
                if self._stops and not over:
                    raise Stopped
        return {**self._position(), "best_psnr": state.best_psnr}

    def _position(self) -> dict[str, float]:
        state = self._state
        return {"step": state.step, "samples": state.step * self._config.batch, "seconds": round(state.seconds, 3)}

    def _step(self, batch: LocalBatch, signals: StopSignals) -> None:
        state, config = self._state, self._config
        progress = config.progress(state.step, state.seconds)
        self._choose_what_trains(progress)
        torch.manual_seed(seed_of(config.seed, "step", state.step, self._group.rank))
        own = self._gradients.compute(batch)
        now = time.perf_counter()
        if self._group.rank == 0:
            own.seconds = now - self._mark
        self._mark = now
        own.told_to_stop = float(signals.came or self._told_to_stop())
        sums = own.all_reduce(self._group)
        self._stops = sums.told_to_stop > 0
        norm = self._gradients.all_reduce()
        if not math.isfinite(sums.loss) or not math.isfinite(norm):
            self._stop(batch)
        learning_rate = state.update(progress)
        state.seconds += sums.seconds
        state.skipped += int(sums.skipped)
        self._refused = batch.refused[-1:] or self._refused
        self._sums.add(sums)
        if self._log and (state.step % self._job.trainer.log_every == 0 or config.is_over(state.step, state.seconds)):
            self._tell(self._log, learning_rate, norm)

    def _choose_what_trains(self, progress: float) -> None:
        """Lets stages join that are due; in phase `patch`, lets the weights of the checkpoint rest at first."""
        state, config = self._state, self._config
        for stage in range(state.stages, config.stages_at(progress)):
            # Weights of a checkpoint are trained already; a fresh network's first stages start as they are.
            if config.from_ is None and state.step > 0:
                state.join_stage(stage)
            state.stages = stage + 1
        if config.phase == "patch":
            for parameter in self._resting:
                parameter.requires_grad_(state.step >= config.patch_warmup_steps)

    def _stop(self, batch: LocalBatch) -> None:
        named = sorted(self._group.all_gather(batch.keys))
        more = len(named) - _MAX_KEYS_NAMED
        shown = ", ".join(named[:_MAX_KEYS_NAMED]) + (f" and {more} more" if more > 0 else "")
        last = checkpoints(self._output)
        kept = f"The last good checkpoint is {self._output.uri(last[-1])}." if last else "There is no checkpoint yet."
        raise NonFiniteLossError(
            f"the loss is not a number in step {self._state.step}, with the samples {shown}. {kept} "
            "Look at these images; if nothing is wrong with them, begin a new run from that checkpoint with a lower "
            "learning_rate"
        )

    def _check_samples(self, keeps: bool, over: bool) -> None:
        """Stops a run most of whose samples cannot be used. A run without any usable sample stops before it keeps one.

        Args:
            keeps: Whether a validation or a checkpoint is due.
            over: Whether the run ends here.
        """
        bad, seen = self._state.skipped, self._state.step * self._config.batch
        allowed = self._job.trainer.max_bad_share
        none_usable = keeps and bad == seen
        too_many = (over or seen >= MIN_SAMPLES_TO_JUDGE) and bad > allowed * seen
        if not none_usable and not too_many:
            return
        examples = self._group.all_gather(self._refused)
        example = f", such as {examples[0]}" if examples else ""
        remedy = (
            "Repair or replace the input."
            if none_usable
            else f"max_bad_share allows a fraction of {allowed:g}: repair the input, or raise max_bad_share."
        )
        raise TrainingError(f"{bad} of the {seen} samples so far cannot be used{example}. {remedy}")

    def _tell(self, log: TrainingLog, learning_rate: float, norm: float) -> None:
        sums, self._sums = self._sums, StepSums()
        means = sums.means()
        if self._config.uses_targets:
            means.pop("psnr", None)  # no picture was drawn
        figures = {
            **self._position(),
            **means,
            "learning_rate": learning_rate,
            "grad_norm": norm,
            "skipped": sums.skipped,
            "samples_per_second": (sums.usable + sums.skipped) / max(sums.seconds, 1e-9),
        }
        log.add(self._state.step, {name: value for name, value in figures.items() if name != "step"})
        self._report(figures)

    def _validate(self) -> None:
        """Validates the moving average, and keeps it if it is the best so far."""
        state, config, group = self._state, self._config, self._group
        if self._pictures is None:
            self._pictures = load_images(
                self._job.valid, config.valid_images, config.valid_side, group.rank, group.size
            )
        score = validate(
            state.average,
            [picture.to(group.device) for picture in self._pictures],
            state.stages,
            config.control(),
            self._job.threads,
            shown=_PICTURES_SHOWN,
            quantised=config.phase == "quantize",
        )
        sums = torch.tensor([score.images, score.psnr, *score.gaussians], dtype=torch.float64, device=group.device)
        group.all_reduce([sums])
        count, total, *gaussians = sums.tolist()
        psnr = total / count
        is_best = psnr > state.best_psnr
        if is_best:
            state.best_psnr, state.best_step = psnr, state.step
        if self._log is None:
            return
        figures = {f"valid_gaussians_{stage}": number / count for stage, number in enumerate(gaussians)}
        self._log.add(state.step, {"valid_psnr": psnr, **figures})
        if score.pictures:
            self._log.add_pictures(state.step, "original and prediction", picture_grid(score.pictures))
        self._log.flush()
        self._report({**self._position(), "valid_psnr": psnr, "best_psnr": state.best_psnr})
        if is_best:
            self._kept.keep_best(state)

    def _save(self) -> None:
        """Writes `last.safetensors`, the metrics, and then the checkpoint, whose presence says that all is written."""
        self._saved_seconds = self._state.seconds
        if self._log is None:
            return
        refuse_strangers(self._output, self._state.step)
        self._kept.keep_last(self._state)
        self._log.flush()
        self._state.save(self._output, self._about)
        remove_old_checkpoints(self._output, self._job.trainer.keep)


class _Gradients:
    """The gradients of a step: those of one worker's samples, and their sum over the workers."""

    def __init__(self, config: TrainConfig, state: TrainingState, group: Group, workers: Workers) -> None:
        self._config = config
        self._state = state
        self._group = group
        self._workers = workers

    def compute(self, batch: LocalBatch) -> StepSums:
        """Leaves the gradients of this worker's samples in the parameters; returns their figures without the time."""
        self._state.optimizer.zero_grad(set_to_none=True)
        sums = StepSums()
        for crops in batch.groups:
            try:
                result = self._losses(crops.to(self._group.device))
            except (InvalidGaussiansError, NonFiniteLossError) as error:
                logger.error("%s", error)
                sums.loss = math.nan
                break
            if result.loss.requires_grad:
                (result.loss.sum() / self._config.batch).backward()
            sums.loss += float(result.loss.detach().double().sum())
            if result.squared_error is not None:
                sums.psnr += sum(psnr_of(error) for error in result.squared_error.tolist())
            sums.usable += len(crops.images)
        sums.skipped += len(batch.refused)
        return sums

    def _losses(self, crops: Crops) -> BatchLosses:
        network, stages, config = self._state.network, self._state.stages, self._config
        if config.uses_targets:
            targets, threads = crops.targets[:stages], self._workers.count
            return offline_pod_losses(network, crops.images, targets, config, config.precision, threads)
        if config.phase == "pod":
            horizons = config.horizons(stages)
            return online_pod_losses(network, crops.images, horizons, config, self._workers, config.precision)
        through_renderer = quantize_losses if config.phase == "quantize" else finetune_losses
        return through_renderer(network, crops.images, stages, config, self._workers, config.precision)

    def all_reduce(self) -> float:
        """Sums the gradients over the workers and clips their norm; returns the norm before."""
        parameters = self._state.parameters
        if self._group.size > 1:
            # A parameter without a gradient on any worker must stay so: AdamW would let it decay, and one worker alone
            # would not.
            used = torch.tensor([float(p.grad is not None) for p in parameters], device=self._group.device)
            self._group.all_reduce([used])
            for parameter, count in zip(parameters, used.tolist(), strict=True):
                if count and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._group.all_reduce([p.grad for p in parameters if p.grad is not None])
        return float(torch.nn.utils.clip_grad_norm_(parameters, self._config.max_grad_norm))
