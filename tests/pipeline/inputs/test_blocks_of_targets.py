"""Shards and targets are found and read alike, and other folders are refused."""

from pathlib import Path

import pytest

from jobs.distill import distill
from jobs.shard import shard
from pipeline.bulk.distill import DistillConfig
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.errors import TrainingError
from pipeline.inputs.blocks import BlockReader, find_blocks
from pipeline.storage.open import open_storage

INLINE = RunnerConfig.model_validate({"executor": "inline"})


@pytest.fixture(scope="module")
def shards(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("feed") / "shards"
    shard([str(photographs)], str(folder), ShardConfig.model_validate({"max_count": 3}), INLINE)
    return folder


def test_shards_and_targets_give_the_same_images(shards: Path) -> None:
    targets = shards.parent / "targets"
    settings = {"patch_size": 8, "stages": 1, "steps": 0, "min_view_pixels": 10**6, "max_view_pixels": 10**6}
    distill(str(shards), str(targets), DistillConfig.model_validate(settings), INLINE)
    found = []
    for folder in (shards, targets):
        source = open_storage(folder)
        kind, units, blocks = find_blocks(source)
        assert sum(block.count for block in blocks) == sum(unit.samples or 0 for unit in units) == 4
        reader = BlockReader(blocks, window=1, cache_bytes=10**6)
        samples = [reader.read(number, row) for number, block in enumerate(blocks) for row in range(block.count)]
        found.append((kind, {sample.key: sample.rgb.shape for sample in samples}))
    assert [kind for kind, _ in found] == ["images", "targets"]
    images, views = (shapes for _, shapes in found)
    assert images.keys() == views.keys()
    # Views are sized in whole patches, of the image's size but for that.
    assert all(abs(images[key][side] - views[key][side]) < 8 for key in images for side in (0, 1))


def test_a_folder_of_something_else_is_refused(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes((shards / "plan.json").read_bytes().replace(b'"shard"', b'"encode"', 1))
    with pytest.raises(TrainingError, match="output of `air encode`"):
        find_blocks(open_storage(tmp_path))
