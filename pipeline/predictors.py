"""References to predictors, by name or URI and checksum, which a driver makes and workers load.

A driver reads a checkpoint's card and checksum (`find_predictor`). A worker loads the weights once (`load`), and
refuses weights with another checksum. With the grid, a driver needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from air.defaults import COMPACT, GRID, GRID_PATCH_SIZE, GRID_STAGES, has_compact
from air.errors import CheckpointError
from pipeline.errors import ConfigError
from pipeline.registry.names import describe_unknown, locate
from pipeline.storage.base import MissingFileError, Storage
from pipeline.storage.uri import normalise
from pipeline.weights import local_weights, model_name
from pipeline.work.plan import Plan

if TYPE_CHECKING:
    import torch

    from air.predictor.base import Predictor


@dataclass(frozen=True)
class PredictorReference:
    """Identifies a predictor and its weights.

    Attributes:
        name: "grid", "compact" or the normalised URI of a checkpoint.
        model: Its name in tables: "grid", or the architecture and the first 12 digits of the weights' checksum.
        sha256: Checksum of the weights, hexadecimal; empty for the grid.
        patch_size: Pixels between anchors.
        num_stages: Number of stages that it can predict; None for the grid, which has no limit.
    """

    name: str
    model: str
    sha256: str
    patch_size: int
    num_stages: int | None

    def stages(self, wanted: int | None) -> int:
        """The number of stages to run: `wanted`, or else all stages of a network, or the default of the grid.

        Raises:
            ConfigError: The predictor has fewer stages than are wanted.
        """
        if wanted is None:
            return self.num_stages or GRID_STAGES
        if self.num_stages is not None and wanted > self.num_stages:
            raise ConfigError(
                f"stages = {wanted}: {self.name} has {self.num_stages} stages; set stages to {self.num_stages} or less"
            )
        return wanted

    def hold(self, plan: Plan, key: str = "predictor") -> Plan:
        """The plan with the predictor's checksum in place of its path, so that a checkpoint may move but not change.

        Args:
            plan: The plan of a job.
            key: The key of the configuration that holds the predictor's name.
        """
        return plan.holding(key, self.model, self.sha256)


def find_predictor(
    name: str,
    patch_size: int | None = None,
    others: Sequence[str] = (GRID,),
    output: Storage | None = None,
    key: str = "predictor",
) -> PredictorReference:
    """Finds a predictor; reads its card, and the checksum of its weights.

    Args:
        name: "grid", "compact" (the checkpoint that this package ships), a path or URI of a checkpoint, or a name in a
            registry (`pipeline.registry.names`).
        patch_size: The patch size that it must have; any if not given.
        others: Names beside "compact" that the caller takes, for the message about an unknown name.
        output: The output folder of the job, whose plan says what an alias stood for when the job began.
        key: The key of the plan's configuration that holds the predictor.

    Raises:
        CheckpointError: There is no such predictor, or it has no card that fits.
        ConfigError: The predictor has another patch size.
    """
    if name == GRID:
        return PredictorReference(GRID, GRID, "", patch_size or GRID_PATCH_SIZE, None)
    from air.predictor.checkpoint import check_weights, read_card
    from air.predictor.load import checkpoint_path

    located = locate(name, "predictor", output, key)
    try:
        checkpoint_path(located, others)  # its message has the name as it was typed
    except CheckpointError as error:
        raise CheckpointError(f"{error}{describe_unknown(name)}") from None
    uri = located if located == COMPACT else normalise(located)
    with local_checkpoint(uri) as path:
        card = read_card(path)
        check_weights(path, card)
    has, stages = card.settings["patch_size"], card.settings["num_stages"]
    if patch_size is not None and patch_size != has:
        raise ConfigError(f"patch_size = {patch_size}: {name} has patch size {has}; set patch_size to {has}")
    return PredictorReference(uri, model_name(card.architecture, card.sha256), card.sha256, has, stages)


def default_predictor(patch_size: int | None, stages: int | None) -> PredictorReference:
    """The network that this package ships, if it has that patch size and as many stages; else the grid.

    Args:
        patch_size: Pixels between anchors; None for any.
        stages: Number of stages that are wanted; None for any.
    """
    if has_compact():
        shipped = find_predictor(COMPACT)
        if patch_size in (None, shipped.patch_size) and (stages or 0) <= (shipped.num_stages or 0):
            return shipped
    return find_predictor(GRID, patch_size)


def load(reference: PredictorReference, device: torch.device) -> Predictor:
    """Loads a predictor onto a device. A network is kept in this process, so that the next call costs nothing.

    Raises:
        CheckpointError: The predictor cannot be loaded, or its weights have another checksum than the reference.
    """
    from air.predictor.base import GridPredictor

    return GridPredictor(reference.patch_size) if reference.name == GRID else _load(reference, str(device))


@lru_cache(maxsize=2)
def _load(reference: PredictorReference, device: str) -> Predictor:
    from air.predictor.checkpoint import load_checkpoint

    with local_checkpoint(reference.name) as path:
        network, card = load_checkpoint(path)
    if card.sha256 != reference.sha256:
        raise CheckpointError(
            f"{reference.name} has changed since it was looked up (sha256 {reference.sha256[:12]} -> "
            f"{card.sha256[:12]}): give every snapshot of a round a name of its own"
        )
    return network.to(device)


def is_whole(uri: str) -> bool:
    """Whether a checkpoint exists, with a card that fits its weights."""
    from air.predictor.checkpoint import check_weights, read_card

    try:
        with local_checkpoint(uri) as path:
            check_weights(path, read_card(path))
    except (CheckpointError, MissingFileError):
        return False
    return True


@contextmanager
def local_checkpoint(name: str) -> Iterator[Path]:
    """A predictor's checkpoint as a local file, its card beside it. A remote checkpoint is copied for the time being.

    Args:
        name: "compact", or the URI of a file NAME.safetensors.

    Raises:
        CheckpointError: The name is neither of these.
        StorageError: The checkpoint cannot be fetched.
    """
    from air.predictor.load import checkpoint_path

    if name == COMPACT:
        yield checkpoint_path(name)
        return
    checkpoint_path(name)  # its message is clearer than that of a missing file
    with local_weights(name) as path:
        yield path
