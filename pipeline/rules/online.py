"""Fresh roll-outs of the rule that learns: the gradient of each, in this process or in several."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

from torch import Tensor

from air.compute.threads import limit_torch
from air.optimization.rule import LearnedRule
from air.warmup import warm_up
from pipeline import logs
from pipeline.errors import Rejected
from pipeline.identity import seed_of
from pipeline.inputs.pictures import Picture, find_pictures
from pipeline.rules.config import RuleConfig
from pipeline.rules.draw import draw_fit, fraction_for, run_fit
from pipeline.rules.learn import Samples, online_gradient


class Lesson(NamedTuple):
    """What one roll-out teaches.

    Attributes:
        objective: The sum of credit times move.
        gradient: Its gradient by the rule's parameters.
        psnr: After the last update, in dB.
        updates: Number of updates.
    """

    objective: float
    gradient: list[Tensor]
    psnr: float
    updates: int


def lesson(pictures: Sequence[Picture], rule: LearnedRule, config: RuleConfig, step: int, number: int) -> Lesson | str:
    """Rolls the rule out in a fit of a picture that (seed, step, number) draw.

    Returns:
        What it teaches, or why the picture cannot be used.
    """
    seed = seed_of(config.seed, "online", step, number)
    picture = pictures[seed_of(config.seed, "picture", step, number) % len(pictures)]
    try:
        _, rgb = picture.read()
        draw = draw_fit(rgb.shape[0], rgb.shape[1], config, seed)
        fraction = fraction_for(config.samples, draw, config.growth())
        result = run_fit(rgb, draw, rule, config, fraction)
    except Rejected as rejection:
        return f"{picture.source}: {rejection}"
    samples = Samples(result.features, result.move, result.credit, result.curvature)
    with limit_torch(1):
        objective, gradient = online_gradient(rule, samples, fraction)
    return Lesson(objective, gradient, float(result.psnr[-1]), draw.steps)


class Lessons:
    """Makes the lessons of steps. The number of processes changes no bit of them.

    Args:
        inputs: Pictures, as `pipeline.inputs.pictures.find_pictures` takes them.
        config: What is learned, and by how many processes.
    """

    def __init__(self, inputs: Sequence[str], config: RuleConfig) -> None:
        self._config = config
        self._pool: ProcessPoolExecutor | None = None
        self._pictures: list[Picture] = []
        if config.workers > 1 and config.roll_outs > 1:
            self._pool = ProcessPoolExecutor(
                max_workers=min(config.workers, config.roll_outs),
                mp_context=get_context("spawn"),
                initializer=_begin_worker,
                initargs=(tuple(inputs), config, logs.present()),
            )
        else:
            self._pictures = find_pictures(inputs, config.max_pixels)

    def of_step(self, rule: LearnedRule, step: int) -> list[Lesson | str]:
        """The lessons of a step, in order."""
        numbers = range(self._config.roll_outs)
        if self._pool is None:
            return [lesson(self._pictures, rule, self._config, step, number) for number in numbers]
        return list(self._pool.map(_lesson_in_worker, numbers, [step] * len(numbers), [rule] * len(numbers)))

    def close(self) -> None:
        """Ends the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class _Worker(NamedTuple):
    pictures: list[Picture]
    config: RuleConfig


_workers: list[_Worker] = []  # this process's own, if it is a worker


def _begin_worker(inputs: Sequence[str], config: RuleConfig, settings: logs.LogSettings) -> None:
    logs.configure(settings)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C at a terminal reaches all processes; the first one decides
    warm_up("fit")
    _workers.append(_Worker(find_pictures(inputs, config.max_pixels), config))


def _lesson_in_worker(number: int, step: int, rule: LearnedRule) -> Lesson | str:
    (worker,) = _workers
    return lesson(worker.pictures, rule, worker.config, step, number)
