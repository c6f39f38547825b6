"""The steps that `step.py` compares, each divided into the same parts."""

from __future__ import annotations

import importlib
import math
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numba
import numpy as np
import torch
from torch import Tensor
from workload import PATCH_SIZE, Size, workload

from air.compute.threads import Workers
from air.gaussians import SUPPORT_CUTOFF, Gaussians, activate
from air.loss.reference import loss as torch_loss
from air.optimization import cpu
from air.optimization.config import OptimizeConfig
from air.optimization.rule import LearnedRule
from air.rendering import raw_cpu

PARTS = ("activate", "draw", "loss", "gather", "update")


class Clock:
    """Adds up the seconds that the thread which made it spends in each part of a step.

    Args:
        timer: Tells the time in seconds.
    """

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._timer = timer
        self._thread = threading.get_ident()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self._timer()
        yield
        self.seconds[name] += self._timer() - start

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, timed as a part."""

        def timed(*arguments: Any) -> Any:
            if threading.get_ident() != self._thread:
                return function(*arguments)
            start = self._timer()
            result = function(*arguments)
            self.seconds[name] += self._timer() - start
            return result

        return timed


class Backend(Protocol):
    """Something that does steps, each with the same work: nothing learns."""

    def step(self, clock: Clock | None) -> None:
        """One step; with a clock, its parts are timed."""


class FusedStep:
    """The compiled step of `air.optimization.optimize`."""

    def __init__(self, size: Size, workers: Workers) -> None:
        raw, anchor, target = (tensor.numpy() for tensor in workload(size))
        # Rates this small move no number: every step has the same work.
        config = replace(OptimizeConfig(steps=1).scaled(1e-15), **self._rule())
        self.state = cpu.FusedOptimizer(raw, anchor, target, PATCH_SIZE, np.zeros_like(target), workers, config)

    def _rule(self) -> dict[str, Any]:
        return {}

    def step(self, clock: Clock | None) -> None:
        state = self.state
        with ExitStack() as stack:
            if clock is not None:
                for owner, name, part in (
                    (raw_cpu, "activate_raw", "activate"),
                    (state.drawing.raster, "draw", "draw"),
                    (state.loss, "evaluate", "loss"),
                    (state.drawing.raster, "gather_range", "gather"),
                    (cpu, "adam_step", "update"),
                    (cpu, "learned_step", "update"),
                ):
                    timed = clock.wrap(getattr(owner, name), part)
                    stack.enter_context(mock.patch.object(owner, name, timed))
            state.evaluate()
            state.update(0)


class LearnedStep(FusedStep):
    """The same with a learned rule in place of Adam, and the squared error in place of L1's gradient."""

    def _rule(self) -> dict[str, Any]:
        rule = LearnedRule()
        return {"learned": rule, "beta1": rule.beta1, "beta2": rule.beta2, "squared_fraction": 1.0}


class TorchStep:
    """The step in plain torch. Its parts are not told apart, since one backward pass does several."""

    def __init__(self, size: Size) -> None:
        self._size = size
        self._raw, self._anchor, self._target = workload(size)
        self._raw.requires_grad_()
        self._adam = torch.optim.Adam([self._raw], lr=0.0, fused=True)

    def step(self, clock: Clock | None) -> None:
        self._adam.zero_grad()
        image = torch_render(activate(self._raw, self._anchor, PATCH_SIZE), self._size.height, self._size.width)
        torch_loss(image, self._target).backward()
        self._adam.step()


def torch_render(gaussians: Gaussians, height: int, width: int) -> Tensor:
    """The image in plain torch: square patches of pixels, Gaussians of like size together, summed by index_add."""
    radius = (gaussians.scale.detach().amax(dim=1) * 3.33).ceil().long()
    image = torch.zeros(3, height * width)
    for reach in radius.unique().tolist():
        chosen = (radius == reach).nonzero()[:, 0]
        part = gaussians[chosen]
        steps = torch.arange(-reach, reach + 1)
        columns = part.xy[:, 0].detach().round().long()[:, None, None] + steps[None, None, :]
        rows = part.xy[:, 1].detach().round().long()[:, None, None] + steps[None, :, None]
        dx, dy = columns - part.xy[:, 0, None, None], rows - part.xy[:, 1, None, None]
        a, b, c = (value[:, None, None] for value in part.conic().unbind(dim=1))
        weight = torch.exp(-0.5 * (a * dx * dx + 2 * b * dx * dy + c * dy * dy))
        inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        weight = torch.where((weight >= SUPPORT_CUTOFF) & inside, weight, 0)
        index = (rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)).reshape(-1)
        values = part.colour.T[:, :, None, None] * weight
        image = image.index_add(1, index, values.reshape(3, -1))
    return image.reshape(3, height, width)


class PrototypeStep:
    """The step of an earlier prototype: kernels for drawing, gathering and the loss, torch for the rest.

    Args:
        folder: Where its modules are.
        size: The workload.
        threads: For its kernels. torch's are set elsewhere.

    Raises:
        ModuleNotFoundError: They are not there.
    """

    def __init__(self, folder: Path, size: Size, threads: int) -> None:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        self._conic_from = importlib.import_module("common").conic_from
        self._raster = importlib.import_module("raster_numba")
        self._loss = importlib.import_module("ssim_l1_numba")
        numba.set_num_threads(threads)
        self._threads, self._size = threads, size
        raw, self._anchor, target = workload(size)
        self._raw = [part.clone().requires_grad_() for part in raw.split([2, 2, 1, 3], dim=1)]
        groups: list[dict[str, Any]] = [{"params": [part], "lr": 0.0} for part in self._raw]
        self._adam = torch.optim.Adam(groups, fused=True)
        height, width = size.height, size.width
        self._image, self._target, self._gradient = (self._loss.alloc(height, width) for _ in range(3))
        self._loss.view(self._target, height, width)[:] = target.numpy()
        self._moments = self._loss.target_terms(self._target, height, width)
        self._gradients = [torch.empty(size.gaussians, fields) for fields in (2, 3, 3)]

    def step(self, clock: Clock | None) -> None:
        clock = clock or Clock()
        height, width = self._size.height, self._size.width
        with clock.part("activate"):
            offset, scale, angle, colour = self._raw
            outputs = (
                self._anchor + PATCH_SIZE * torch.tanh(offset),
                self._conic_from(0.5 + PATCH_SIZE * torch.sigmoid(scale), 2 * math.pi * torch.sigmoid(angle[:, 0])),
                torch.tanh(colour),
            )
            arrays = [output.detach().numpy() for output in outputs]
        with clock.part("draw"):
            self._raster.fwd(*arrays, self._loss.view(self._image, height, width), self._threads)
        with clock.part("loss"):
            self._loss.loss_grad(
                self._image, self._target, *self._moments, self._gradient, height, width, self._threads
            )
        with clock.part("gather"):
            gradients = [gradient.numpy() for gradient in self._gradients]
            self._raster.bwd(*arrays, self._loss.view(self._gradient, height, width), *gradients, self._threads)
        with clock.part("update"):
            self._adam.zero_grad()
            torch.autograd.backward(outputs, self._gradients)
            self._adam.step()
