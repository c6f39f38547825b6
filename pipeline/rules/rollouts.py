"""Distillation of an update rule: for every fit of a crop of an image, roll the rule out, and store what it taught.

`process` is pure: its result depends on the image's bytes and key and on the configuration alone. This module knows
nothing of Ray. Torch and the kernels load with the first image, so that a driver plans without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pipeline.formats import images, tables
from pipeline.identity import seed_of
from pipeline.inputs.shards import read_samples
from pipeline.rules.config import DistillRuleConfig
from pipeline.rules.draw import FitDraw, draw_fit, draw_images, draw_shards, fraction_for, run_fit
from pipeline.rules.reference import RuleReference, find_rule, load_rule
from pipeline.storage.base import Storage
from pipeline.work.plan import Plan, Unit, settle_plan
from pipeline.work.process import EncodedImage, Sample

if TYPE_CHECKING:
    from air.optimization.rule import LearnedRule

JOB = "distill --rule"
"""The name of the job in plans, in quarantine and in messages, where it follows `air`."""

_Rows = list[dict[str, Any]]


def settle_roll_outs(
    output: Storage, config: DistillRuleConfig, source: Storage, shards: Sequence[Unit], rule: RuleReference
) -> Plan:
    """Writes the plan of roll-outs into a new folder, or compares it with the folder's plan.

    Args:
        output: The folder for the roll-outs.
        config: How to roll out, and what to store.
        source: The storage that holds the shards.
        shards: All shards there; the plan has those that are drawn.
        rule: The rule that `config` names.

    Raises:
        PlanMismatchError: The folder belongs to another plan.
        StorageError: The folder has files but no plan.
    """
    plan = Plan.make(JOB, config, draw_shards(shards, config), [source.uri()])
    return settle_plan(output, plan.holding("rule", rule.model, rule.sha256))


class RollOutJob:
    """Turns shards into roll-outs.

    Args:
        config: How to roll out, and what to store.
        source: The storage that holds the shards.
        rule: From `find_rule`; looked up if not given.

    Raises:
        CheckpointError: There is no such rule.
    """

    name: ClassVar[str] = JOB

    def __init__(self, config: DistillRuleConfig, source: Storage, rule: RuleReference | None = None) -> None:
        self._config = config
        self._source = source
        self._rule = rule or find_rule(config.rule)

    def prepare(self, say: Callable[[str], None]) -> None:
        """Loads the rule, and compiles the kernels once per machine and version.

        Raises:
            CheckpointError: The rule cannot be loaded, or is not the one in the plan.
        """
        from air.warmup import warm_up

        load_rule(self._rule)
        warm_up("fit", say)

    def samples(self, unit: Unit, scratch: Path) -> Iterator[Sample]:
        """The samples that are drawn from the input shard."""
        return draw_images(read_samples(self._source, unit), self._config)

    def process(self, image: EncodedImage) -> _Rows:
        """The rows of all fits of an image."""
        config = self._config
        rgb = images.decode(image.data, background=config.background, max_pixels=config.max_pixels)
        rows = []
        for fit in range(config.fits):
            draw = draw_fit(rgb.shape[0], rgb.shape[1], config, seed_of(config.seed, image.key, fit))
            about = {"key": image.key, "fit": fit, "shard": image.unit, "rule": self._rule.model}
            rows.append({**about, **roll_out_columns(rgb, draw, load_rule(self._rule), config)})
        return rows

    def writer(self, unit: Unit, scratch: Path, metadata: Mapping[str, str]) -> RollOutWriter:
        """A writer of one Parquet file of roll-outs."""
        return RollOutWriter(scratch / f"{unit.name}.parquet", {**metadata, "air.model": self._rule.model})


def roll_out_columns(rgb: np.ndarray, draw: FitDraw, rule: LearnedRule, config: DistillRuleConfig) -> dict[str, Any]:
    """The columns of a row that depend on the image's pixels, the fit and the rule.

    Raises:
        Rejected: `non_finite`: the fit gave numbers that are not finite, or drew no sample.
    """
    from air.fitting.grow import largest_grid

    growth = config.growth()
    fraction = fraction_for(config.samples, draw, growth)
    result = run_fit(rgb, draw, rule, config, fraction)
    start = max(1, int(draw.num_gaussians * growth.start_fraction))
    size = (draw.width, draw.height) if draw.turn & 4 else (draw.height, draw.width)
    return {
        "seed": draw.seed,
        "top": draw.top,
        "left": draw.left,
        "height": draw.height,
        "width": draw.width,
        "turn": draw.turn,
        "patch_size": largest_grid(*size, start),
        "num_gaussians": draw.num_gaussians,
        "steps": draw.steps,
        "start_fraction": growth.start_fraction,
        "growths": growth.growths,
        "growth_fraction": growth.growth_fraction,
        "discount": config.discount,
        "final_weight": config.final_weight,
        "fraction": fraction,
        "samples": len(result),
        "loss": result.loss.astype(np.float32),
        "psnr": result.psnr.astype(np.float32),
        "update": result.update.numpy(),
        "features": list(result.features.numpy()),
        "move": list(result.move.numpy()),
        "credit": list(result.credit.numpy()),
        "curvature": list(result.curvature.numpy()),
    }


class RollOutWriter:
    """Writes roll-outs to one Parquet file."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._rows = tables.RowWriter(path, tables.ROLL_OUTS, metadata)

    def add(self, result: _Rows) -> Mapping[str, float]:
        """Writes the fits of one image; returns counts of fits, samples and pixels, and sums of decibels."""
        self._rows.add(result)
        return {
            "images": 1,
            "fits": len(result),
            "samples": sum(row["samples"] for row in result),
            "pixels": sum(row["height"] * row["width"] for row in result),
            "updates": sum(row["steps"] for row in result),
            "psnr_first_sum": sum(float(row["psnr"][0]) for row in result),
            "psnr_last_sum": sum(float(row["psnr"][-1]) for row in result),
        }

    def finish(self) -> list[tuple[Path, int]]:
        """Closes the file."""
        return [self._rows.finish()]
