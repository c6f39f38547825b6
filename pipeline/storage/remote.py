"""Object stores as a `Storage`, through obstore: S3 and servers with its protocol, Google Cloud Storage, Azure.

The environment variables of the stores' own tools configure the stores (see `pipeline.storage.open`). obstore is
imported at first use, so that local work does not need it. This module must not know what is in a file.
"""

from __future__ import annotations

import functools
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from pipeline.errors import StorageError
from pipeline.storage.base import Entry, MissingFileError, Storage
from pipeline.storage.uri import TEMPORARY_PREFIX, check_path

if TYPE_CHECKING:
    from obstore.store import ObjectStore, RetryConfig

CHUNK_BYTES = 16 * 2**20
"""Files are downloaded in chunks of this size."""

UPLOAD: Any = {"chunk_size": CHUNK_BYTES, "max_concurrency": 4}
"""How obstore uploads a file: at most four chunks, 64 MiB, are in memory."""

_READ_AHEAD_BYTES = 2**20

# A request to a server that refuses fails after seconds, to a server that does not answer after a minute; obstore's own
# bounds allow three minutes of silence. For longer outages the runner repeats the whole attempt.
_RETRY: RetryConfig = {
    "max_retries": 6,
    "retry_timeout": timedelta(seconds=45),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 3},
}


@dataclass(frozen=True)
class RemoteStorage(Storage):
    """A key prefix in a bucket. Each process connects at first use."""

    root: str
    guard: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[RemoteStorage], tuple[str, Callable[[], None] | None]]:
        """Pickling leaves the connection out."""
        return RemoteStorage, (self.root, self.guard)

    def guarded(self, guard: Callable[[], None]) -> Self:
        return replace(self, guard=guard)

    def _ask(self) -> None:
        if self.guard is not None:
            self.guard()

    # Connects lazily: a storage travels to other processes and is often never used in the process that made it.
    @functools.cached_property
    def _store(self) -> ObjectStore:
        scheme, _, rest = self.root.partition("://")
        bucket = rest.partition("/")[0]
        if scheme == "memory":
            return _memory_store(bucket)
        from obstore.store import from_url

        with _explained("connect to", self.root):
            return from_url(f"{scheme}://{bucket}", retry_config=_RETRY)

    def _key(self, path: str) -> str:
        return "/".join(filter(None, (self._prefix, check_path(path))))

    @property
    def _prefix(self) -> str:
        return self.root.partition("://")[2].partition("/")[2]

    def read(self, path: str) -> bytes:
        with _explained("read", self.uri(path)):
            return bytes(self._store.get(self._key(path)).bytes())

    def open(self, path: str) -> BinaryIO:
        reader = _RemoteReader(self._store, self._key(path), self.uri(path), self.size(path))
        return io.BufferedReader(reader, buffer_size=_READ_AHEAD_BYTES)

    @contextmanager
    def local_file(self, path: str) -> Iterator[Path]:
        # The copy keeps the suffix, which some readers look at. It is closed, as a caller may hold thousands of copies.
        descriptor, name = tempfile.mkstemp(prefix="air-", suffix=Path(path).suffix)
        try:
            with open(descriptor, "wb") as copy, _explained("download", self.uri(path)):
                meta = self._store.head(self._key(path))
                # Each range is retried by itself and ends within the request timeout; one long stream would not.
                for start in range(0, meta["size"], CHUNK_BYTES):
                    end = min(start + CHUNK_BYTES, meta["size"])
                    options: Any = {"range": (start, end), "if_match": meta["e_tag"]}
                    copy.write(self._store.get(self._key(path), options=options).bytes())
            yield Path(name)
        finally:
            os.unlink(name)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder = self._key(prefix) if prefix else self._prefix
        below_root = len(self._prefix) + 1 if self._prefix else 0
        with _explained("list", self.uri(prefix)):
            found = [
                Entry(meta["path"][below_root:], meta["size"])
                for chunk in self._store.list(folder or None, chunk_size=1000)
                for meta in chunk
                if not meta["path"].rpartition("/")[2].startswith(TEMPORARY_PREFIX)
            ]
        return iter(sorted(found))

    def size(self, path: str) -> int:
        with _explained("read", self.uri(path)):
            return self._store.head(self._key(path))["size"]

    def write(self, path: str, data: bytes) -> None:
        self._ask()
        with _explained("write", self.uri(path)):
            self._store.put(self._key(path), data, **UPLOAD)

    def upload(self, local_file: str | os.PathLike[str], path: str) -> None:
        source = Path(local_file)
        if not source.is_file():
            raise MissingFileError(f"cannot upload {source}: no such file; check the path")
        self._ask()
        with _explained("upload", f"{source} to {self.uri(path)}"):
            self._store.put(self._key(path), source, **UPLOAD)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError

        # A store may also answer "conflict" when two requests merely coincide. That answer alone does not prove that
        # the file exists, so the file is looked up.
        for _ in range(5):
            self._ask()
            with _explained("write", self.uri(path)), suppress(AlreadyExistsError):
                self._store.put(self._key(path), data, mode="create")
                return True
            if self.exists(path):
                return False
        raise StorageError(
            f"cannot write {self.uri(path)}: other processes keep writing and deleting it; run the command again"
        )

    def delete(self, path: str) -> None:
        self._ask()
        with suppress(MissingFileError), _explained("delete", self.uri(path)):
            self._store.delete(self._key(path))

    def sweep_temporaries(self, older_than: float) -> int:
        return 0


class _RemoteReader(io.RawIOBase):
    """Random access to one object by range requests, unbuffered: wrap it in `io.BufferedReader`."""

    def __init__(self, store: ObjectStore, key: str, uri: str, size: int) -> None:
        self._store, self._key, self._uri, self._size = store, key, uri, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}, before the start of {self._uri}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        with _explained("read", self._uri):
            data = self._store.get_range(self._key, start=self._position, length=wanted)
        buffer[: len(data)] = memoryview(data)
        self._position += len(data)
        return len(data)


@functools.cache
def _memory_store(bucket: str) -> ObjectStore:
    from obstore.store import MemoryStore

    return MemoryStore()


@contextmanager
def _explained(action: str, where: str) -> Iterator[None]:
    """Turns errors of obstore into `StorageError`."""
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(f"cannot {action} {where}: no such object or bucket; check the path") from error
    except (BaseError, OSError, ValueError) as error:
        raise StorageError(
            f"cannot {action} {where}: {_cause(error)}; check the bucket, the network, and the store's environment "
            "variables (for S3 AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP)"
        ) from error


def _cause(error: Exception) -> str:
    """The first line of obstore's message, without the long dump after it, and the text of the server's XML answer."""
    text = str(error)
    first = text.partition("\n")[0].partition("<?xml")[0].rstrip(" :")
    said = re.search("<Message>(.*?)</Message>", text)
    return f"{first}: {said[1]}" if said else first
