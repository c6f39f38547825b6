"""Blocks: samples of shards and targets in any order, from local and remote storages, with few files open."""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.errors import DamagedDataError, Reason, Rejected, TrainingError
from pipeline.formats.images import decode
from pipeline.inputs.blocks import Block, BlockReader, find_blocks
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from tests.support.tar_files import write_tar
from tests.support.toys import encode_picture


def name_of(shard: int, row: int) -> str:
    return f"{shard}-{row}"


@pytest.fixture(params=["local", "memory"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Four tars of two pictures each."""
    place = tmp_path / "shards" if request.param == "local" else f"memory://bucket/{uuid.uuid4().hex}"
    storage = open_storage(place)
    for shard in range(4):
        members = {f"{name_of(shard, row)}.png": encode_picture(2 * shard + row) for row in range(2)}
        storage.upload(write_tar(tmp_path / "made.tar", members), f"{shard}.tar")
    return storage


def read_all(reader: BlockReader, blocks: Sequence[Block]) -> None:
    for row in range(2):
        for number in range(len(blocks)):
            sample = reader.read(number, row)
            assert (sample.key, sample.view, sample.row) == (name_of(number, row), 0, None)
            assert np.array_equal(sample.rgb, decode(encode_picture(2 * number + row)))


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
def test_samples_are_read_in_any_order(source: Storage, cache_bytes: int):
    """Each block is opened, given up and opened again."""
    kind, units, blocks = find_blocks(source)
    assert (kind, len(units), [block.count for block in blocks]) == ("images", 4, [2, 2, 2, 2])
    reader = BlockReader(blocks, window=1, cache_bytes=cache_bytes)
    read_all(reader, blocks)
    read_all(reader, blocks)


def test_no_more_files_are_open_than_a_window_needs_and_none_after_close(source: Storage):
    _, _, blocks = find_blocks(source)
    before = psutil.Process().num_fds()
    reader = BlockReader(blocks, window=1, cache_bytes=0)
    read_all(reader, blocks)
    assert psutil.Process().num_fds() == before + 2
    reader.close()
    assert psutil.Process().num_fds() == before
    assert reader.read(3, 1).key == name_of(3, 1)
    reader.close()


def test_a_sample_without_an_image_is_rejected_and_named(tmp_path: Path):
    write_tar(tmp_path / "x.tar", {"a.png": encode_picture(0), "b.txt": b"no image"})
    source = open_storage(tmp_path)
    _, _, blocks = find_blocks(source)
    reader = BlockReader(blocks, window=1, cache_bytes=0)
    with pytest.raises(Rejected) as caught:
        reader.read(0, 1)
    assert caught.value.reason == Reason.NO_IMAGE
    assert reader.name(0, 1) == f"b in {tmp_path / 'x.tar'}"
    reader.close()


def test_a_shard_that_changed_is_damaged(tmp_path: Path):
    file = write_tar(tmp_path / "x.tar", {"a.png": encode_picture(0)})
    source = open_storage(tmp_path)
    _, _, blocks = find_blocks(source)
    write_tar(file, {"a.png": encode_picture(0), "b.png": encode_picture(1)})
    with pytest.raises(DamagedDataError, match=r"x\.tar has 2 samples, expected 1; run `air verify`"):
        BlockReader(blocks, window=1, cache_bytes=0).read(0, 0)
    os.truncate(file, 700)
    with pytest.raises(DamagedDataError, match=r"x\.tar is not a whole tar"):
        BlockReader(blocks, window=1, cache_bytes=0).read(0, 0)


def test_a_folder_of_empty_shards_has_no_samples(tmp_path: Path):
    write_tar(tmp_path / "x.tar", {})
    with pytest.raises(TrainingError, match="has no samples"):
        find_blocks(open_storage(tmp_path))
