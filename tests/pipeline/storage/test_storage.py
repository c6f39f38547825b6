"""A storage behaves the same on local disks, in memory and over the S3 protocol; one writer wins."""

import multiprocessing
import os
import pickle
import time
import uuid
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from pipeline.errors import StorageError
from pipeline.storage import remote
from pipeline.storage.base import Entry, MissingFileError, Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.open import open_storage
from pipeline.storage.uri import TEMPORARY_PREFIX

# Forked children must not use obstore, and Ray does not fork either.
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty folder of each kind."""
    if request.param == "local":
        return open_storage(tmp_path / "root")
    if request.param == "memory":
        return open_storage(f"memory://bucket/{uuid.uuid4().hex}")
    return open_storage(f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}")


def test_write_read_replace_delete(store: Storage):
    assert not store.exists("a/b.bin")
    store.write("a/b.bin", b"first")
    store.write("a/b.bin", b"second one")
    assert store.read("a/b.bin") == b"second one"
    assert store.size("a/b.bin") == 10
    assert store.exists("a/b.bin")
    assert not store.exists("a")
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    assert not store.exists("a/b.bin")


def test_a_folder_goes_with_all_that_is_in_it(store: Storage):
    for path in ("old/a.bin", "old/deep/b.bin", "older/c.bin"):
        store.write(path, b"x")
    store.delete_folder("old")
    store.delete_folder("old")
    assert [entry.path for entry in store.list()] == ["older/c.bin"]
    assert not Path(store.root, "old").exists()


def test_missing_files_have_their_own_error_that_names_them(store: Storage):
    for access in (store.read, store.size, store.open, lambda path: store.local_file(path).__enter__()):
        with pytest.raises(MissingFileError, match=r"no/such\.tar.*check the path"):
            access("no/such.tar")
    with pytest.raises(MissingFileError, match=r"nothing\.tar"):
        store.upload("/nonexistent/nothing.tar", "x.tar")


@pytest.mark.parametrize(
    "name", ["with space.txt", "ünï/日本.png", "100%.txt", "a%20b", "a#b?c&d=e+f", "[x]*~.bin", "-"]
)
def test_any_name_survives(store: Storage, name: str):
    store.write(name, name.encode())
    assert list(store.list()) == [Entry(name, len(name.encode()))]
    assert store.read(name) == name.encode()
    assert open_storage(store.root).read(name) == name.encode()


def test_list_is_recursive_sorted_and_by_whole_names(store: Storage):
    paths = ["b.txt", "a/z", "a/b/c", "a-b", "ab/x", "a/Z", "a/é", "a/10", "a/9"]
    for path in paths:
        store.write(path, path.encode())
    assert [entry.path for entry in store.list()] == sorted(paths)
    assert list(store.list("a")) == [Entry(path, len(path.encode())) for path in sorted(paths) if path.startswith("a/")]
    assert list(store.list("a/b")) == [Entry("a/b/c", 5)]
    assert list(store.list("nothing/here")) == []


def test_more_files_than_one_page_of_a_listing(store: Storage):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: store.put_if_absent(f"many/{index:04}", b""), range(1100)))
    assert [entry.path for entry in store.list("many")] == [f"many/{index:04}" for index in range(1100)]


def test_seekable_reading(store: Storage):
    data = os.urandom(3 * 2**20 + 17)
    store.write("big", data)
    with store.open("big") as reader:
        assert reader.seekable()
        assert reader.read(5) == data[:5]
        assert reader.seek(-7, os.SEEK_END) == len(data) - 7
        assert reader.read() == data[-7:]
        assert reader.read(1) == b""
        reader.seek(2**20)
        assert reader.read(2**21) == data[2**20 : 3 * 2**20]
        assert reader.tell() == 3 * 2**20


def test_a_local_file_of_anything(store: Storage):
    store.write("shard.tar", b"x" * 1000)
    with store.local_file("shard.tar") as file:
        assert file.read_bytes() == b"x" * 1000
        assert file.suffix == ".tar"
        assert str(file) not in [open_file.path for open_file in psutil.Process().open_files()]  # thousands may be held
    assert file.exists() == isinstance(store, LocalStorage)
    assert store.read("shard.tar") == b"x" * 1000


def test_upload_and_download_in_chunks(store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "CHUNK_BYTES", 5 * 2**20)  # the smallest part that S3 accepts
    monkeypatch.setattr(remote, "UPLOAD", {"chunk_size": 5 * 2**20, "max_concurrency": 2})
    source = tmp_path / "source"
    source.write_bytes(os.urandom(12 * 2**20 + 1))
    store.write("copy", b"old")
    store.upload(source, "copy")
    assert store.size("copy") == 12 * 2**20 + 1
    with store.local_file("copy") as file:
        assert file.read_bytes() == source.read_bytes()


def test_storage_travels_between_processes(store: Storage):
    store.write("x", b"1")  # connected now
    again = pickle.loads(pickle.dumps(store))
    assert again == store
    assert again.read("x") == b"1"


def test_empty_files(store: Storage):
    store.write("empty", b"")
    assert store.read("empty") == b""
    with store.local_file("empty") as file, store.open("empty") as reader:
        assert file.read_bytes() == reader.read() == b""


@pytest.mark.parametrize("path", ["", "/a", "a/", "a//b", "../a", "a/../b", "./a", "a\0b", f"a/{TEMPORARY_PREFIX}1"])
def test_paths_that_leave_the_folder_are_refused(store: Storage, path: str):
    for access in (store.read, store.delete, store.open, lambda path: store.write(path, b"")):
        with pytest.raises(StorageError, match=r"path below a folder|unfinished writes"):
            access(path)


# One winner.


def test_put_if_absent_keeps_the_first(store: Storage):
    assert store.put_if_absent("m/1.json", b"first")
    assert not store.put_if_absent("m/1.json", b"second")
    assert store.read("m/1.json") == b"first"
    store.delete("m/1.json")
    assert store.put_if_absent("m/1.json", b"third")


def test_threads_race_and_one_wins(store: Storage):
    for round_number in range(5):
        path = f"race/{round_number}.json"
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(lambda me, path=path: store.put_if_absent(path, b"%d" % me), range(16)))
        assert sum(won) == 1
        assert store.read(path) == b"%d" % won.index(True)
    assert len(list(store.list("race"))) == 5


def _race(root: str, me: int, start: float, rounds: int) -> list[bool]:
    store = open_storage(root)
    time.sleep(max(0.0, start - time.time()))
    return [store.put_if_absent(f"race/{number}", b"%d" % me) for number in range(rounds)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_processes_race_and_one_wins(kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    root = str(tmp_path) if kind == "local" else f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"
    processes, rounds = 4, 20
    with ProcessPoolExecutor(processes, mp_context=SPAWN) as pool:
        start = time.time() + 2
        results = [pool.submit(_race, root, me, start, rounds) for me in range(processes)]
        won = [result.result() for result in results]
    for number in range(rounds):
        winners = [me for me in range(processes) if won[me][number]]
        assert len(winners) == 1
        assert open_storage(root).read(f"race/{number}") == b"%d" % winners[0]


def test_a_guard_refuses_every_change_and_no_read(store: Storage, tmp_path: Path):
    store.write("folder/kept", b"old")
    (tmp_path / "new").write_bytes(b"new")

    class NotNowError(Exception):
        pass

    def refuse() -> None:
        raise NotNowError

    guarded = store.guarded(refuse)
    for change in (
        lambda: guarded.write("folder/kept", b"new"),
        lambda: guarded.upload(tmp_path / "new", "folder/kept"),
        lambda: guarded.put_if_absent("other", b"new"),
        lambda: guarded.delete("folder/kept"),
        lambda: guarded.delete_folder("folder"),
    ):
        with pytest.raises(NotNowError):
            change()
    assert guarded.read("folder/kept") == b"old"
    assert [entry.path for entry in guarded.list()] == ["folder/kept"]


def test_a_guard_that_agrees_is_asked_before_each_change(store: Storage):
    asked = []
    guarded = store.guarded(lambda: asked.append(sorted(path for path, _ in store.list())))
    guarded.write("a", b"1")
    assert guarded.put_if_absent("b", b"2")
    guarded.delete("a")
    assert asked == [[], ["a"], ["a", "b"]]
    assert store.read("b") == b"2"
