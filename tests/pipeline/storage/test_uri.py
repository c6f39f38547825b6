"""Locations: one spelling of each, and errors that say how to write a bad one."""

from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage.open import open_parent, open_storage
from pipeline.storage.uri import join, normalise


def test_normalise_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert normalise("data") == normalise("./data/") == normalise("x/../data") == str(tmp_path / "data")
    assert normalise("~/data") == "/home/someone/data"
    assert normalise("file:///a%20b/c") == normalise("file://localhost/a%20b/c") == "/a b/c"
    assert normalise(Path("/a/b")) == "/a/b"
    assert normalise("/a%20b") == "/a%20b"


def test_normalise_remote():
    assert normalise("s3://bucket") == normalise("S3://bucket/") == "s3://bucket"
    assert normalise("gs://bucket//a/b%20c/") == "gs://bucket/a/b%20c"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "the path is empty"),
        ("http://example.com/x", r"http:// is not supported; use a local path or one of s3://"),
        ("s3://", "names no bucket"),
        ("s3:///key", "names no bucket"),
        ("s3://bucket/../other", "write the path out"),
        ("file://host/x", "this machine only"),
    ],
)
def test_bad_locations_are_explained(uri: str, message: str):
    with pytest.raises(StorageError, match=message):
        open_storage(uri)


def test_join_and_parent(tmp_path: Path):
    assert join("s3://b", "x", "y/z") == "s3://b/x/y/z"
    assert join("/", "x") == "/x"
    assert open_storage("az://c/p").uri("q r") == "az://c/p/q r"
    with pytest.raises(StorageError):
        join("s3://b", "../x")
    assert open_parent("s3://bucket/a/b.air") == (open_storage("s3://bucket/a"), "b.air")
    assert open_parent("s3://bucket/b.air") == (open_storage("s3://bucket"), "b.air")
    assert open_parent("/b.air") == (open_storage("/"), "b.air")
    with pytest.raises(StorageError, match="names no file"):
        open_parent("s3://bucket")
