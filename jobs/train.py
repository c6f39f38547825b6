"""Trains a predictor network, on one worker or many, and keeps the network with the best validation.

INPUT is the output of `air shard` (images) or of `air distill` (targets), or several of them. OUT gets best.safetensors
and last.safetensors with their cards, metrics.jsonl, TensorBoard events and checkpoints. After a stop, the same command
goes on from the last checkpoint.

  air train shards/ run/ --steps 20000 --valid validation-pictures/

With --phase rule it learns an update rule of the optimiser; `air train --phase rule --help` has the options of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.command import configure, make_parser, option_value
from pipeline.errors import ConfigError
from pipeline.training.config import TrainConfig, TrainerConfig
from pipeline.training.plan import plan_training

if TYPE_CHECKING:
    import torch

POD_NOTICE = (
    "train: in every measurement so far, --phase finetune reached a better network than pod in the same time "
    "(docs/training.md)"
)
"""What the command says where pod is asked for."""


def train(
    inputs: str | Sequence[str], output_uri: str, config: TrainConfig, trainer: TrainerConfig, valid: str | None = None
) -> dict[str, float]:
    """Plans and trains; returns the last figures.

    Args:
        inputs: Output of `air shard` or `air distill`, or several of them.
        output_uri: The run's folder.
        config: What to train.
        trainer: Where and how it runs.
        valid: Images or shards to validate on; packaged photographs if not given.

    Raises:
        AirError: What `plan_training`, `pipeline.training.loop.train` and `train_on_ray` raise.
    """
    from jobs.train_display import show_training

    job = plan_training(inputs, output_uri, config, trainer, valid)
    with show_training(config.steps, config.max_seconds) as report:
        if trainer.executor == "inline":
            from pipeline.training.group import Group
            from pipeline.training.loop import train as train_here

            return train_here(job, Group(device=_device(trainer)), report)
        from pipeline.training.ray import train_on_ray

        return train_on_ray(job, report)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    if option_value(arguments, "--phase") == "rule":
        if option_value(arguments, "--rounds") is None:
            from jobs.train_rule import main as train_rule
        else:
            from jobs.train_rounds import main as train_rule

        return train_rule(arguments)
    parser = make_parser("train", __doc__, TrainConfig, TrainerConfig)
    parser.add_argument("input", nargs="+", metavar="INPUT", help="output of `air shard` or of `air distill`")
    parser.add_argument("out", metavar="OUT", help="folder for the run; a local path or a URI")
    parser.add_argument(
        "--valid", metavar="IMAGES", help="images or shards to validate on; default: photographs that packages ship"
    )
    given = parser.parse_args(arguments)
    config, trainer = configure(given, train=TrainConfig, trainer=TrainerConfig)
    if config.phase == "pod":
        print(POD_NOTICE, flush=True)
    figures = train(given.input, given.out, config, trainer, given.valid)
    print(describe(figures, given.out))
    return 0


def describe(figures: dict[str, float], output: str) -> str:
    """One sentence about a finished run: steps, samples, time, the best validation, and where the network is."""
    folder = output.rstrip("/")
    done = f"{int(figures['step'])} steps, {int(figures['samples'])} samples in {figures['seconds']:.0f} s; "
    if math.isinf(figures["best_psnr"]):
        return f"{done}the network with the best validation is lost. Last: {folder}/last.safetensors"
    return f"{done}best validation {figures['best_psnr']:.2f} dB. Best: {folder}/best.safetensors"


def _device(trainer: TrainerConfig) -> torch.device:
    import torch

    if not trainer.num_gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("num_gpus asks for a GPU, but torch finds none here; set it to 0")
    return torch.device("cuda")
