"""Everything that a training run must remember, and how it is stored: numbers as safetensors, the rest as JSON.

    OUT/checkpoints/step-00001000/model.safetensors        raw weights
                                  average.safetensors      their moving average
                                  optimizer.safetensors    AdamW's moments, by parameter name
                                  state.json               step, phase, plan, checksums of the other files; written
                                                           last: a folder without it is not a checkpoint
    OUT/best.safetensors, best.json                        the moving average with the best validation, and its card
    OUT/last.safetensors, last.json                        the moving average of the last checkpoint, and its card

A run goes on from `checkpoints/` alone. `best` and `last` are what it makes for others; `KeptNetworks` writes them.
A checkpoint of another plan or with other parameters is refused, with an error that says what differs. Nothing is
unpickled.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from air.predictor.checkpoint import save_checkpoint
from air.predictor.network import PredictorNetwork
from pipeline.errors import DamagedDataError, TrainingError
from pipeline.predictors import is_whole
from pipeline.storage.base import MissingFileError, Storage
from pipeline.training.config import OptimizerConfig

logger = logging.getLogger(__name__)

STATE_VERSION = 2
FOLDER = "checkpoints"
KINDS = ("model", "average", "optimizer")
"""The sets of tensors of a checkpoint; each is a file."""

_REMEDY = "`air verify --repair` removes damaged checkpoints; the run then goes on from the checkpoint before"

_IS_PART = re.compile(rf"({FOLDER}/step-\d+)/")
"""Matches a file of a checkpoint. A run deletes nothing else in that folder."""


class TrainingState:
    """Network, moving average and optimiser of a run, and how far the run is.

    Attributes:
        network: The network with the raw weights.
        average: The same network with the exponential moving average of the weights.
        step: Steps done.
        seconds: Training time of these steps.
        skipped: Samples of these steps that could not be used.
        stages: Stages that have joined.
        best_psnr: The highest PSNR of all validations, in dB; -inf before the first validation.
        best_step: The step of that validation.
    """

    def __init__(self, network: PredictorNetwork, config: OptimizerConfig, stages: int) -> None:
        self.network = network
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self.step = 0
        self.seconds = 0.0
        self.skipped = 0
        self.stages = stages
        self.best_psnr = -math.inf
        self.best_step = 0
        self._config = config
        self.optimizer = torch.optim.AdamW(
            network.parameter_groups(config.learning_rate, config.weight_decay),
            betas=(config.beta1, config.beta2),
            fused=True,
        )
        self._learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def join_stage(self, stage: int) -> None:
        """Starts to train a stage, as a copy of the stage before it."""
        if stage:
            self.network.start_stage(stage)
            self.average.start_stage(stage)
        self.stages = stage + 1

    def update(self, progress: float) -> float:
        """Takes one AdamW step with the gradients that are there, and updates the moving average.

        Args:
            progress: Fraction of the run that is done.

        Returns:
            The learning rate of the step.
        """
        fraction = self._config.learning_rate_fraction(self.step, progress)
        for group, highest in zip(self.optimizer.param_groups, self._learning_rates, strict=True):
            group["lr"] = highest * fraction
        self.optimizer.step()
        self.step += 1
        # A young average forgets faster: otherwise the first weights would linger.
        keep = min(self._config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(value, 1 - keep)
            for mean, value in zip(self.average.buffers(), self.network.buffers(), strict=True):
                mean.copy_(value)
        return self._config.learning_rate * fraction

    def save(self, output: Storage, about: Mapping[str, Any]) -> str:
        """Writes a checkpoint.

        Args:
            output: The run's folder.
            about: What the run that goes on from the checkpoint must agree with.

        Returns:
            The checkpoint's folder.
        """
        state = {
            "seconds": self.seconds,
            "skipped": self.skipped,
            "stages": self.stages,
            "best_psnr": None if math.isinf(self.best_psnr) else self.best_psnr,
            "best_step": self.best_step,
            **about,
        }
        tensors = {
            "model": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": moments_of(self.optimizer, self.network),
        }
        return write_checkpoint(output, self.step, tensors, state)

    def load(self, output: Storage, folder: str, about: Mapping[str, Any]) -> None:
        """Takes over the state of a checkpoint.

        Args:
            output: The run's folder.
            folder: The checkpoint's folder in it.
            about: What the checkpoint must agree with.

        Raises:
            TrainingError: The checkpoint is of another version or another run; the message says what differs.
            DamagedDataError: The checkpoint cannot be read.
        """
        state, tensors = read_checkpoint(output, folder, KINDS, about)
        try:
            self.network.load_state_dict(tensors["model"])
            self.average.load_state_dict(tensors["average"])
        except RuntimeError as error:
            raise TrainingError(f"cannot go on from {output.uri(folder)}: its weights do not fit: {error}") from None
        load_moments(self.optimizer, self.network, tensors["optimizer"])
        self.step, self.seconds, self.stages = state["step"], state["seconds"], state["stages"]
        self.skipped = state["skipped"]
        self.best_psnr = -math.inf if state["best_psnr"] is None else state["best_psnr"]
        self.best_step = state["best_step"]

    def average_at(self, output: Storage, folder: str) -> PredictorNetwork:
        """The network with the moving average of another checkpoint of this run."""
        network = copy.deepcopy(self.average)
        network.load_state_dict(read_tensors(output, folder, "average", read_state(output, folder)))
        return network


class Snapshot(NamedTuple):
    """The moving average after a step, and the training time until then in seconds."""

    network: PredictorNetwork
    step: int
    seconds: float


class KeptNetworks:
    """`best.safetensors` and `last.safetensors` of a run, each with its card. Rank 0 alone writes them.

    Args:
        output: The run's folder.
        phase: The training phase, for the card.
        plan: Hash of the run's plan, for the card.
        seed: The run's seed, for the card.
    """

    def __init__(self, output: Storage, phase: str, plan: str, seed: int) -> None:
        self._output = output
        self._phase = phase
        self._plan = plan
        self._seed = seed

    def keep_last(self, state: TrainingState) -> None:
        """Writes the moving average as `last`."""
        self._write("last", Snapshot(state.average, state.step, state.seconds))

    def keep_best(self, state: TrainingState) -> None:
        """Writes the moving average as `best`; it has just reached `state.best_psnr`."""
        self._write("best", Snapshot(state.average, state.step, state.seconds), state.best_psnr)

    def restore(self, state: TrainingState) -> None:
        """Writes `last` and `best` again from the run's checkpoints, where one of them is missing or damaged.

        `best` can be restored only while the checkpoint of its step exists. After that it is lost: `state` forgets it,
        and the next validation writes a new one.

        Args:
            state: The state of the newest checkpoint.
        """
        if not is_whole(self._output.uri("last.safetensors")):
            self.keep_last(state)
        if math.isinf(state.best_psnr) or is_whole(self._output.uri("best.safetensors")):
            return
        folder = folder_of(state.best_step)
        if folder in checkpoints(self._output):
            seconds = read_state(self._output, folder)["seconds"]
            snapshot = Snapshot(state.average_at(self._output, folder), state.best_step, seconds)
            self._write("best", snapshot, state.best_psnr)
            return
        logger.warning(
            "%s is missing or damaged, and the checkpoint of its step, %d, was removed: the network with the best "
            "validation so far, %.2f dB, is lost",
            self._output.uri("best.safetensors"),
            state.best_step,
            state.best_psnr,
        )
        state.best_psnr, state.best_step = -math.inf, 0

    def _write(self, name: str, snapshot: Snapshot, psnr: float | None = None) -> None:
        """Writes a moving average with its card; the card has the PSNR of its validation where one was made."""
        with tempfile.TemporaryDirectory(prefix="air-") as folder:
            path = Path(folder) / f"{name}.safetensors"
            save_checkpoint(
                path,
                snapshot.network,
                phase=self._phase,
                step=snapshot.step,
                plan=self._plan,
                metrics={} if psnr is None else {"valid_psnr": psnr},
                notes={"seed": self._seed, "seconds": snapshot.seconds},
            )
            self._output.upload(path, path.name)
            self._output.upload(path.with_suffix(".json"), f"{name}.json")


def moments_of(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The state of an optimiser, by the name of the network's parameter and that of the moment."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        f"{names[id(parameter)]}:{name}": value
        for parameter, values in optimizer.state.items()
        for name, value in values.items()
    }


def load_moments(optimizer: torch.optim.Optimizer, network: nn.Module, moments: Mapping[str, Tensor]) -> None:
    """Gives an optimiser the state that `moments_of` made."""
    parameters = dict(network.named_parameters())
    optimizer.state.clear()
    for full, value in moments.items():
        name, _, moment = full.rpartition(":")
        parameter = parameters[name]
        optimizer.state[parameter][moment] = value if moment == "step" else value.to(parameter)


def write_checkpoint(
    output: Storage, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> str:
    """Writes a checkpoint.

    Args:
        output: The run's folder.
        step: Its step.
        tensors: Sets of tensors by kind; each becomes a file.
        state: What `state.json` holds beside the version, the step and the checksums of these files.

    Returns:
        The checkpoint's folder.
    """
    folder = folder_of(step)
    checksums = {}
    for kind, members in tensors.items():
        data = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in members.items()})
        checksums[kind] = hashlib.sha256(data).hexdigest()
        output.write(f"{folder}/{kind}.safetensors", data)
    whole = {"version": STATE_VERSION, "step": step, "sha256": checksums, **state}
    output.write(f"{folder}/state.json", (json.dumps(whole, indent=1, sort_keys=True) + "\n").encode())
    return folder


def read_checkpoint(
    output: Storage, folder: str, kinds: Sequence[str], about: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The contents of a checkpoint's `state.json`, and its tensors by kind.

    Args:
        output: The run's folder.
        folder: The checkpoint's folder in it.
        kinds: The sets of tensors to read.
        about: What the checkpoint must agree with.

    Raises:
        TrainingError: The checkpoint is of another version or another run; the message says what differs.
        DamagedDataError: The checkpoint cannot be read.
    """
    state = read_state(output, folder)
    differing = [f"{name}: {state.get(name)} -> {value}" for name, value in about.items() if state.get(name) != value]
    if differing:
        raise TrainingError(f"cannot go on from {output.uri(folder)}: it differs (there -> now) in {differing[0]}")
    return state, {kind: read_tensors(output, folder, kind, state) for kind in kinds}


