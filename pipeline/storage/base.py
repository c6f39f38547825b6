"""What a storage can do, whatever is behind it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.errors import StorageError
from pipeline.storage.uri import join


class MissingFileError(StorageError):
    """A file that is not there."""


class ForbiddenFileError(StorageError):
    """A file of this machine that its permissions do not let us touch."""


class Entry(NamedTuple):
    """One listed file: its path below the storage's root, and its size in bytes."""

    path: str
    size: int


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
