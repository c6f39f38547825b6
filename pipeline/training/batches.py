"""A worker's training batches: its slice of each global batch, decoded, cropped, augmented, in groups of one size."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from air.arguments import image_tensor
from pipeline.errors import Rejected
from pipeline.identity import seed_of
from pipeline.inputs.blocks import BlockReader, RawSample
from pipeline.training.augment import crop_side, make_crop
from pipeline.training.group import Group
from pipeline.training.order import GlobalOrder, rank_slice
from pipeline.training.plan import TrainJob
from pipeline.training.targets import StageTargets, cut_targets

logger = logging.getLogger(__name__)

_MAX_NAMED = 10_000
"""Unusable samples that the log names, at most; further ones are only counted."""


@dataclass
class Crops:
    """Crops of one size.

    Attributes:
        images: Shape (B, 3, H, W), float32 in [0, 1].
        targets: The targets of each stage; empty where training needs images alone.
    """

    images: Tensor
    targets: list[StageTargets] = field(default_factory=list)

    def to(self, device: torch.device) -> Crops:
        """The crops on a device."""
        return Crops(self.images.to(device), [stage.to(device) for stage in self.targets])


@dataclass
class LocalBatch:
    """A rank's slice of a global batch.

    Attributes:
        keys: The keys of its samples.
        groups: Its crops, one group for each size.
        refused: The samples that could not be used: where each one is, and why it was refused.
    """

    keys: list[str] = field(default_factory=list)
    groups: list[Crops] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


class BatchSource(Protocol):
    """What the training loop takes batches from."""

    def batch(self, step: int) -> LocalBatch:
        """This rank's slice of the global batch of a step, counted from 0."""
        ...

    def close(self) -> None:
        """Gives up files and memory; no batch follows."""
        ...


class Feed:
    """Makes a rank's batches from the samples of a run.

    Args:
        job: The run.
        group: The workers, of which this rank is one.
    """

    def __init__(self, job: TrainJob, group: Group) -> None:
        self._config = job.config
        self._canvas = job.canvas
        self._order = GlobalOrder([block.count for block in job.blocks], job.config)
        self._slice = rank_slice(job.config.batch, group.rank, group.size)
        self._reader = BlockReader(
            job.blocks,
            job.config.window,
            job.trainer.cache_mb * 1_000_000,
            with_targets=job.canvas is not None,
        )
        self._named: set[tuple[int, int]] = set()

    def batch(self, step: int) -> LocalBatch:
        """This rank's slice of the global batch of a step, counted from 0."""
        config = self._config
        side = crop_side(config, config.seed, step)
        batch = LocalBatch()
        sizes: dict[tuple[int, ...], list[tuple[np.ndarray, list[StageTargets]]]] = {}
        for place in self._order.batch(step)[self._slice]:
            try:
                sample = self._reader.read(place.block, place.row)
                batch.keys.append(sample.key)
                crop, targets = self._crop(sample, side, place.epoch)
            except Rejected as rejection:
                batch.refused.append(f"{self._reader.name(place.block, place.row)}: {rejection}")
                self._warn((place.block, place.row), batch.refused[-1])
                continue
            sizes.setdefault(crop.shape, []).append((crop, targets))
        for members in sizes.values():
            stages = [StageTargets.stack(parts) for parts in zip(*(targets for _, targets in members), strict=True)]
            batch.groups.append(Crops(torch.stack([image_tensor(crop) for crop, _ in members]), stages))
        return batch

    def close(self) -> None:
        """Closes the blocks that are open, and forgets the decoded images."""
        self._reader.close()

    def _warn(self, where: tuple[int, int], what: str) -> None:
        """Names an unusable sample in the log once, not again in every epoch."""
        if where not in self._named and len(self._named) < _MAX_NAMED:
            self._named.add(where)
            logger.warning("passed over: %s", what)
            if len(self._named) == _MAX_NAMED:
                logger.warning("further samples that cannot be used are counted and not named")

    def _crop(self, sample: RawSample, side: int, epoch: int) -> tuple[np.ndarray, list[StageTargets]]:
        config = self._config
        seed = seed_of(config.seed, "augment", epoch, sample.key, sample.view)
        if self._canvas is None:
            return make_crop(sample.rgb, side, config, seed), []
        assert sample.row is not None
        return cut_targets(sample.row, sample.rgb, config.stages, side, self._canvas, seed)


Batch = TypeVar("Batch")


class Prefetcher(Generic[Batch]):
    """Makes batches in a thread, step after step, a few ahead of their use.

    Args:
        make: Makes the batch of a step; called in that thread.
        first: The first step.
        ahead: Number of batches that are kept ready.
    """

    def __init__(self, make: Callable[[int], Batch], first: int, ahead: int) -> None:
        self._make = make
        self._ready: queue.Queue[Any] = queue.Queue(max(1, ahead))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first,), name="feed", daemon=True)
        self._thread.start()

    def _run(self, step: int) -> None:
        while not self._stopped.is_set():
            try:
                item: Any = self._make(step)
            except Exception as error:  # noqa: BLE001  # `take` raises it again
                item = error
            while not self._stopped.is_set():
                try:
                    self._ready.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(item, Exception):
                return
            step += 1

    def take(self) -> Batch:
        """The next batch. If making it raised an error, raises that error."""
        item = self._ready.get()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self._thread.join(timeout=10)