def folder_of(step: int) -> str:
    """The folder of the checkpoint of a step."""
    return f"{FOLDER}/step-{step:08d}"


def checkpoints(output: Storage) -> list[str]:
    """The folders of a run's complete checkpoints, oldest first."""
    found = (_IS_PART.match(path) for path, _ in output.list(FOLDER) if path.endswith("/state.json"))
    return sorted(part[1] for part in found if part)


def refuse_strangers(output: Storage, step: int) -> None:
    """Refuses to write the checkpoint of a step beside checkpoints that only another process can have written.

    Raises:
        TrainingError: There is a checkpoint of this step or of a later one.
    """
    strangers = [folder for folder in checkpoints(output) if folder >= folder_of(step)]
    if strangers:
        raise TrainingError(
            f"{output.uri(strangers[-1])} is there, and this process has not written it: another "
            "`air train` is at work in this folder. This process stops; if both stop, run one of them again"
        )


def remove_old_checkpoints(output: Storage, keep: int) -> None:
    """Deletes all checkpoints but the newest `keep`, and older incomplete ones, which a stop has cut short."""
    kept = checkpoints(output)[-keep:]
    found = {_IS_PART.match(path) for path, _ in output.list(FOLDER)}
    for folder in sorted({part[1] for part in found if part}):
        if kept and folder < kept[-1] and folder not in kept:
            remove_checkpoint(output, folder)


