"""Tars: bounded to the byte, counted by the rules of webdataset, and indexed for reading one sample at a time."""

import io
import json
import os
import tarfile
import uuid
from pathlib import Path

import psutil
import pytest

from pipeline.errors import DamagedDataError, Reason, Rejected
from pipeline.formats.tars import TarIndex, TarWriter, count_samples
from pipeline.storage.open import open_storage
from tests.support.tar_files import write_tar
from tests.support.toys import encode_picture

FOREIGN = [
    ("./a.png", encode_picture(0)),
    ("./a.cls", b"3"),
    ("b/c.JPG", encode_picture(1, kind="JPEG")),
    ("b/c.png", encode_picture(2)),
    ("b/c.json", b"not json"),
    ("noending", b""),
    ("__meta__/info.json", b"{}"),
    ("__dunder.png", encode_picture(3)),
    ("text.txt", b"no image"),
]
"""Members as another program may write them: a sample is a run of members with one key."""


@pytest.mark.parametrize("max_bytes", range(tarfile.RECORDSIZE, 5 * tarfile.RECORDSIZE, 1777))
def test_no_tar_is_larger_than_the_bound_to_the_byte(tmp_path: Path, max_bytes: int):
    writer = TarWriter("unit", tmp_path, max_bytes)
    about = json.dumps({"bytes": 1, "width": 1, "height": 1}).encode()
    for number in range(60):
        writer.add({"__key__": f"{number:0{1 + 5 * number}d}", "png": bytes(100 * number), "json": about})
    files = writer.finish()
    assert sum(count for _, count in files) == 60
    assert [path.name for path, count in files if count > 1 and path.stat().st_size > max_bytes] == []
    assert [count_samples(path) for path, _ in files] == [count for _, count in files]


def test_the_index_reads_the_first_image_of_any_sample(tmp_path: Path):
    index = TarIndex(write_tar(tmp_path / "x.tar", FOREIGN), "x.tar")
    assert index.keys == ["./a", "b/c", "__dunder", "text"]
    for row, picture in ((2, FOREIGN[7]), (0, FOREIGN[0]), (1, FOREIGN[2])):
        assert index.read(row) == picture[1]
    with pytest.raises(Rejected, match="the sample has no image member") as caught:
        index.read(3)
    assert caught.value.reason == Reason.NO_IMAGE
    index.close()


def test_the_index_and_the_count_agree_on_what_a_sample_is(tmp_path: Path):
    file = write_tar(tmp_path / "x.tar", FOREIGN)
    assert count_samples(file) == len(TarIndex(file, "x.tar").keys) == 4


def test_the_index_outlives_the_local_copy_of_a_remote_tar(tmp_path: Path):
    """A remote storage deletes its copy at the end of the block."""
    storage = open_storage(f"memory://bucket/{uuid.uuid4().hex}")
    storage.upload(write_tar(tmp_path / "x.tar", FOREIGN), "x.tar")
    with storage.local_file("x.tar") as local:
        index = TarIndex(local, storage.uri("x.tar"))
    assert not local.exists()
    assert index.read(0) == FOREIGN[0][1]
    index.close()
    with pytest.raises(ValueError, match="closed file"):
        index.read(0)


def test_a_tar_that_ends_early_is_damaged(tmp_path: Path):
    file = write_tar(tmp_path / "x.tar", {"a.png": bytes(5000), "b.png": bytes(5000)})
    os.truncate(file, 8000)
    with pytest.raises(DamagedDataError, match=r"x\.tar is not a whole tar"):
        count_samples(file)
    with pytest.raises(DamagedDataError, match=r"^x\.tar is not a whole tar.*run `air verify`"):
        TarIndex(file, "x.tar")


def test_a_tar_with_a_header_that_cannot_be_read_is_damaged_and_closed(tmp_path: Path):
    file = tmp_path / "x.tar"
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a.jpg")
        member.size = 3
        member.pax_headers = {"GNU.sparse.map": "x,y", "GNU.sparse.size": "3"}
        archive.addfile(member, io.BytesIO(b"abc"))
    before = psutil.Process().num_fds()
    with pytest.raises(DamagedDataError, match=r"x\.tar is not a whole tar"):
        TarIndex(file, "x.tar")
    with pytest.raises(DamagedDataError, match=r"x\.tar is not a whole tar"):
        count_samples(file)
    assert psutil.Process().num_fds() == before
