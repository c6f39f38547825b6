"""Trains a predictor network, on one worker or many, and keeps the best by validation.

INPUT is the output of `air shard` (images) or of `air distill` (targets). OUT gets best.safetensors and
last.safetensors with their cards, metrics.jsonl, TensorBoard events and checkpoints. Run again to go on after a stop.

  air train shards/ run/ --steps 20000 --valid validation-pictures/
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from air.defaults import GRID
from jobs.command import configure, make_parser
from pipeline.errors import ConfigError
from pipeline.inputs.blocks import find_blocks
from pipeline.inputs.pictures import fingerprint
from pipeline.inputs.sources import check_outside
from pipeline.predictors import find_predictor
from pipeline.storage.open import open_storage
from pipeline.training.config import TrainConfig, TrainerConfig
from pipeline.training.plan import VALIDATION, canvas_of_targets, keep_validation, validation_sources
from pipeline.work.plan import Plan, settle_plan

if TYPE_CHECKING:
    import torch


def train(
    source_uri: str, output_uri: str, config: TrainConfig, trainer: TrainerConfig, valid: str | None = None
) -> dict[str, float]:
    """Plans and trains; returns the last figures.

    Args:
        source_uri: Output of `air shard` or `air distill`.
        output_uri: The run's folder.
        config: What to train.
        trainer: Where.
        valid: Images or shards to validate on; packaged photographs if not given.
    """
    from jobs.train_display import show_training
    from pipeline.training.group import Group
    from pipeline.training.loop import TrainJob
    from pipeline.training.loop import train as train_here
    from pipeline.training.start import check_start
    from pipeline.training.validation import check_images

    if trainer.executor == "inline" and trainer.workers > 1:
        raise ConfigError("--executor inline is one worker in this process; several need --executor ray")
    source, output = open_storage(source_uri), open_storage(output_uri)
    check_outside(output, [source.uri()])
    kind, units, blocks = find_blocks(source)
    canvas = canvas_of_targets(source, kind, config) if config.uses_targets else None
    plan = Plan.make("train", config, units, [source.uri()])
    if config.from_:
        if config.from_ == GRID:
            raise ConfigError("from = grid: the grid has no weights to begin with; leave it out for fresh ones")
        begin = find_predictor(config.from_)
        config = config.model_copy(update={"from_": begin.name})
        plan = begin.hold(plan, "from_")
    check_start(config, trainer)
    with validation_sources(output, valid) as pictures:
        check_images(pictures, config.valid_images)
        held = {VALIDATION: fingerprint(pictures)}
        plan = settle_plan(output, plan.model_copy(update={"config": {**plan.config, **held}}))
        if not valid:
            pictures = keep_validation(output, pictures)
    cores = max(1, (os.cpu_count() or 1) // trainer.workers)
    job = TrainJob(
        config=config,
        trainer=trainer,
        source=source.uri(),
        blocks=tuple(blocks),
        output=output.uri(),
        plan=plan.hash,
        valid=pictures,
        canvas=canvas,
        threads=trainer.threads or cores,
    )
    with show_training(config) as report:
        if trainer.executor == "inline":
            return train_here(job, Group(device=_device(trainer)), report)
        from pipeline.training.ray import train_on_ray

        return train_on_ray(job, report)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("train", __doc__, TrainConfig, TrainerConfig)
    parser.add_argument("input", metavar="INPUT", help="output of `air shard` or of `air distill`")
    parser.add_argument("out", metavar="OUT", help="folder for the run; a local path or a URI")
    parser.add_argument(
        "--valid", metavar="IMAGES", help="images or shards to validate on; default: photographs that packages ship"
    )
    given = parser.parse_args(arguments)
    config, trainer = configure(given, train=TrainConfig, trainer=TrainerConfig)
    figures = train(given.input, given.out, config, trainer, given.valid)
    print(describe(figures, given.out))
    return 0


def describe(figures: dict[str, float], output: str) -> str:
    """What a run made, in one sentence."""
    folder = output.rstrip("/")
    done = f"{int(figures['step'])} steps, {int(figures['samples'])} samples in {figures['seconds']:.0f} s; "
    if math.isinf(figures["best_psnr"]):
        return f"{done}the best by validation is gone. Last: {folder}/last.safetensors"
    return f"{done}best validation {figures['best_psnr']:.2f} dB. Best: {folder}/best.safetensors"


def _device(trainer: TrainerConfig) -> torch.device:
    import torch

    if not trainer.num_gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("num_gpus asks for a GPU, but torch finds none here; set it to 0")
    return torch.device("cuda")
