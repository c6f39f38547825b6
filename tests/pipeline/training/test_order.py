"""The global order of samples: what a number of workers, a stop or a resumption must never change."""

from pathlib import Path

import numpy as np
import pytest

from jobs.distill import distill
from jobs.shard import shard
from pipeline.bulk.distill import DistillConfig
from pipeline.bulk.shard import ShardConfig
from pipeline.config import RunnerConfig
from pipeline.errors import Rejected, TrainingError
from pipeline.inputs.blocks import BlockReader, find_blocks
from pipeline.storage.open import open_storage
from pipeline.training.augment import AugmentConfig, crop_side, make_crop
from pipeline.training.batches import Prefetcher
from pipeline.training.order import FeedConfig, GlobalOrder, rank_slice

COUNTS = (5, 1, 7, 4, 6, 3)
INLINE = RunnerConfig.model_validate({"executor": "inline"})


def stream(order: GlobalOrder, steps: int) -> list[tuple[int, int, int]]:
    return [tuple(place) for step in range(steps) for place in order.batch(step)]


@pytest.mark.parametrize("window", [1, 2, 4, 100])
def test_every_epoch_is_a_permutation_of_all_samples(window: int) -> None:
    order = GlobalOrder(COUNTS, FeedConfig(seed=3, batch=4, window=window))
    everything = {(block, row) for block, count in enumerate(COUNTS) for row in range(count)}
    places = stream(order, 3 * 13)  # 156 samples: six epochs of 26
    for epoch in range(6):
        members = [(block, row) for which, block, row in places if which == epoch]
        assert len(members) == 26
        assert set(members) == everything


def test_epochs_differ_and_the_seed_decides() -> None:
    one, same, other = (stream(GlobalOrder(COUNTS, FeedConfig(seed=seed, batch=13, window=3)), 4) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert [place[1:] for place in one[:26]] != [place[1:] for place in one[26:52]]


def test_a_window_bounds_how_many_blocks_are_needed_at_a_time() -> None:
    order = GlobalOrder([10] * 12, FeedConfig(batch=10, window=3))
    for step in range(0, 12, 3):
        assert len({order.place(index).block for index in range(10 * step, 10 * step + 30)}) == 3


@pytest.mark.parametrize("batch", [1, 5, 16])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_slices_of_the_ranks_make_up_the_batch_evenly(batch: int, size: int) -> None:
    samples = list(range(batch))
    slices = [samples[rank_slice(batch, rank, size)] for rank in range(size)]
    assert [sample for part in slices for sample in part] == samples
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


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
        reader = BlockReader(source, blocks, window=1, cache_bytes=10**6)
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


def test_a_crop_depends_on_its_seed_alone() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    config = AugmentConfig.model_validate(
        {"patch_size": 6, "colour_jitter": 1, "noise": 1, "jpeg": 1, "blur": 1, "min_zoom": 0.5}
    )
    first, again, other = (make_crop(rgb, 36, config, seed) for seed in (7, 7, 8))
    assert first.shape == (36, 36, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_without_augmentation_a_crop_is_a_part_of_the_image() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    plain = {"flip": 0, "colour_jitter": 0, "noise": 0, "jpeg": 0, "blur": 0, "min_zoom": 1, "patch_size": 5}
    crop = make_crop(rgb, 20, AugmentConfig.model_validate(plain), seed=1)
    parts = [rgb[top : top + 20, left : left + 20] for top in range(21) for left in range(31)]
    assert any(np.array_equal(crop, part) for part in parts)


def test_small_images_give_smaller_crops_in_whole_patches_or_are_refused() -> None:
    config = AugmentConfig.model_validate({"patch_size": 7})
    rgb = np.zeros((31, 200, 3), np.uint8)
    assert make_crop(rgb, 168, config, seed=1).shape == (28, 168, 3)
    with pytest.raises(Rejected, match="too_small"):
        make_crop(rgb[:6], 168, config, seed=1)


def test_the_side_of_a_batch_is_whole_patches_within_bounds() -> None:
    config = AugmentConfig.model_validate({"patch_size": 7, "min_crop": 60, "max_crop": 100})
    sides = {crop_side(config, 5, step) for step in range(200)}
    assert sides == {56, 63, 70, 77, 84, 91, 98}


def test_batches_are_made_ahead_in_order_and_errors_arrive() -> None:
    def make(step: int) -> int:
        if step == 6:
            raise TrainingError("no step 6")
        return step

    batches = Prefetcher(make, 3, ahead=2)
    assert [batches.take() for _ in range(3)] == [3, 4, 5]
    with pytest.raises(TrainingError, match="no step 6"):
        batches.take()
    batches.close()
