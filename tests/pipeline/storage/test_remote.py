"""Object stores: busy and dead servers, downloads of one version, threads on one connection."""

import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipeline.errors import StorageError
from pipeline.storage import remote
from pipeline.storage.base import MissingFileError
from pipeline.storage.open import open_storage


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
    from obstore.store import S3Store

    store = open_storage(f"{s3_bucket}/versions")
    monkeypatch.setattr(remote, "CHUNK_BYTES", 10)
    store.write("x", b"a" * 25)
    get, calls = S3Store.get, []

    def get_while_it_changes(self, path, **options):
        calls.append(path)
        if len(calls) == 2:
            store.write("x", b"b" * 25)
        return get(self, path, **options)

    monkeypatch.setattr(S3Store, "get", get_while_it_changes)
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
