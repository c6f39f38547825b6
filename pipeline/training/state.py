"""Everything that a training run must remember, and how it is stored: numbers as safetensors, the rest as JSON.

    OUT/checkpoints/step-00001000/model.safetensors        raw weights
                                  average.safetensors      their moving average
                                  optimizer.safetensors    AdamW's moments, by parameter name
                                  state.json               step, phase, plan, checksums of the others; written last:
                                                           a folder without it is none

A checkpoint of another plan or of other parameters is refused with a sentence. Nothing is unpickled.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from air.predictor.network import PredictorNetwork
from pipeline.errors import DamagedDataError, TrainingError
from pipeline.storage.base import MissingFileError, Storage
from pipeline.training.config import OptimizerConfig

logger = logging.getLogger(__name__)

STATE_VERSION = 2
FOLDER = "checkpoints"
KINDS = ("model", "average", "optimizer")
"""The sets of tensors of a checkpoint, each a file."""

_REMEDY = "`air verify --repair` removes damaged checkpoints; the run then goes on from the one before"

_IS_PART = re.compile(rf"({FOLDER}/step-\d+)/")
"""Matches a file of a checkpoint; nothing else in the folder is ours to delete."""


class TrainingState:
    """Network, moving average and optimiser of a run, and how far it is.

    Attributes:
        network: Raw weights.
        average: The same network with the moving average of the weights.
        step: Steps done.
        seconds: Training time of them.
        skipped: Samples of them that could not be used.
        stages: Stages that have joined.
        best_psnr: Of all validations, dB; none yet: -inf.
        best_step: When that was.
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
        self._names = {id(parameter): name for name, parameter in network.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            network.parameter_groups(config.learning_rate, config.weight_decay),
            betas=(config.beta1, config.beta2),
            fused=True,
        )
        self._learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def join_stage(self, stage: int) -> None:
        """A stage begins to be trained, as a copy of the one before."""
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
        """Writes a checkpoint; `about` is what a later run must agree with. Returns its folder."""
        folder = folder_of(self.step)
        checksums = {}
        for name, tensors in self._tensors().items():
            data = safetensors.torch.save(tensors)
            checksums[name] = hashlib.sha256(data).hexdigest()
            output.write(f"{folder}/{name}.safetensors", data)
        state = {
            "version": STATE_VERSION,
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "stages": self.stages,
            "best_psnr": None if math.isinf(self.best_psnr) else self.best_psnr,
            "best_step": self.best_step,
            "sha256": checksums,
            **about,
        }
        output.write(f"{folder}/state.json", (json.dumps(state, indent=1, sort_keys=True) + "\n").encode())
        return folder

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        moments = {}
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                moments[f"{self._names[id(parameter)]}:{name}"] = value
        sets = {"model": self.network.state_dict(), "average": self.average.state_dict(), "optimizer": moments}
        return {
            kind: {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            for kind, tensors in sets.items()
        }

    def load(self, output: Storage, folder: str, about: Mapping[str, Any]) -> None:
        """Takes up a checkpoint.

        Raises:
            TrainingError: It is of another version or another run; the message says what differs.
            DamagedDataError: It cannot be read.
        """
        state = read_state(output, folder)
        differing = [
            f"{name}: {state.get(name)} -> {value}" for name, value in about.items() if state.get(name) != value
        ]
        if differing:
            raise TrainingError(f"cannot go on from {output.uri(folder)}: it differs (there -> now) in {differing[0]}")
        tensors = {kind: read_tensors(output, folder, kind, state) for kind in KINDS}
        try:
            self.network.load_state_dict(tensors["model"])
            self.average.load_state_dict(tensors["average"])
        except RuntimeError as error:
            raise TrainingError(f"cannot go on from {output.uri(folder)}: its weights do not fit: {error}") from None
        self._load_moments(tensors["optimizer"])
        self.step, self.seconds, self.stages = state["step"], state["seconds"], state["stages"]
        self.skipped = state["skipped"]
        self.best_psnr = -math.inf if state["best_psnr"] is None else state["best_psnr"]
        self.best_step = state["best_step"]

    def average_at(self, output: Storage, folder: str) -> PredictorNetwork:
        """The network with the moving average that another checkpoint of this run holds."""
        network = copy.deepcopy(self.average)
        network.load_state_dict(read_tensors(output, folder, "average", read_state(output, folder)))
        return network

    def _load_moments(self, moments: Mapping[str, Tensor]) -> None:
        parameters = dict(self.network.named_parameters())
        self.optimizer.state.clear()
        for full, value in moments.items():
            name, _, moment = full.rpartition(":")
            parameter = parameters[name]
            value = value if moment == "step" else value.to(parameter)
            self.optimizer.state[parameter][moment] = value


def folder_of(step: int) -> str:
    """Of the checkpoint of a step."""
    return f"{FOLDER}/step-{step:08d}"


def checkpoints(output: Storage) -> list[str]:
    """Folders of the whole checkpoints of a run, oldest first."""
    found = (_IS_PART.match(path) for path, _ in output.list(FOLDER) if path.endswith("/state.json"))
    return sorted(part[1] for part in found if part)


def remove_old_checkpoints(output: Storage, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints, and what is left of ones that a stop cut short before those."""
    kept = checkpoints(output)[-keep:]
    found = {_IS_PART.match(path) for path, _ in output.list(FOLDER)}
    for folder in sorted({part[1] for part in found if part}):
        if kept and folder < kept[-1] and folder not in kept:
            remove_checkpoint(output, folder)


def remove_checkpoint(output: Storage, folder: str) -> None:
    """Deletes a checkpoint; the state goes first: what remains is never taken for whole."""
    output.delete(f"{folder}/state.json")
    output.delete_folder(folder)


def read_state(output: Storage, folder: str) -> dict[str, Any]:
    """What a checkpoint holds beside numbers.

    Raises:
        TrainingError: It is of another version.
        DamagedDataError: It cannot be read.
    """
    path = f"{folder}/state.json"
    try:
        state = json.loads(output.read(path))
        if not isinstance(state, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise DamagedDataError(f"{output.uri(path)} is not a state: {error}; {_REMEDY}") from None
    if state.get("version") != STATE_VERSION:
        raise TrainingError(
            f"{output.uri(folder)} has version {state.get('version')} of the training state, this code reads "
            f"{STATE_VERSION}: finish the run with the code that began it"
        )
    return state


def read_tensors(output: Storage, folder: str, kind: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one of `KINDS`.

    Raises:
        DamagedDataError: They are not those that the state names.
    """
    path = f"{folder}/{kind}.safetensors"
    try:
        data = output.read(path)
    except MissingFileError:
        raise DamagedDataError(f"{output.uri(path)} is missing; {_REMEDY}") from None
    if hashlib.sha256(data).hexdigest() != state["sha256"][kind]:
        raise DamagedDataError(f"{output.uri(path)} is not the file that its state.json names; {_REMEDY}")
    return safetensors.torch.load(data)
