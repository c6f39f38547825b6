"""Files on this machine and in object stores behind one small interface, so that no job cares which it was given.

    storage = open_storage("s3://bucket/targets")        # or a local path, gs://..., az://container/...
    storage.write("plan.json", data)
    for path, size in storage.list("manifest"): ...

Every write is whole: a reader sees the old file, the new file or none, whatever is killed. `put_if_absent` is the one
primitive that the commit protocol and leases rest on. How both come about is in `storage_local` and `storage_remote`.

Object stores are reached through obstore and configured by the environment variables of their own tools, such as
AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL and AWS_ALLOW_HTTP, GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_NAME. `memory://bucket` lives as long as the process: for tests.

This module must not know what is in a file.
"""

from __future__ import annotations

import os
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote, urlsplit

from pipeline.errors import StorageError

REMOTE_SCHEMES = ("s3", "gs", "az", "memory")

TEMPORARY_PREFIX = ".tmp-"
"""File names that start so are unfinished writes: never listed, and never a name that one may ask for."""

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


class MissingFileError(StorageError):
    """A file that is not there."""


class ForbiddenFileError(StorageError):
    """A file of this machine that its permissions do not let us touch."""


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
    return "/".join([normalise(uri).rstrip("/"), *(check_path(part) for part in parts)])


def open_storage(uri: str | os.PathLike[str]) -> Storage:
    """The folder `uri` as a `Storage`. Nothing is touched yet: the folder may be missing, the network down.

    Raises:
        StorageError: see `normalise`.
    """
    root = normalise(uri)
    # Both build on this module, and a job mostly needs one of them.
    if _SCHEME.match(root):
        from pipeline.storage.remote import RemoteStorage

        return RemoteStorage(root)
    from pipeline.storage.local import LocalStorage

    return LocalStorage(root)


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


def check_writable(uri: str | os.PathLike[str]) -> None:
    """Raises StorageError if the file `uri` cannot be written, before work is done for it. Makes the file's folder."""
    storage, name = open_parent(uri)
    if os.path.isdir(storage.uri(name)):  # never so for a remote one
        raise StorageError(f"cannot write {storage.uri(name)}: it is a folder; choose another name")
    probe = f"air-probe-{uuid.uuid4().hex}"
    try:
        storage.write(probe, b"")
        storage.delete(probe)
    except StorageError as error:
        raise StorageError(f"{storage.uri(name)} could not be written: {error}") from None


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

    def delete_folder(self, path: str) -> None:
        """Remove all files in a folder and below, and the folder itself where there is such a thing.

        Only for a folder that nobody writes to at the same time.
        """
        for entry in list(self.list(path)):
            self.delete(entry.path)

    @abstractmethod
    def sweep_temporaries(self, older_than: float) -> int:
        """Remove what killed writers left behind, if last touched more than `older_than` seconds ago; how many.

        Object stores keep none that can be listed: there, a lifecycle rule ends incomplete multipart uploads.
        """


def check_path(path: str) -> str:
    """`path`, if it is relative, stays below the root and is spelt in one way only."""
    names = path.split("/")
    if not all(names) or "." in names or ".." in names or "\0" in path:
        raise StorageError(
            f"{path!r} is not a path below a folder; write names with single '/' between, no '.' or '..'"
        )
    if names[-1].startswith(TEMPORARY_PREFIX):
        raise StorageError(f"{path!r}: names that start with {TEMPORARY_PREFIX} are unfinished writes; choose another")
    return path
