"""A journal: numbered entries in one folder of a storage, each created once and never changed.

The newest entry is the present state, and all entries are its history. Entry n + 1 is created with put-if-absent, so
that of any number of writers who have seen entry n, exactly one succeeds: appending is a compare-and-swap that works
on every storage. This module must not know what is in an entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.storage.base import Storage

_ENTRY = re.compile(r"(\d{12})\.json")


@dataclass(frozen=True)
class JournalEntry:
    """One entry.

    Attributes:
        number: 1 for the first entry; each further entry has the number of the one before plus 1.
        data: What its writer stored.
    """

    number: int
    data: bytes


@dataclass(frozen=True)
class Journal:
    """The journal in `folder` of a storage. A folder that does not exist is a journal without entries."""

    storage: Storage
    folder: str

    def path(self, number: int) -> str:
        """The file of an entry."""
        return f"{self.folder}/{number:012d}.json"

    def numbers(self) -> list[int]:
        """Numbers of all entries, ascending. Lists the folder and reads no file."""
        names = (entry.path.rsplit("/", 1)[-1] for entry in self.storage.list(self.folder))
        return [int(match[1]) for match in map(_ENTRY.fullmatch, names) if match]

    def newest(self) -> JournalEntry | None:
        """The newest entry; None if there is none.

        Raises:
            StorageError: The storage cannot be read.
        """
        numbers = self.numbers()
        return self.read(numbers[-1]) if numbers else None

    def read(self, number: int) -> JournalEntry:
        """One entry.

        Raises:
            MissingFileError: The entry does not exist.
        """
        return JournalEntry(number, self.storage.read(self.path(number)))

    def entries(self) -> Iterator[JournalEntry]:
        """All entries, the oldest first."""
        for number in self.numbers():
            yield self.read(number)

    def append(self, after: int, data: bytes) -> bool:
        """Creates entry `after` + 1, unless another writer has created it: False then.

        `data` must differ between writers, for instance by a random name. A put that was repeated because the store's
        answer was lost finds its own entry; then the result is True.

        Args:
            after: Number of the newest entry that the caller has seen; 0 if there was none.
            data: The entry's content.
        """
        number = after + 1
        return self.storage.put_if_absent(self.path(number), data) or self.read(number).data == data
