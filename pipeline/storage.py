"""Files on this machine and in object stores behind one small interface, so that no job cares which it was given.

    storage = open_storage("s3://bucket/targets")        # or a local path, gs://..., az://container/...
    storage.write("plan.json", data)
    for path, size in storage.list("manifest"): ...

Every write is whole: a reader sees the old file, the new file or none, whatever is killed. On local disks a file is
written under a temporary name, flushed to the disk and renamed; object stores do as much by themselves.
`put_if_absent` is the one primitive that the commit protocol and leases rest on.

Object stores are reached through obstore and configured by the environment variables of their own tools, such as
AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL and AWS_ALLOW_HTTP, GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_NAME. `memory://bucket` lives as long as the process: for tests.

This module must not know what is in a file.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import io
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from urllib.parse import unquote, urlsplit

from pipeline.errors import StorageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

REMOTE_SCHEMES = ("s3", "gs", "az", "memory")

TEMPORARY_PREFIX = ".tmp-"
"""File names that start so are unfinished writes: never listed, and never a name that one may ask for."""

_CHUNK_BYTES = 16 * 2**20
_UPLOAD: Any = {"chunk_size": _CHUNK_BYTES, "max_concurrency": 4}  # 64 MiB in memory while a file goes up
_READ_AHEAD_BYTES = 2**20
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


class MissingFileError(StorageError):
    """A file that is not there."""


class Entry(NamedTuple):
    """One listed file: its path below the storage's root, and its size in bytes."""

    path: str
    size: int


def normalise(uri: str | os.PathLike[str]) -> str:
    """The one spelling of a location that this project passes around.

    Local ("data", "~/data", "file:///data"): an absolute path, so that it means the same in every process of this
    machine. Remote: "scheme://bucket/key", taken literally (no percent-decoding), without doubled or trailing slashes.

    Raises:
        StorageError: a scheme that is not supported, no bucket, or ".." in a remote key.
    """
    text = os.fspath(uri)
    if not text:
        raise StorageError("an empty path was given; name a folder or a file ('.' is the current folder)")
    match = _SCHEME.match(text)
    if match is None:
        return os.path.abspath(os.path.expanduser(text))
    scheme = match[1].lower()
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise StorageError(f"{text}: a file URI names this machine only; write file:///{parts.netloc}{parts.path}")
        return os.path.abspath(unquote(parts.path))
    if scheme not in REMOTE_SCHEMES:
        known = ", ".join(f"{name}://" for name in REMOTE_SCHEMES)
        raise StorageError(f"{text}: {scheme}:// is not supported; use a local path or one of {known}")
    bucket, *segments = text[match.end() :].split("/")
    if not bucket:
        raise StorageError(f"{text}: names no bucket; write {scheme}://bucket/path")
    if ".." in segments:
        raise StorageError(f"{text}: '..' means nothing in an object store; write the path out")
    return "/".join([f"{scheme}://{bucket}", *filter(None, segments)])


def join(uri: str | os.PathLike[str], *parts: str) -> str:
    """`uri`, normalised, with relative `parts` below it.

    Raises:
        StorageError: a part that is absolute, empty, or leads outside ("..").
    """
    return "/".join([normalise(uri).rstrip("/"), *(_checked(part) for part in parts)])


def open_storage(uri: str | os.PathLike[str]) -> Storage:
    """The folder `uri` as a `Storage`. Nothing is touched yet: the folder may be missing, the network down.

    Raises:
        StorageError: see `normalise`.
    """
    root = normalise(uri)
    return RemoteStorage(root) if _SCHEME.match(root) else LocalStorage(root)


def open_parent(uri: str | os.PathLike[str]) -> tuple[Storage, str]:
    """The folder of the file `uri`, and the file's name in it: for a single file that a user names.

    Raises:
        StorageError: see `normalise`; or `uri` is a bucket.
    """
    whole = normalise(uri)
    folder, _, name = whole.rpartition("/")
    if not name or folder.endswith("/"):
        raise StorageError(f"{whole}: names no file; add the file's path")
    return open_storage(folder or "/"), name


