"""Watches whether a Ray cluster has room for the workers of a training run.

Ray Train waits without a word, and without end, for a node that is gone. This module must not know what the workers do.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from pipeline.errors import JobFailedError

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0


class RoomWatch:
    """Says when the nodes of the cluster have no room for all workers, and when they have it again.

    Args:
        workers: Number of workers.
        resources: What each of them reserves, by Ray's names.
        max_wait_seconds: The run fails without room for so long; None if it waits for ever.
    """

    def __init__(self, workers: int, resources: Mapping[str, float], max_wait_seconds: float | None) -> None:
        self._workers = workers
        self._resources = resources
        self._max_wait_seconds = max_wait_seconds
        self._looked = -math.inf
        self._short_since: float | None = None
        self._seen: dict[str, str] = {}

    @property
    def is_short(self) -> bool:
        """Whether there was too little room at the last look."""
        return self._short_since is not None

    def look(self) -> None:
        """Looks at the nodes, every two seconds at most.

        Raises:
            JobFailedError: There has been too little room for `max_wait_seconds`.
        """
        import ray

        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        alive = [node for node in ray.nodes() if node["Alive"]]
        names = {node["NodeID"]: node["NodeManagerHostname"] for node in alive}
        gone = sorted(name for identity, name in self._seen.items() if identity not in names)
        self._seen = {**self._seen, **names}
        room = sum(room_on(node["Resources"], self._resources) for node in alive)
        if room >= self._workers:
            if self._short_since is not None:
                logger.warning("the cluster has room for all %d workers again", self._workers)
            self._short_since, self._seen = None, names
            return
        each = ", ".join(f"{amount:g} {name}" for name, amount in self._resources.items())
        lost = f"; gone: {', '.join(gone)}" if gone else ""
        waits = f"{self._workers} workers with {each} each, and the cluster has room for {room}{lost}"
        if self._short_since is None:
            self._short_since = now
            logger.warning(
                "training waits for room for %s. It goes on from the last checkpoint when a node joins; to train on "
                "fewer workers, end it and run the same command with a lower --workers",
                waits,
            )
        elif self._max_wait_seconds is not None and now - self._short_since > self._max_wait_seconds:
            raise JobFailedError(
                f"training has waited {self._max_wait_seconds:g} s (max_wait_seconds) for room for {waits}. The same "
                "command goes on from the last checkpoint, with any number of --workers"
            )


def room_on(node: Mapping[str, Any], resources: Mapping[str, float]) -> int:
    """How many workers with these resources a node can hold when it does nothing else."""
    return min(math.floor(node.get(name, 0.0) / amount + 1e-6) for name, amount in resources.items())
