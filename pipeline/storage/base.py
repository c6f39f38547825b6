"""The interface of a storage, the same for local folders and object stores.

This module must not know any implementation, nor what is in a file.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from pipeline.errors import StorageError
from pipeline.storage.uri import join


class MissingFileError(StorageError):
    """A file does not exist."""


class ForbiddenFileError(StorageError):
    """The permissions of a file on this machine do not allow the access."""


class Entry(NamedTuple):
    """One listed file: its path below the storage's root, and its size in bytes."""

    path: str
    size: int


class Storage(ABC):
    """A folder, local or remote. Storages are cheap to make, picklable, and threads may share them.

    Paths are relative to the root, with "/" between names; writing a file makes its folders. A process made by `fork`
    must not use a remote storage that its parent has used: start workers by `spawn`, as Ray does.

    All methods raise `StorageError`, whose message has the URI, the cause and what to do. Reading a file that does not
    exist raises its subclass `MissingFileError`.
    """

    root: str

    @abstractmethod
    def guarded(self, guard: Callable[[], None]) -> Self:
        """The same folder, with a guard that may refuse changes.

        Args:
            guard: Called just before a file appears, changes or disappears. If it raises, nothing has happened.
        """

    def uri(self, path: str = "") -> str:
        """The full location of `path`, for messages, other tools and `normalise`."""
        return join(self.root, path) if path else self.root

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole file, in memory. For big files prefer `open` or `local_file`."""

    @abstractmethod
    def open(self, path: str) -> BinaryIO:
        """A seekable, buffered binary reader. On a remote storage, each seek beyond the buffer costs one request."""

    @abstractmethod
    def local_file(self, path: str) -> AbstractContextManager[Path]:
        """The file on this machine's disk: the file itself, or a copy that is deleted after the block. Read only.

        A copy is fetched in chunks, so memory is bounded. If the file is replaced meanwhile, the copy still holds one
        version, or fetching it raises.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All files in the folder `prefix` and below, sorted by code points of the path. A missing folder has none."""

    @abstractmethod
    def size(self, path: str) -> int:
        """The file's size in bytes."""

    def exists(self, path: str) -> bool:
        """Whether `path` is a file (a folder is not)."""
        try:
            self.size(path)
        except MissingFileError:
            return False
        return True

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Writes a whole file and replaces any file of that path."""

    @abstractmethod
    def upload(self, local_file: str | os.PathLike[str], path: str) -> None:
        """Copies a file of this machine to `path`, whole and in bounded memory, and replaces any file there."""

    @abstractmethod
    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Writes a whole file unless the path exists. Of any number of callers on any machines, one gets True.

        False says that the file exists. If the network loses the store's answer, the write is repeated, and the caller
        gets False (or an error) for a file of its own: read the file back before deleting anything that it names.
        """

    @abstractmethod
    def delete(self, path: str) -> None:
        """Removes a file. A file that does not exist is not an error."""

    def delete_folder(self, path: str) -> None:
        """Removes all files in a folder and below, and the folder itself on a local file system.

        Nobody may write to the folder at the same time.
        """
        for entry in list(self.list(path)):
            self.delete(entry.path)

    @abstractmethod
    def sweep_temporaries(self, older_than: float) -> int:
        """Removes unfinished writes that were last touched more than `older_than` seconds ago; returns their number.

        Killed writers leave them behind. On an object store there are none to list: there, a lifecycle rule of the
        bucket ends incomplete multipart uploads.
        """