class Storage(ABC):
    """A folder, local or remote. Cheap to make, safe to share between threads, and picklable.

    Paths are relative to the root, with "/" between names; folders come into being with their first file. A process
    made by `fork` must not use a remote storage that its parent has used: start workers by `spawn`, as Ray does.

    All methods raise `StorageError` with the URI, the cause and a way out; reading what is not there raises its
    subclass `MissingFileError`.
    """

    root: str

    def uri(self, path: str = "") -> str:
        """The full location of `path`, fit for `normalise`, for messages and for other tools."""
        return join(self.root, path) if path else self.root

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole file, in memory. For big files prefer `open` or `local_file`."""

    @abstractmethod
    def open(self, path: str) -> BinaryIO:
        """A seekable binary reader, buffered: each seek far away costs a remote storage one request."""

    @abstractmethod
    def local_file(self, path: str) -> AbstractContextManager[Path]:
        """The file on this machine's disk: itself, or a copy that is gone after the block. Read only.

        A copy is fetched in chunks (bounded memory) and is of one version, even when the file is replaced meanwhile.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All files in the folder `prefix` and below, sorted by path (by code point). A missing folder has no files."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of the file."""

    def exists(self, path: str) -> bool:
        """Whether `path` is a file (a folder is not)."""
        try:
            self.size(path)
        except MissingFileError:
            return False
        return True

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Write a file whole, in place of any that is there."""

    @abstractmethod
    def upload(self, local_file: str | os.PathLike[str], path: str) -> None:
        """Copy a file of this machine to `path` whole, in bounded memory, in place of any that is there."""

    @abstractmethod
    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write a file whole unless there is one. Of any number of callers, anywhere, one gets True.

        False says that the file exists. A caller whose earlier answer the network lost gets False (or an error) for
        a file of its own: before it throws away what the file names, it reads the file back.
        """

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove a file. One that is not there is no error."""

    @abstractmethod
    def sweep_temporaries(self, older_than: float) -> int:
        """Remove what killed writers left behind, if last touched more than `older_than` seconds ago; how many.

        Object stores keep none that can be listed: there, a lifecycle rule ends incomplete multipart uploads.
        """


@dataclass(frozen=True)
class LocalStorage(Storage):
    """A folder on a file system of this machine. Shared file systems serve as well: see `put_if_absent`."""

    root: str

    def _local(self, path: str) -> Path:
        return Path(self.root, _checked(path))

    def read(self, path: str) -> bytes:
        with _explained("read", self.uri(path)):
            return self._local(path).read_bytes()

    def open(self, path: str) -> BinaryIO:
        with _explained("open", self.uri(path)):
            return self._local(path).open("rb")

    @contextmanager
    def local_file(self, path: str) -> Iterator[Path]:
        self.size(path)  # a missing file is an error here, not somewhere in the block
        yield self._local(path)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder = self._local(prefix) if prefix else Path(self.root)
        with _explained("list", str(folder)):
            return iter(sorted(_walk(folder, prefix)))

    def size(self, path: str) -> int:
        with _explained("read", self.uri(path)):
            status = self._local(path).stat()
        if stat.S_ISDIR(status.st_mode):
            raise MissingFileError(f"{self.uri(path)} is a folder, not a file; name a file in it")
        return status.st_size

    def exists(self, path: str) -> bool:
        with _explained("look at", self.uri(path)):
            return self._local(path).is_file()

    def write(self, path: str, data: bytes) -> None:
        with _explained("write", self.uri(path)), _temporary_beside(self._local(path)) as temporary:
            _write_through(temporary, data)
            os.replace(temporary, self._local(path))
            _sync_folder(temporary.parent)

    def upload(self, local_file: str | os.PathLike[str], path: str) -> None:
        with _explained("copy", f"{os.fspath(local_file)} to {self.uri(path)}"):
            source = Path(local_file).resolve(strict=True)
            with _temporary_beside(self._local(path)) as temporary:
                shutil.copyfile(source, temporary)
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, self._local(path))
                _sync_folder(temporary.parent)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """As in `Storage`. Rests on hard links, which local disks and NFS have.

        A file system without them (FAT, some FUSE mounts) serves the processes of one machine, and several machines
        only if its `flock` reaches across them.
        """
        target = self._local(path)
        with _explained("write", self.uri(path)), _temporary_beside(target) as temporary:
            _write_through(temporary, data)
            created = _move_if_absent(temporary, target)
            _sync_folder(target.parent)
            return created

    def delete(self, path: str) -> None:
        with _explained("delete", self.uri(path)):
            self._local(path).unlink(missing_ok=True)

    def sweep_temporaries(self, older_than: float) -> int:
        removed = 0
        with _explained("clean", self.root):
            for folder, _, names in os.walk(self.root):
                for name in names:
                    if not name.startswith(TEMPORARY_PREFIX):
                        continue
                    file = Path(folder, name)
                    with suppress(FileNotFoundError):  # its writer came to an end
                        if time.time() - file.stat().st_mtime > older_than:
                            file.unlink()
                            removed += 1
        return removed


@dataclass(frozen=True)
class RemoteStorage(Storage):
    """A key prefix in a bucket. Connects on first use, and anew in each process."""

    root: str

    def __reduce__(self) -> tuple[type[RemoteStorage], tuple[str]]:
        """The connection stays behind."""
        return RemoteStorage, (self.root,)

    # Not at construction: a storage travels to other processes and often is never used where it was made.
    @functools.cached_property
    def _store(self) -> ObjectStore:
        scheme, _, rest = self.root.partition("://")
        bucket = rest.partition("/")[0]
        if scheme == "memory":
            return _memory_store(bucket)
        from obstore.store import from_url

        with _explained_remote("connect to", self.root):
            return from_url(f"{scheme}://{bucket}")

    def _key(self, path: str) -> str:
        return "/".join(filter(None, (self._prefix, _checked(path))))

    @property
    def _prefix(self) -> str:
        return self.root.partition("://")[2].partition("/")[2]

    def read(self, path: str) -> bytes:
        with _explained_remote("read", self.uri(path)):
            return bytes(self._store.get(self._key(path)).bytes())

    def open(self, path: str) -> BinaryIO:
        reader = _RemoteReader(self._store, self._key(path), self.uri(path), self.size(path))
        return io.BufferedReader(reader, buffer_size=_READ_AHEAD_BYTES)

    @contextmanager
    def local_file(self, path: str) -> Iterator[Path]:
        # The suffix stays: readers of some formats go by it.
        with tempfile.NamedTemporaryFile(prefix="air-", suffix=Path(path).suffix) as copy:
            with _explained_remote("download", self.uri(path)):
                meta = self._store.head(self._key(path))
                # Ranges and not one stream: each is retried by itself and none outlasts the request timeout.
                for start in range(0, meta["size"], _CHUNK_BYTES):
                    end = min(start + _CHUNK_BYTES, meta["size"])
                    options: Any = {"range": (start, end), "if_match": meta["e_tag"]}
                    copy.write(self._store.get(self._key(path), options=options).bytes())
                copy.flush()
            yield Path(copy.name)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder = self._key(prefix) if prefix else self._prefix
        below_root = len(self._prefix) + 1 if self._prefix else 0
        with _explained_remote("list", self.uri(prefix)):
            found = [
                Entry(meta["path"][below_root:], meta["size"])
                for chunk in self._store.list(folder or None, chunk_size=1000)
                for meta in chunk
                if not meta["path"].rpartition("/")[2].startswith(TEMPORARY_PREFIX)
            ]
        return iter(sorted(found))

    def size(self, path: str) -> int:
        with _explained_remote("read", self.uri(path)):
            return self._store.head(self._key(path))["size"]

    def write(self, path: str, data: bytes) -> None:
        with _explained_remote("write", self.uri(path)):
            self._store.put(self._key(path), data, **_UPLOAD)

    def upload(self, local_file: str | os.PathLike[str], path: str) -> None:
        source = Path(local_file)
        if not source.is_file():
            raise MissingFileError(f"cannot upload {source}: no such file; check the path")
        with _explained_remote("upload", f"{source} to {self.uri(path)}"):
            self._store.put(self._key(path), source, **_UPLOAD)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError

        # A store may also answer "conflict" to a write that only ran into another request. That alone does not prove
        # that the file exists, so it is looked up.
        for _ in range(5):
            with _explained_remote("write", self.uri(path)), suppress(AlreadyExistsError):
                self._store.put(self._key(path), data, mode="create")
                return True
            if self.exists(path):
                return False
        raise StorageError(f"cannot write {self.uri(path)}: other writers and deleters keep interfering; run it again")

    def delete(self, path: str) -> None:
        with suppress(MissingFileError), _explained_remote("delete", self.uri(path)):
            self._store.delete(self._key(path))

    def sweep_temporaries(self, older_than: float) -> int:
        return 0


class _RemoteReader(io.RawIOBase):
    """Random access to one object by range requests. Unbuffered: `io.BufferedReader` goes on top."""

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
            raise ValueError(f"seek to {base + offset}: before the start of {self._uri}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        with _explained_remote("read", self._uri):
            data = self._store.get_range(self._key, start=self._position, length=wanted)
        buffer[: len(data)] = memoryview(data)
        self._position += len(data)
        return len(data)


@functools.cache
def _memory_store(bucket: str) -> ObjectStore:
    from obstore.store import MemoryStore

    return MemoryStore()


def _checked(path: str) -> str:
    """`path`, if it is relative, stays below the root and is spelt in one way only."""
    names = path.split("/")
    if not all(names) or "." in names or ".." in names or "\0" in path:
        raise StorageError(
            f"{path!r} is not a path below a folder; write names with single '/' between, no '.' or '..'"
        )
    if names[-1].startswith(TEMPORARY_PREFIX):
        raise StorageError(f"{path!r}: names that start with {TEMPORARY_PREFIX} are unfinished writes; choose another")
    return path


def _walk(folder: Path, name: str, parents: tuple[tuple[int, int], ...] = ()) -> Iterator[Entry]:
    """Every file below `folder`, whose own path is `name`, in no order. Links are followed, but not in circles."""
    try:
        status = folder.stat()
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        return
    for entry in entries:
        path = f"{name}/{entry.name}" if name else entry.name
        if entry.is_dir():
            yield from _walk(folder / entry.name, path, (*parents, identity))
        elif not entry.name.startswith(TEMPORARY_PREFIX):
            with suppress(FileNotFoundError):  # deleted since, or a link to nothing
                yield Entry(path, entry.stat().st_size)


@contextmanager
def _temporary_beside(target: Path) -> Iterator[Path]:
    """A fresh name in `target`'s folder, which is made if missing. Nothing of that name is left after the block."""
    _make_folder(target.parent)
    temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Like `mkdir -p`, and each new folder survives a crash of the machine."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _write_through(file: Path, data: bytes) -> None:
    """Create `file` and return when its bytes are on the disk."""
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Put the names in `folder` on the disk: a rename alone may be lost with the machine."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


