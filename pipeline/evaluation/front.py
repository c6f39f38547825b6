"""The front: which quality each way to Gaussians reaches in which time, with equally many Gaussians.

The ways, called methods, are a predictor with a number of refinement steps, fits that grow within a budget with an
update rule (`air.fit(num_gaussians=...)`), and fits of a plain grid (`air.fit(patch_size=...)`). Every number of steps
is a computation of its own, from pixels, since learning rates fall towards its end. On an image all methods take turns,
so that other work on the machine meets all alike. This module must not know files or commands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from air.arguments import image_tensor
from air.compute.threads import limit_torch
from air.defaults import ADAM, AUTO, PIXELS_PER_GAUSSIAN, SHIPPED
from air.fitting.fit import fit
from air.gaussians import Gaussians, activate
from air.loss.reference import loss
from air.metrics import ms_ssim, psnr
from air.optimization.rule import LearnedRule
from air.rendering.render import render
from air.stages.control import StageControl
from air.stages.loop import all_predicted
from air.warmup import warm_up
from pipeline.errors import ConfigError
from pipeline.evaluation.config import FrontConfig
from pipeline.evaluation.predictor import (
    PLAIN_GRID,
    WARM_UP_SIDE,
    Contestant,
    Evaluation,
    Rows,
    measure_pictures,
    nearest_patch_size,
)
from pipeline.inputs.pictures import Picture
from pipeline.predictors import PredictorReference
from pipeline.rules.reference import find_rule, load_rule

_WARM_UP_STEPS = 2


class Method(NamedTuple):
    """A way to Gaussians.

    Attributes:
        name: Its name in tables.
        fit: Takes an image of shape (3, H, W) and a number of steps. All that it does is timed.
    """

    name: str
    fit: Callable[[Tensor, int], Gaussians]


class GrowingRule(NamedTuple):
    """An update rule of growing fits.

    Attributes:
        name: "adam", "shipped", "auto", or "rule:" and the first 12 digits of the checksum of a file's weights.
        model: "adam" or "rule:checksum", also of the shipped rule; "auto" for both.
        rule: As `air.fit` takes it.
    """

    name: str
    model: str
    rule: str | LearnedRule

    @staticmethod
    def find(name: str) -> GrowingRule:
        """Finds and loads a rule.

        Args:
            name: "adam", "shipped", "auto", or a path or URI of NAME.safetensors.

        Raises:
            CheckpointError: There is no such rule, or it cannot be loaded.
        """
        if name == AUTO:
            return GrowingRule(AUTO, AUTO, AUTO)
        reference = find_rule(name)
        if name == ADAM:
            return GrowingRule(ADAM, ADAM, ADAM)
        return GrowingRule(name if name == SHIPPED else reference.model, reference.model, load_rule(reference))


def growing(name: str, rule: str | LearnedRule, num_gaussians: int, threads: int) -> Method:
    """Fits that grow within a budget.

    Args:
        name: Its name in tables.
        rule: The update rule, as `air.fit` takes it.
        num_gaussians: The budget, at least 1.
        threads: CPU threads.
    """

    def grow(image: Tensor, steps: int) -> Gaussians:
        result = fit(image, steps, num_gaussians=num_gaussians, rule=rule, device="cpu", threads=threads)
        return result.gaussians

    return Method(name, grow)


def plain_grid(name: str, patch_size: int, threads: int) -> Method:
    """Fits of a grid to which nothing is added, with a Gaussian for every `patch_size` x `patch_size` pixels."""
    return Method(
        name,
        lambda image, steps: fit(image, steps, patch_size=patch_size, device="cpu", threads=threads).gaussians,
    )


def _predict_and_refine(contestant: Contestant, threads: int, image: Tensor, steps: int) -> Gaussians:
    raw, anchor = all_predicted(contestant.predict(image, threads))
    raw = contestant.refine(raw, anchor, image, steps, 1.0, threads)
    return activate(raw, anchor, contestant.predictor.patch_size)


def measure_methods(key: str, image: Tensor, methods: Sequence[Method], steps: Sequence[int], threads: int) -> Rows:
    """Rows of `pipeline.formats.tables.FRONT`: all methods with the first number of steps, then with the next.

    Args:
        key: Identifies the image.
        image: Shape (3, H, W), float32 in [0, 1].
        methods: What takes turns.
        steps: Numbers of steps.
        threads: CPU threads of drawing what is judged.

    Raises:
        InvalidGaussiansError: A method gave numbers that are not finite.
        NonFiniteLossError: A loss became NaN or infinite.
    """
    return [_measure(key, image, method, count, threads) for count in steps for method in methods]


def _measure(key: str, image: Tensor, method: Method, steps: int, threads: int) -> dict[str, Any]:
    _, height, width = image.shape
    begin, cpu_begin = time.perf_counter(), time.process_time()
    gaussians = method.fit(image, steps)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    drawn = render(gaussians, height, width, threads=threads)
    return {
        "key": key,
        "method": method.name,
        "steps": steps,
        "height": height,
        "width": width,
        "num_gaussians": len(gaussians),
        "psnr": psnr(drawn, image),
        "ms_ssim": ms_ssim(drawn, image),
        "loss": float(loss(drawn, image)),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


@dataclass(frozen=True)
class Front:
    """The methods that are compared.

    Attributes:
        contestant: The predictor; None if none takes part.
        rules: The rules of growing fits.
        config: What is measured.
    """

    contestant: Contestant | None
    rules: Sequence[GrowingRule]
    config: FrontConfig

    @staticmethod
    def find(reference: PredictorReference | None, config: FrontConfig) -> Front:
        """Loads the predictor and the rules.

        Args:
            reference: The predictor; None if none takes part.
            config: What is measured.

        Raises:
            CheckpointError: A predictor or rule is missing or cannot be loaded.
            ConfigError: Two rules are the same weights.
        """
        rules = [GrowingRule.find(name) for name in config.rules]
        models = [rule.name for rule in rules]
        for name, model in zip(config.rules, models, strict=True):
            if models.count(model) > 1:
                raise ConfigError(f"rules: {name} is {model}, and so is another one; name each rule once")
        if reference is None:
            return Front(None, rules, config)
        return Front(Contestant.find(reference, None, config.gaussians, StageControl()), rules, config)

    def models(self) -> dict[str, str]:
        """What makes each method: architecture:checksum, rule:checksum, "adam", "auto" or "grid", by name in tables."""
        predictor = {} if self.contestant is None else {self.contestant.name: self.contestant.name}
        rules = {_growing_name(rule): rule.model for rule in self.rules}
        return {**predictor, **rules, **({PLAIN_GRID: "grid"} if self.config.baseline else {})}

    def methods(self, image: Tensor) -> list[Method]:
        """The methods for an image of shape (3, H, W), with about as many Gaussians each.

        A predictor uses as many Gaussians as it finds bad patches, within the budget, and the others follow it.
        """
        _, height, width = image.shape
        threads = self.config.threads
        methods = []
        if self.contestant is None:
            count = self.config.gaussians or height * width // PIXELS_PER_GAUSSIAN
        else:
            count = sum(map(len, self.contestant.predict(image, threads)))
            methods.append(Method(self.contestant.name, partial(_predict_and_refine, self.contestant, threads)))
        count = max(1, count)
        methods += [growing(_growing_name(rule), rule.rule, count, threads) for rule in self.rules]
        if self.config.baseline:
            methods.append(plain_grid(PLAIN_GRID, nearest_patch_size(height, width, count), threads))
        return methods


def _growing_name(rule: GrowingRule) -> str:
    return f"growing, {rule.name}"


def evaluate_front(
    pictures: Sequence[Picture], front: Front, report: Callable[[int, Rows], None] = lambda number, rows: None
) -> Evaluation:
    """Measures all methods on pictures.

    Args:
        pictures: The pictures. One that cannot be used is logged with the reason and counted.
        front: The methods, and what is measured.
        report: Called after every picture with the number of pictures done and the picture's rows.

    Returns:
        The rows of `pipeline.formats.tables.FRONT`, and the number of rejected pictures by reason.
    """
    warm_up("predict")
    config = front.config
    warm = False

    def measure(key: str, rgb: np.ndarray) -> Rows:
        nonlocal warm
        image = image_tensor(rgb)
        if not warm:
            crop = image[:, :WARM_UP_SIDE, :WARM_UP_SIDE].contiguous()
            measure_methods("", crop, front.methods(crop), [_WARM_UP_STEPS], config.threads)
            warm = True
        return measure_methods(key, image, front.methods(image), config.steps, config.threads)

    with limit_torch(config.threads):
        return measure_pictures(pictures[: config.limit], measure, report)


QUANTITIES = ("num_gaussians", "psnr", "ms_ssim", "loss", "seconds", "cpu_seconds")
"""The columns of `FRONT` that have means."""


def means(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], dict[str, float]]:
    """Means over images of `QUANTITIES`, by method and steps; methods keep the order of the rows, steps rise."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["steps"]), []).append(row)
    order = list(dict.fromkeys(row["method"] for row in rows))
    return {
        group: {name: sum(row[name] for row in groups[group]) / len(groups[group]) for name in QUANTITIES}
        for group in sorted(groups, key=lambda group: (order.index(group[0]), group[1]))
    }


def on_front(mean: Mapping[tuple[str, int], Mapping[str, float]], clock: str) -> set[tuple[str, int]]:
    """The methods and steps that no other one beats: none has as many decibels in less time, or more in as much.

    Args:
        mean: As `means` gives it.
        clock: "seconds" or "cpu_seconds".
    """
    best = set()
    highest = -float("inf")
    for group in sorted(mean, key=lambda group: (mean[group][clock], -mean[group]["psnr"])):
        if mean[group]["psnr"] > highest:
            highest = mean[group]["psnr"]
            best.add(group)
    return best


def clock_of(threads: int) -> str:
    """The column of seconds to compare by: CPU time with one thread, which does not count waiting for a core."""
    return "cpu_seconds" if threads == 1 else "seconds"
