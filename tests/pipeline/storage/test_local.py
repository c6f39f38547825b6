"""The local storage: writes stay whole when their process dies, one writer wins without hard links, links, modes."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage.base import Entry
from pipeline.storage.open import open_storage
from pipeline.storage.uri import TEMPORARY_PREFIX
from tests.support.paths import ROOT

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def no_hard_links(monkeypatch: pytest.MonkeyPatch):
    """A file system such as FAT."""

    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("no_hard_links")
def test_one_winner_without_hard_links(tmp_path: Path):
    store = open_storage(tmp_path)
    for round_number in range(20):
        with ThreadPoolExecutor(16) as pool:
            path = f"race/{round_number}"
            won = list(pool.map(lambda me, path=path: store.put_if_absent(path, b"%d" % me), range(16)))
        assert sum(won) == 1
        assert store.read(path) == b"%d" % won.index(True)
    assert not any(name.startswith(TEMPORARY_PREFIX) for name in os.listdir(tmp_path / "race"))


def test_a_link_whose_answer_was_lost_counts_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    link = os.link

    def link_and_report_taken(source: str, target: str) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", link_and_report_taken)
    assert open_storage(tmp_path).put_if_absent("x", b"1")


# Crashes.


def _write_for_ever(root: str, without_links: bool) -> None:
    """Whole files of one repeated byte, by each way of writing, until killed."""
    if without_links:
        os.link = lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links"))
    store = open_storage(root)
    source = Path(root).parent / f"source-{os.getpid()}"
    for turn in range(10**9):
        data = bytes([turn % 256]) * 2_000_000
        store.write("written", data)
        store.put_if_absent(f"put/{os.getpid()}-{turn}", data)
        source.write_bytes(data)
        store.upload(source, "uploaded")


@pytest.mark.slow
@pytest.mark.parametrize("without_links", [False, True])
def test_killed_writers_leave_no_partial_file(tmp_path: Path, without_links: bool):
    root = tmp_path / "root"
    store = open_storage(root)
    leftovers = 0
    for kill in range(12):
        writer = SPAWN.Process(target=_write_for_ever, args=(str(root), without_links))
        writer.start()
        before = len(list(store.list("put")))
        deadline = time.monotonic() + 30
        while len(list(store.list("put"))) == before:  # it is at work
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(0.0037 * kill)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        for path, size in store.list():
            data = store.read(path)
            assert size == len(data) == 2_000_000, path
            assert data == data[:1] * len(data), path
            assert not path.rpartition("/")[2].startswith(TEMPORARY_PREFIX)
        leftovers = sum(name.startswith(TEMPORARY_PREFIX) for _, _, names in os.walk(root) for name in names)
        for path in (root / "put").iterdir():
            if not path.name.startswith(TEMPORARY_PREFIX):
                path.unlink()
    assert store.sweep_temporaries(older_than=3600) == 0
    assert store.sweep_temporaries(older_than=-1) == leftovers
    # The lock of a dead writer is gone with it.
    assert store.put_if_absent("put/after", b"1")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = open_storage(tmp_path)
    store.write("x", b"old")

    def disk_full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(StorageError, match="free some space"):
        store.write("x", b"new")
    assert store.read("x") == b"old"
    assert os.listdir(tmp_path) == ["x"]


# Links, modes, messages.


def test_unfinished_writes_are_not_listed_and_swept_by_age(tmp_path: Path):
    store = open_storage(tmp_path)
    store.write("a/x", b"1")
    (tmp_path / "a" / f"{TEMPORARY_PREFIX}dead").write_bytes(b"half")
    assert list(store.list()) == [Entry("a/x", 1)]
    assert store.sweep_temporaries(older_than=60) == 0
    os.utime(tmp_path / "a" / f"{TEMPORARY_PREFIX}dead", (0, 0))
    assert store.sweep_temporaries(older_than=60) == 1
    assert os.listdir(tmp_path / "a") == ["x"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path):
    store = open_storage(tmp_path / "root")
    store.write("a/x", b"1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "y").write_bytes(b"22")
    (tmp_path / "root" / "circle").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "broken").symlink_to(tmp_path / "nothing")
    assert list(store.list()) == [Entry("a/x", 1), Entry("linked/y", 2)]


def test_new_files_have_the_permissions_of_the_umask(tmp_path: Path):
    before = os.umask(0o022)
    try:
        open_storage(tmp_path).write("x", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_errors_say_what_stands_in_the_way(tmp_path: Path):
    store = open_storage(tmp_path)
    store.write("file", b"1")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="a file is where a folder is needed"):
        store.write("file/below", b"2")
    with pytest.raises(StorageError, match="a folder is where a file is meant"):
        store.write("folder", b"2")
    with pytest.raises(StorageError, match="choose a shorter name"):
        store.write("n" * 300, b"2")
    assert not store.exists("file/below")
    assert not store.exists("folder")


def test_obstore_is_not_needed_for_local_files():
    code = (
        "import sys; from pipeline.storage.open import open_storage; "
        "list(open_storage('.').list('tests')); sys.exit('obstore' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