def remove_checkpoint(output: Storage, folder: str) -> None:
    """Deletes a checkpoint, `state.json` first: what a stop may leave of it never looks complete."""
    output.delete(f"{folder}/state.json")
    output.delete_folder(folder)


def read_state(output: Storage, folder: str) -> dict[str, Any]:
    """The contents of a checkpoint's `state.json`.

    Raises:
        TrainingError: The checkpoint is of another version.
        DamagedDataError: The file cannot be read.
    """
    path = f"{folder}/state.json"
    try:
        state = json.loads(output.read(path))
        if not isinstance(state, dict):
            raise ValueError("it holds no JSON object")
    except ValueError as error:
        raise DamagedDataError(f"{output.uri(path)} is not a state: {error}; {_REMEDY}") from None
    if state.get("version") != STATE_VERSION:
        raise TrainingError(
            f"{output.uri(folder)} has version {state.get('version')} of the training state, and this code reads "
            f"version {STATE_VERSION}: finish the run with the code that began it"
        )
    return state


def read_tensors(output: Storage, folder: str, kind: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, of one kind, by name.

    Raises:
        DamagedDataError: The file is missing, or its checksum is not the one in the state.
    """
    path = f"{folder}/{kind}.safetensors"
    try:
        data = output.read(path)
    except MissingFileError:
        raise DamagedDataError(f"{output.uri(path)} is missing; {_REMEDY}") from None
    if hashlib.sha256(data).hexdigest() != state["sha256"][kind]:
        raise DamagedDataError(f"{output.uri(path)} is not the file that its state.json names; {_REMEDY}")
    return safetensors.torch.load(data)
