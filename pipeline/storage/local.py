"""The file system of this machine as a `Storage`.

A file is written under a temporary name beside its target, flushed to the disk and renamed, so that readers see whole
files only. `put_if_absent` names the file by a hard link instead, which only one writer can make. This module must not
know what is in a file. Jobs open storages with `pipeline.storage.open.open_storage`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Self

from pipeline.errors import StorageError
from pipeline.storage.base import Entry, ForbiddenFileError, MissingFileError, Storage
from pipeline.storage.uri import TEMPORARY_PREFIX, check_path


@dataclass(frozen=True)
class LocalStorage(Storage):
    """A folder on a file system of this machine. The file system may be shared by machines: see `put_if_absent`."""

    root: str
    guard: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    def guarded(self, guard: Callable[[], None]) -> Self:
        return replace(self, guard=guard)

    def _ask(self) -> None:
        if self.guard is not None:
            self.guard()

    def _local(self, path: str) -> Path:
        return Path(self.root, check_path(path))

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
            self._ask()
            os.replace(temporary, self._local(path))
            _sync_folder(temporary.parent)

    def upload(self, local_file: str | os.PathLike[str], path: str) -> None:
        with _explained("copy", f"{os.fspath(local_file)} to {self.uri(path)}"):
            source = Path(local_file).resolve(strict=True)
            with _temporary_beside(self._local(path)) as temporary:
                shutil.copyfile(source, temporary)
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
                self._ask()
                os.replace(temporary, self._local(path))
                _sync_folder(temporary.parent)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """As in `Storage`. Uses hard links, which local disks and NFS have.

        A file system without hard links (FAT, some FUSE mounts) serves the processes of one machine. It serves several
        machines only if its `flock` holds between machines.
        """
        target = self._local(path)
        with _explained("write", self.uri(path)), _temporary_beside(target) as temporary:
            _write_through(temporary, data)
            self._ask()
            created = _move_if_absent(temporary, target)
            _sync_folder(target.parent)
            return created

    def delete(self, path: str) -> None:
        with _explained("delete", self.uri(path)):
            self._ask()
            self._local(path).unlink(missing_ok=True)

    def delete_folder(self, path: str) -> None:
        super().delete_folder(path)
        for folder, _, _ in os.walk(self._local(path), topdown=False):
            with suppress(OSError):  # another process has put a file there meanwhile
                os.rmdir(folder)

    def sweep_temporaries(self, older_than: float) -> int:
        removed = 0
        with _explained("clean", self.root):
            for folder, _, names in os.walk(self.root):
                for name in names:
                    if not name.startswith(TEMPORARY_PREFIX):
                        continue
                    file = Path(folder, name)
                    with suppress(FileNotFoundError):  # its writer has finished meanwhile
                        if time.time() - file.stat().st_mtime > older_than:
                            file.unlink()
                            removed += 1
        return removed


def _walk(folder: Path, name: str, parents: tuple[tuple[int, int], ...] = ()) -> Iterator[Entry]:
    """All files below `folder`, whose own path is `name`, in any order. Links are followed, but never in circles."""
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
            with suppress(FileNotFoundError):  # deleted meanwhile, or a broken link
                yield Entry(path, entry.stat().st_size)


@contextmanager
def _temporary_beside(target: Path) -> Iterator[Path]:
    """A new file name in `target`'s folder, which is made if missing. After the block, no file has this name."""
    _make_folder(target.parent)
    temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Makes a folder as `mkdir -p` does. Each new folder survives a crash of the machine."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _write_through(file: Path, data: bytes) -> None:
    """Creates `file` and returns when its bytes are on the disk."""
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Flushes the names in `folder` to the disk: without this, a crash of the machine may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # this file system cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def _move_if_absent(temporary: Path, target: Path) -> bool:
    """Gives the finished file `temporary` the name `target` unless the name is taken; returns whether it was free."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        # NFS repeats a request whose answer was lost, and then reports our own link as taken. The link count tells.
        return temporary.stat().st_nlink > 1
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return _move_if_absent_locked(temporary, target)
    return True


def _move_if_absent_locked(temporary: Path, target: Path) -> bool:
    """`_move_if_absent` for a file system without hard links.

    Creating `target` with O_EXCL and then filling it would leave a partial file after a crash. A rename leaves whole
    files but replaces its target, so the test for `target` and the rename happen under a lock on the folder. The kernel
    releases the lock if its holder dies.
    """
    descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.lexists(target):
            return False
        os.rename(temporary, target)
        return True
    finally:
        os.close(descriptor)  # releases the lock


_ADVICE = {
    errno.EACCES: "check the permissions of the file and its folders",
    errno.EPERM: "check the permissions of the file and its folders",
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EROFS: "choose a folder that can be written",
    errno.ENOTDIR: "a file is where a folder is needed; choose another path",
    errno.EEXIST: "a file is where a folder is needed; choose another path",
    errno.EISDIR: "a folder is where a file is meant; choose another path",
    errno.ENOLCK: "this file system has neither hard links nor locks; choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def _explained(action: str, where: str) -> Iterator[None]:
    """Turns errors of the operating system into `StorageError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(f"cannot {action} {where}: no such file; check the path") from error
    except PermissionError as error:
        raise ForbiddenFileError(f"cannot {action} {where}: permission denied; check its owner and mode") from error
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "check the disk and run the command again")
        raise StorageError(f"cannot {action} {where}: {error.strerror or error}; {advice}") from error