def _move_if_absent(temporary: Path, target: Path) -> bool:
    """Give the finished file `temporary` the name `target` unless that is taken; whether it was free."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        # NFS repeats a request whose answer was lost and then reports our own link as taken: the count tells.
        return temporary.stat().st_nlink > 1
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return _move_if_absent_locked(temporary, target)
    return True


def _move_if_absent_locked(temporary: Path, target: Path) -> bool:
    """The same where there are no hard links.

    Creating `target` with O_EXCL and then filling it would show a partial file after a crash. A rename is whole but
    does not ask, so asking and renaming happen under a lock on the folder, which the kernel drops if its holder dies.
    """
    descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.lexists(target):
            return False
        os.rename(temporary, target)
        return True
    finally:
        os.close(descriptor)  # drops the lock


_ADVICE = {
    errno.EACCES: "check the permissions of the file and its folders",
    errno.EPERM: "check the permissions of the file and its folders",
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EROFS: "choose a folder that can be written",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another path",
    errno.EEXIST: "a file stands where a folder is needed; choose another path",
    errno.EISDIR: "a folder stands where a file is meant; choose another path",
    errno.ENOLCK: "this file system has neither hard links nor locks; choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def _explained(action: str, where: str) -> Iterator[None]:
    """Turn the operating system's errors into ours."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(f"cannot {action} {where}: no such file; check the path") from error
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "check the disk and run it again")
        raise StorageError(f"cannot {action} {where}: {error.strerror or error}; {advice}") from error


@contextmanager
def _explained_remote(action: str, where: str) -> Iterator[None]:
    """Turn obstore's errors into ours. Its messages carry a long dump after the first line: that stays in the cause."""
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(f"cannot {action} {where}: no such object or bucket; check the path") from error
    except (BaseError, OSError, ValueError) as error:
        cause = str(error).partition("\n")[0]
        raise StorageError(
            f"cannot {action} {where}: {cause}; check the bucket, the network, and the store's environment variables "
            "(for S3 AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP)"
        ) from error
