"""A journal on a local folder. Object stores have the same `put_if_absent` (test_remote.py)."""

import threading
from pathlib import Path

from pipeline.storage.journal import Journal, JournalEntry
from pipeline.storage.open import open_storage


def test_a_folder_that_does_not_exist_is_a_journal_without_entries(tmp_path: Path) -> None:
    journal = Journal(open_storage(tmp_path), "aliases/champion")
    assert journal.newest() is None
    assert list(journal.entries()) == []


def test_entries_are_numbered_and_kept(tmp_path: Path) -> None:
    journal = Journal(open_storage(tmp_path), "log")
    assert journal.append(0, b"a")
    assert journal.append(1, b"b")
    assert list(journal.entries()) == [JournalEntry(1, b"a"), JournalEntry(2, b"b")]
    assert journal.newest() == JournalEntry(2, b"b")


def test_whoever_has_not_seen_the_newest_entry_appends_nothing(tmp_path: Path) -> None:
    journal = Journal(open_storage(tmp_path), "log")
    assert journal.append(0, b"a")
    assert not journal.append(0, b"b")
    assert list(journal.entries()) == [JournalEntry(1, b"a")]


def test_a_put_that_was_repeated_after_a_lost_answer_has_appended(tmp_path: Path) -> None:
    journal = Journal(open_storage(tmp_path), "log")
    assert journal.append(0, b"mine")
    assert journal.append(0, b"mine")


def test_of_many_writers_one_appends(tmp_path: Path) -> None:
    journal = Journal(open_storage(tmp_path), "log")
    start = threading.Barrier(8)
    won: list[int] = []

    def write(name: int) -> None:
        start.wait()
        if journal.append(0, str(name).encode()):
            won.append(name)

    threads = [threading.Thread(target=write, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(name).encode() for name in won] == [entry.data for entry in journal.entries()]


def test_other_files_of_the_folder_are_no_entries(tmp_path: Path) -> None:
    journal = Journal(open_storage(tmp_path), "log")
    journal.append(0, b"a")
    (tmp_path / "log" / "note.txt").write_text("x")
    (tmp_path / "log" / ".air-temporary").write_text("x")
    assert journal.numbers() == [1]
