"""Which shards are new: by checksum, in folders and globs; what is still being written waits."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, JobFailedError
from pipeline.inputs import shards as listing
from pipeline.retraining import shards as finding
from pipeline.retraining.shards import Seen, Source, find_new_shards


@pytest.fixture
def incoming(shards: Path, tmp_path: Path) -> Path:
    """A folder with an output of `air shard` (two shards), and a folder with one of its tars as another program's."""
    shutil.copytree(shards, tmp_path / "in" / "day-1")
    (tmp_path / "in" / "tars").mkdir()
    return tmp_path / "in"


def tars_of(shards: Path) -> list[Path]:
    return sorted((shards / "data").glob("*.tar"))


def found(given: Iterable[object], known: Iterable[Source] = ()) -> list[tuple[str, list[str]]]:
    """Folder and units of each source."""
    sources = find_new_shards([str(one) for one in given], Seen(known))
    return [(Path(source.uri).name, [unit.name for unit in source.units]) for source in sources]


def test_a_folder_and_a_glob_of_folders_find_the_same(incoming: Path) -> None:
    expected = [("day-1", ["shard-00000", "shard-00001"])]
    assert found([incoming / "day-1"]) == expected
    assert found([incoming / "day-*"]) == expected
    assert found([incoming / "*"]) == expected
    assert found([incoming / "*", incoming / "day-1"]) == expected
    assert found([incoming / "day-[2-9]"]) == []


def test_what_was_seen_is_not_new_wherever_it_lies(incoming: Path, shards: Path) -> None:
    known = find_new_shards([str(incoming / "*")], Seen([]))
    assert found([incoming / "*"], known) == []
    shutil.move(incoming / "day-1", incoming / "day-2")
    assert found([incoming / "*"], known) == []
    shutil.copyfile(tars_of(shards)[0], incoming / "tars" / "copy.tar")
    assert found([incoming / "*"], known) == []


def test_copies_count_once(incoming: Path, shards: Path) -> None:
    for name in ("a", "b"):
        shutil.copyfile(tars_of(shards)[0], incoming / "tars" / f"{name}.tar")
    assert found([incoming / "tars"]) == [("tars", ["a"])]
    assert found([incoming / "tars" / "*.tar"]) == [("tars", ["a"])]
    assert found([incoming / "tars" / "b*"]) == [("tars", ["b"])]


def test_a_seen_tar_is_not_read_again(incoming: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(tars_of(shards)[0], incoming / "tars" / "a.tar")
    known = find_new_shards([str(incoming / "tars")], Seen([]))
    monkeypatch.setattr(finding, "foreign_shard", lambda *arguments: pytest.fail("was read"))
    assert found([incoming / "tars"], known) == []
    monkeypatch.setattr(finding, "foreign_shard", listing.foreign_shard)
    shutil.copyfile(tars_of(shards)[1], incoming / "tars" / "a.tar")  # another shard under the same name
    assert found([incoming / "tars"], known) == [("tars", ["a"])]


def test_what_is_being_written_waits(incoming: Path, shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    (incoming / "day-1" / "manifest" / "shard-00001.json").unlink()
    (incoming / "tars" / "half.tar").write_bytes(tars_of(shards)[0].read_bytes()[:700])
    (incoming / "pictures").mkdir()
    (incoming / "pictures" / "0.png").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert found([incoming / "*"]) == []
    assert "day-1 is not finished: its shards wait for a later round" in caplog.text
    assert "it waits for a later round" in caplog.text


def test_a_wrong_place_is_an_error(incoming: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist, or is empty"):
        found([tmp_path / "nowhere"])
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.png").write_bytes(b"x")
    with pytest.raises(ConfigError, match="holds no shards"):
        found([tmp_path / "pictures"])
    plan = incoming / "day-1" / "plan.json"
    plan.write_text(plan.read_text().replace('"job": "shard"', '"job": "encode"'))
    with pytest.raises(JobFailedError, match="is the output of `air encode`"):
        found([incoming / "*"])
