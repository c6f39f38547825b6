"""Storage: one behaviour on local disks, in memory and over the S3 protocol; whole writes; one winner."""

import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.errors import StorageError
from pipeline.storage import remote
from pipeline.storage.base import Entry, MissingFileError, Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.open import open_parent, open_storage
from pipeline.storage.uri import TEMPORARY_PREFIX, join, normalise
from tests.support.paths import ROOT

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
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 5 * 2**20)  # the least that S3 takes for a part
    monkeypatch.setattr(remote, "_UPLOAD", {"chunk_size": 5 * 2**20, "max_concurrency": 2})
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


# Local particulars.


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
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        store.write("file/below", b"2")
    with pytest.raises(StorageError, match="a folder stands where a file is meant"):
        store.write("folder", b"2")
    with pytest.raises(StorageError, match="choose a shorter name"):
        store.write("n" * 300, b"2")
    assert not store.exists("file/below")
    assert not store.exists("folder")


# Remote particulars.


def test_a_missing_bucket_and_a_dead_server_are_explained(s3_bucket: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/x.*bucket does not exist; check"):
        list(open_storage("s3://no-such-bucket/x").list())
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    with pytest.raises(StorageError, match=r"cannot write s3://bucket/a/b.*AWS_ALLOW_HTTP") as caught:
        open_storage(f"{s3_bucket}/a").write("b", b"")
    assert "\n" not in str(caught.value)


@pytest.fixture
def busy_server(monkeypatch: pytest.MonkeyPatch):
    """A server in the place of S3 that answers "slow down" as often as `left` says, then "not found"."""

    class Answer(BaseHTTPRequestHandler):
        left = 0

        def do_GET(self):
            Answer.left -= 1
            self.send_response(503 if Answer.left >= 0 else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name, value in {"ALLOW_HTTP": "true", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield Answer
    server.shutdown()
    server.server_close()


def test_a_server_that_is_busy_for_a_moment_is_asked_again(busy_server: Any):
    busy_server.left = 3
    with pytest.raises(MissingFileError):
        open_storage("s3://bucket").read("x")


def test_a_server_that_stays_busy_is_given_up(busy_server: Any):
    busy_server.left = 1000
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/x.*503.*check the bucket") as caught:
        open_storage("s3://bucket").read("x")
    assert "\n" not in str(caught.value)
    assert 1000 - busy_server.left == 7


def test_a_download_never_mixes_two_versions(s3_bucket: str, monkeypatch: pytest.MonkeyPatch):
    store = open_storage(f"{s3_bucket}/versions")
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 10)
    store.write("x", b"a" * 25)
    get, calls = type(store._store).get, []  # type: ignore[attr-defined]

    def get_while_it_changes(self, path, **options):
        calls.append(path)
        if len(calls) == 2:
            store.write("x", b"b" * 25)
        return get(self, path, **options)

    monkeypatch.setattr(type(store._store), "get", get_while_it_changes)  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="cannot download"), store.local_file("x"):
        pass


def test_threads_share_a_fresh_storage(s3_bucket: str):
    store = open_storage(f"{s3_bucket}/shared")
    barrier = threading.Barrier(8)

    def use(index: int) -> bytes:
        barrier.wait()
        store.write(f"{index}", b"%d" % index)
        return store.read(f"{index}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, range(8))) == [b"%d" % index for index in range(8)]


# Names.


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
        ("", "empty path"),
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


def test_obstore_is_not_needed_for_local_files():
    code = (
        "import sys; from pipeline.storage.open import open_storage; "
        "list(open_storage('.').list('tests')); sys.exit('obstore' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
