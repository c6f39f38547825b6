"""The training loop: what every worker runs, one or many, here or on Ray Train.

Workers share no state but the sum of their gradients, so a step is the same whatever their number: the global batch is
constant, and every sample of it weighs the same. This module knows nothing of Ray; `pipeline.training.ray` starts it
there.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from air.compute.threads import Workers, limit_torch
from air.errors import InvalidGaussiansError, NonFiniteLossError
from air.metrics import psnr_of
from air.predictor.checkpoint import save_checkpoint
from air.predictor.network import PredictorNetwork
from pipeline.errors import TrainingError
from pipeline.identity import seed_of
from pipeline.inputs.blocks import Block
from pipeline.predictors import is_whole
from pipeline.storage.open import open_storage
from pipeline.training.batches import Crops, Feed, LocalBatch, Prefetcher
from pipeline.training.config import TrainConfig, TrainerConfig
from pipeline.training.group import Group
from pipeline.training.log import TrainingLog
from pipeline.training.losses import (
    BatchLosses,
    finetune_losses,
    offline_pod_losses,
    online_pod_losses,
    quantize_losses,
)
from pipeline.training.start import make_network
from pipeline.training.state import TrainingState, checkpoints, folder_of, read_state, remove_old_checkpoints
from pipeline.training.validation import load_images, picture_grid, validate
from pipeline.work.runner import MIN_SAMPLES_TO_JUDGE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainJob:
    """All that a worker needs to know.

    Attributes:
        source: URI of the samples.
        blocks: Where the samples are.
        output: URI of the run's folder.
        plan: Hash of its plan.
        valid: URI of the validation images.
        canvas: Which of a stage's Gaussians the targets' next stage was built on; None where images are trained on.
        threads: CPU threads of this worker.
    """

    config: TrainConfig
    trainer: TrainerConfig
    source: str
    blocks: tuple[Block, ...]
    output: str
    plan: str
    valid: str
    canvas: str | None
    threads: int


Report = Callable[[Mapping[str, float]], None]
"""Called by rank 0 with what a display shows."""


def train(job: TrainJob, group: Group, report: Report = lambda figures: None) -> dict[str, float]:
    """Trains to the end, from the last checkpoint if there is one; the whole of what a worker does.

    Returns:
        The last figures: step, samples, seconds, best_psnr.

    Raises:
        NonFiniteLossError: The loss stopped being a number. Its batch's keys are named; the last checkpoint stays.
        TrainingError: The checkpoint does not fit, or too many samples cannot be used.
    """
    if group.device.type == "cpu":
        from air.warmup import warm_up

        warm_up("predict")
    with limit_torch(job.threads), Workers(job.threads) as workers:
        return _Run(job, group, workers, report)()


class _Snapshot(NamedTuple):
    """The moving average after a step, and the training time until then."""

    network: PredictorNetwork
    step: int
    seconds: float


class _Run:
    """One worker's part in a run, from its start or restart to the end."""

    def __init__(self, job: TrainJob, group: Group, workers: Workers, report: Report) -> None:
        self._job = job
        self._config = job.config
        self._group = group
        self._workers = workers
        self._report = report
        self._output = open_storage(job.output)
        network, taken = make_network(job.config)
        network.gradient_checkpointing = job.trainer.gradient_checkpointing
        self._state = TrainingState(network.to(group.device).train(), job.config, stages=0)
        parameters = dict(network.named_parameters())
        self._resting = [parameters[name] for name in taken if name in parameters and parameters[name].requires_grad]
        self._about = {"plan": job.plan, "phase": job.config.phase, "batch": job.config.batch, "seed": job.config.seed}
        saved = checkpoints(self._output)
        if saved:
            self._state.load(self._output, saved[-1], self._about)
        self._sums = torch.zeros(5, dtype=torch.float64, device=group.device)
        self._refused: list[str] = []
        self._log: TrainingLog | None = None
        if group.rank == 0:
            if saved:
                self._restore(saved)
            self._log = TrainingLog(self._output, self._state.step)
        self._pictures: list[Tensor] | None = None

    def __call__(self) -> dict[str, float]:
        state, config, trainer = self._state, self._config, self._job.trainer
        feed = Feed(
            self._job.source,
            self._job.blocks,
            config,
            self._job.canvas,
            trainer.cache_mb * 1_000_000,
            self._group.rank,
            self._group.size,
        )
        batches = Prefetcher(feed.batch, state.step, trainer.prefetch)
        self._mark = time.perf_counter()
        try:
            over = config.is_over(state.step, state.seconds)
            while not over:
                self._step(batches.take())
                over = config.is_over(state.step, state.seconds)
                validates = over or state.step % trainer.validate_every == 0
                saves = over or state.step % trainer.checkpoint_every == 0
                self._judge(validates or saves, over)
                if validates:
                    self._validate()
                if saves:
                    self._save()
        finally:
            batches.close()
            if self._log:
                self._log.close()
        return {**self._position(), "best_psnr": state.best_psnr}

    def _position(self) -> dict[str, float]:
        state = self._state
        return {"step": state.step, "samples": state.step * self._config.batch, "seconds": round(state.seconds, 3)}

    def _step(self, batch: LocalBatch) -> None:
        state, config = self._state, self._config
        progress = config.progress(state.step, state.seconds)
        for stage in range(state.stages, config.stages_at(progress)):
            # Weights of a checkpoint are trained already; a fresh network's first stages start as they are.
            if config.from_ is None and state.step > 0:
                state.join_stage(stage)
            state.stages = stage + 1
        if config.phase == "patch":
            for parameter in self._resting:
                parameter.requires_grad_(state.step >= config.patch_warmup_steps)
        torch.manual_seed(seed_of(config.seed, "step", state.step, self._group.rank))
        sums, keys = self._backward(batch)
        norm = self._reduce(sums)
        if not math.isfinite(float(sums[0])) or not math.isfinite(norm):
            self._stop(batch, keys)
        rate = state.update(progress)
        state.seconds += float(sums[4])
        state.skipped += int(sums[3])
        self._refused = batch.refused[-1:] or self._refused
        self._sums += sums
        if self._log and (state.step % self._job.trainer.log_every == 0 or config.is_over(state.step, state.seconds)):
            self._tell(rate, norm)

    def _backward(self, batch: LocalBatch) -> tuple[Tensor, list[str]]:
        """Gradients of this rank's samples. Returns (loss, PSNR, usable samples, skipped, seconds), as sums."""
        state, config = self._state, self._config
        state.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(5, dtype=torch.float64, device=self._group.device)
        for crops in batch.groups:
            try:
                result = self._losses(crops.to(self._group.device))
            except (InvalidGaussiansError, NonFiniteLossError) as error:
                logger.error("%s", error)
                sums[0] = math.nan
                break
            if result.loss.requires_grad:
                (result.loss.sum() / config.batch).backward()
            sums[0] += result.loss.detach().double().sum()
            if result.squared_error is not None:
                sums[1] += sum(psnr_of(error) for error in result.squared_error.tolist())
            sums[2] += len(crops.images)
        sums[3] = len(batch.refused)
        now = time.perf_counter()
        if self._group.rank == 0:
            sums[4] = now - self._mark
        self._mark = now
        return sums, batch.keys

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

    def _reduce(self, sums: Tensor) -> float:
        """Sums gradients and figures over the workers, shortens the gradient; returns its length before."""
        parameters = self._state.parameters
        if self._group.size > 1:
            # A parameter that nobody used must stay without a gradient, or it would decay on some numbers of workers.
            used = torch.tensor([float(p.grad is not None) for p in parameters], device=self._group.device)
            self._group.sum([sums])
            self._group.sum([used])
            for parameter, count in zip(parameters, used.tolist(), strict=True):
                if count and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._group.sum([p.grad for p in parameters if p.grad is not None])
        return float(torch.nn.utils.clip_grad_norm_(parameters, self._config.clip))

    def _stop(self, batch: LocalBatch, keys: list[str]) -> None:
        named = sorted(self._group.gather(keys))
        shown = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
        last = checkpoints(self._output)
        kept = f"The last good checkpoint is {self._output.uri(last[-1])}." if last else "There is no checkpoint yet."
        raise NonFiniteLossError(
            f"the loss is not a number in step {self._state.step}, with the samples {shown}. {kept} "
            "Look at these images; otherwise begin a new run from that checkpoint with a lower rate"
        )

    def _judge(self, keeps: bool, over: bool) -> None:
        """Stops a run whose samples are mostly unusable, before anything is kept of one that has seen none.

        Args:
            keeps: Whether a validation or a checkpoint is due.
            over: Whether the run ends here.
        """
        bad, seen = self._state.skipped, self._state.step * self._config.batch
        share = self._job.trainer.max_bad_share
        none = keeps and bad == seen
        if not none and not ((over or seen >= MIN_SAMPLES_TO_JUDGE) and bad > share * seen):
            return
        examples = self._group.gather(self._refused)
        told = f", such as {examples[0]}" if examples else ""
        raise TrainingError(
            f"{bad} of the {seen} samples so far cannot be used{told}. "
            + (
                "Mend the input."
                if none
                else f"max_bad_share allows a share of {share:g}: mend the input, or raise it."
            )
        )

    def _tell(self, rate: float, norm: float) -> None:
        loss, psnr, usable, skipped, seconds = self._sums.tolist()
        self._sums.zero_()
        means = {}
        if usable:
            means["loss"] = loss / usable
            if not self._config.uses_targets:
                means["psnr"] = psnr / usable
        figures = {
            **self._position(),
            **means,
            "rate": rate,
            "gradient": norm,
            "skipped": skipped,
            "samples_per_second": (usable + skipped) / max(seconds, 1e-9),
        }
        assert self._log is not None
        self._log.add(self._state.step, {name: value for name, value in figures.items() if name != "step"})
        self._report(figures)

    def _validate(self) -> None:
        """Judges the moving average; keeps it if it is the best so far."""
        state, config, group = self._state, self._config, self._group
        if self._pictures is None:
            self._pictures = load_images(
                self._job.valid, config.valid_images, config.valid_side, group.rank, group.size
            )
        pictures = [picture.to(group.device) for picture in self._pictures]
        quantised = config.phase == "quantize"
        score = validate(
            state.average, pictures, state.stages, config.control(), self._job.threads, shown=4, quantised=quantised
        )
        sums = torch.tensor([score.images, score.psnr, *score.gaussians], dtype=torch.float64, device=group.device)
        group.sum([sums])
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
            self._keep("best", self._snapshot(), psnr)

    def _save(self) -> None:
        """Writes the moving average as `last.safetensors`, and a checkpoint to go on from; it vouches for all else."""
        if self._log:
            strangers = [folder for folder in checkpoints(self._output) if folder >= folder_of(self._state.step)]
            if strangers:
                raise TrainingError(
                    f"{self._output.uri(strangers[-1])} is there, and this process has not written it: another "
                    "`air train` is at work in this folder. This one stops; if both did, run one again"
                )
            self._keep("last", self._snapshot())
            self._log.flush()
            self._state.save(self._output, self._about)
            remove_old_checkpoints(self._output, self._job.trainer.keep)

    def _restore(self, saved: Sequence[str]) -> None:
        """Writes `last` and `best` again where a stop or a hand left none that is whole; what resumes needs neither.

        A best whose step has no checkpoint any more is gone: the next validation makes a new one.
        """
        state = self._state
        if not is_whole(self._output.uri("last.safetensors")):
            self._keep("last", self._snapshot())
        if math.isinf(state.best_psnr) or is_whole(self._output.uri("best.safetensors")):
            return
        folder = folder_of(state.best_step)
        if folder in saved:
            seconds = read_state(self._output, folder)["seconds"]
            snapshot = _Snapshot(state.average_at(self._output, folder), state.best_step, seconds)
            self._keep("best", snapshot, state.best_psnr)
            return
        logger.warning(
            "%s is missing or damaged, and of its step, %d, no checkpoint is left: the best so far, %.2f dB, is gone",
            self._output.uri("best.safetensors"),
            state.best_step,
            state.best_psnr,
        )
        state.best_psnr, state.best_step = -math.inf, 0

    def _snapshot(self) -> _Snapshot:
        return _Snapshot(self._state.average, self._state.step, self._state.seconds)

    def _keep(self, name: str, snapshot: _Snapshot, psnr: float | None = None) -> None:
        """Writes a moving average with its card, and the PSNR of its validation where it had one."""
        with tempfile.TemporaryDirectory(prefix="air-") as folder:
            path = Path(folder) / f"{name}.safetensors"
            save_checkpoint(
                path,
                snapshot.network,
                phase=self._config.phase,
                step=snapshot.step,
                plan=self._job.plan,
                metrics={} if psnr is None else {"valid_psnr": psnr},
                notes={"seed": self._config.seed, "seconds": snapshot.seconds},
            )
            self._output.upload(path, path.name)
            self._output.upload(path.with_suffix(".json"), f"{name}.json")
