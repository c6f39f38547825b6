"""Shards as inputs: tars that no job of this project wrote are listed, told apart, read, and refused if damaged."""

import hashlib
import os
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, DamagedDataError, JobFailedError, Rejected
from pipeline.inputs.shards import list_shards, read_samples
from pipeline.storage.open import open_storage
from tests.support.tar_files import write_tar
from tests.support.toys import encode_picture


def test_a_folder_without_shards_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=f"{tmp_path / 'nowhere'} does not exist, or is empty"):
        list_shards(open_storage(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("no shard")
    with pytest.raises(JobFailedError, match=r"holds no shards: no file ends in \.tar"):
        list_shards(open_storage(tmp_path))


def test_tars_of_others_are_taken(tmp_path: Path):
    members = [
        ("./a.png", encode_picture(0)),
        ("./a.cls", b"3"),
        ("b/c.JPG", encode_picture(1, kind="JPEG")),
        ("b/c.json", b"not json"),
        ("d.json", b'{"source": "elsewhere/d.gif"}'),
        ("d.gif", encode_picture(2, kind="GIF")),
        ("noending", b""),
        ("__meta__/info.json", b"{}"),
        ("text.txt", b"no image"),
    ]
    write_tar(tmp_path / "x.tar", members)
    write_tar(tmp_path / "below" / "y.tar", {"e.webp": encode_picture(3, kind="WEBP")})
    storage = open_storage(tmp_path)
    y, x = list_shards(storage)
    assert (x.name, x.samples, y.samples) == ("x", 4, 1)
    samples = {sample.key: sample for sample in read_samples(storage, x)}
    assert list(samples) == ["./a", "b/c", "d", "text"]
    assert samples["./a"].read() == encode_picture(0)
    assert samples["b/c"].source == "x/b/c"
    assert samples["d"].source == "elsewhere/d.gif"
    with pytest.raises(Rejected) as caught:
        samples["text"].read()
    assert caught.value.reason == "no_image"
    assert caught.value.message == "the sample has no image member (its members end in .txt)"
    assert [sample.read() for sample in read_samples(storage, y)] == [encode_picture(3, kind="WEBP")]


def test_tars_of_others_in_several_folders_are_kept_apart(tmp_path: Path):
    for number, name in enumerate(["a/b.tar", "a_b.tar", "a-b.tar", "a b.tar", "ä.tar", "ö.tar"]):
        write_tar(tmp_path / name, {"x.png": encode_picture(number)})
    storage = open_storage(tmp_path)
    units = list_shards(storage)
    assert len({unit.name for unit in units}) == 6
    assert {unit.name for unit in units} >= {"a_b", "a-b"}
    assert len({sample.read() for unit in units for sample in read_samples(storage, unit)}) == 6


def test_keys_of_others_that_are_no_unicode_can_be_written(tmp_path: Path):
    write_tar(tmp_path / "x.tar", {os.fsdecode(b"caf\xe9.png"): encode_picture(0)})
    storage = open_storage(tmp_path)
    (sample,) = read_samples(storage, list_shards(storage)[0])
    assert sample.key == "caf\\udce9"
    assert sample.read() == encode_picture(0)


def test_a_tar_of_others_that_ends_early_is_damaged(tmp_path: Path):
    file = write_tar(tmp_path / "x.tar", {"a.png": bytes(5000), "b.png": bytes(5000)})
    storage = open_storage(tmp_path)
    (unit,) = list_shards(storage)
    os.truncate(file, 8000)
    with pytest.raises(DamagedDataError, match=r"x\.tar is not a whole tar"):
        list_shards(storage)
    cut = unit.model_copy(update={"sha256": hashlib.sha256(file.read_bytes()).hexdigest()})
    with pytest.raises(DamagedDataError, match=r"x\.tar is not a whole tar"):
        list(read_samples(storage, cut))


def test_a_sample_with_two_members_of_one_ending_is_damaged(tmp_path: Path):
    write_tar(tmp_path / "x.tar", [("a.png", encode_picture(0)), ("a.png", encode_picture(1))])
    storage = open_storage(tmp_path)
    (unit,) = list_shards(storage)
    with pytest.raises(DamagedDataError, match=r"x\.tar is not a WebDataset shard: a\.png"):
        list(read_samples(storage, unit))
