"""Trains a predictor on a folder of pictures and encodes one of them with it: `air shard`, `air train`, `air encode`.

python examples/train_on_a_folder.py                          a short training on packaged photographs
python examples/train_on_a_folder.py photos/ --steps 20000    longer is better; the second run goes on
"""

import argparse
import tempfile
from pathlib import Path

import air
from air.codec.file import read_info
from jobs.shard import shard
from jobs.train import train
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.formats.images import IMAGE_EXTENSIONS, decode
from pipeline.inputs.packaged import collect_pictures
from pipeline.training.config import TrainConfig, TrainerConfig


def train_on(pictures: Path, out: Path, config: TrainConfig) -> Path:
    """Packs the pictures into shards, trains a network on crops of them, and returns the best checkpoint.

    Both jobs go on where a stop left them when they are run again with the same arguments.
    """
    shard([str(pictures)], str(out / "shards"), ShardConfig(), RunnerConfig(executor="inline"))
    trainer = TrainerConfig(executor="inline", log_every=5, validate_every=1000)
    # The quality is judged on the same pictures here; a real training validates on others.
    figures = train(str(out / "shards"), str(out / "run"), config, trainer, valid=str(pictures))
    print(f"{figures['step']:.0f} steps in {figures['seconds']:.1f} s, best validation {figures['best_psnr']:.2f} dB")
    return out / "run" / "best.safetensors"


def main() -> None:
    """Trains, then encodes the first picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="?", type=Path, help="folder; default: packaged photographs")
    parser.add_argument("--steps", type=int, default=40, help="training steps (default: 40)")
    parser.add_argument("--out", type=Path, help="folder for shards and run; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = given.out or Path(scratch)
        pictures = given.pictures or Path(scratch) / "pictures"
        if not given.pictures:
            collect_pictures(pictures, 4)
        config = TrainConfig(steps=given.steps, warmup_steps=5, batch=4, stages=2, valid_images=4, valid_side=256)
        checkpoint = train_on(pictures, out, config)

        first = min(path for path in pictures.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS)
        blob = air.encode(decode(first.read_bytes()), predictor=checkpoint)
        print(f"{first.name}: {len(blob)} bytes, Gaussians by stage {list(read_info(blob).num_gaussians)}")


if __name__ == "__main__":
    main()
