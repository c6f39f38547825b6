"""Finds images in folders, globs, tars and Parquet files, and reads their bytes.

Finding reads names and sizes only. An image's key depends on the image's path below the input and on nothing else: not
on the machine, the order of inputs, or neighbouring files. This module must not decode images.
"""

from __future__ import annotations

import hashlib
import io
import logging
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.errors import ConfigError, DamagedDataError, Reason, Rejected, StorageError
from pipeline.formats.images import IMAGE_EXTENSIONS
from pipeline.inputs.parquet import ImageRows, image_places
from pipeline.storage.base import Entry, ForbiddenFileError, MissingFileError, Storage
from pipeline.storage.open import open_parent, open_storage
from pipeline.storage.uri import normalise

logger = logging.getLogger(__name__)

_WILDCARDS = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Item:
    """The place of one encoded image.

    Attributes:
        key: Unique and stable: the path below the input without ending, and 8 hex digits of the hash of `source`.
        source: The name for people, such as `photos/cat.jpg` or `photos/batch.tar/cat.jpg`.
        root: Position of the image's input in the list of inputs.
        path: Path of the file, below the input's storage.
        bytes: Size of the image; an estimate if it is a row of a Parquet file.
        offset: First byte of the image in a tar; None elsewhere.
        row: Row of the image in a Parquet file; None elsewhere.
        position: Position of the image in the row's list, where the column has lists; None elsewhere.
    """

    key: str
    source: str
    root: int
    path: str
    bytes: int
    offset: int | None = None
    row: int | None = None
    position: int | None = None


def find_items(inputs: Sequence[str], image_column: str | None = None) -> list[Item]:
    """All images of the inputs, sorted by key.

    Args:
        inputs: Folders, globs, image files, tars and Parquet files; local paths or URIs.
        image_column: Parquet column with the encoded bytes; None takes the first known name.

    Raises:
        ConfigError: An input has no images, or two images have one key.
        StorageError: An input cannot be read.
    """
    items: list[Item] = []
    for root, given in enumerate(inputs):
        found = list(_find_in(root, given, image_column))
        if not found:
            endings = ", ".join(sorted(IMAGE_EXTENSIONS))
            raise ConfigError(f"{given} holds no images; give files ending in {endings}, .tar or .parquet")
        items += found
    items.sort(key=lambda item: item.key)
    for one, other in pairwise(items):
        if one.key == other.key and one.root == other.root:
            raise ConfigError(f"{inputs[one.root]} holds {one.source} twice; remove one of them")
        if one.key == other.key:
            raise ConfigError(
                f"{inputs[one.root]} and {inputs[other.root]} both hold {one.source}; "
                "give the folders different names, or run the job on each separately"
            )
    return items


def _find_in(root: int, given: str, image_column: str | None) -> Iterator[Item]:
    storage, name, list_files = _expand(given)
    skipped: Counter[str] = Counter()
    seen = False
    for path, size in list_files():
        seen = True
        ending = posixpath.splitext(path)[1].lower()
        full = posixpath.join(name, path)
        if ending in IMAGE_EXTENSIONS:
            yield Item(_key(full), full, root, path, size)
        elif ending in (".tar", ".parquet"):
            try:
                inside = list(
                    _find_in_tar(storage, root, path, full)
                    if ending == ".tar"
                    else _find_in_parquet(storage, root, path, full, image_column)
                )
            except (ConfigError, DamagedDataError) as error:
                if storage.uri(path) == normalise(given):
                    raise  # the user named this file; in a folder it is skipped
                logger.warning("skipped: %s", error)
                continue
            yield from inside
        else:
            skipped[ending or "no ending"] += 1
    if not seen:
        raise missing_input(given)
    if skipped:
        kinds = ", ".join(f"{ending} {count}" for ending, count in skipped.most_common(5))
        logger.info("%s: skipped %d files that are not images, tars or Parquet (%s)", given, skipped.total(), kinds)


def find_file(given: str) -> tuple[Storage, str]:
    """The storage of a single file, and the file's path in the storage.

    Raises:
        ConfigError: The file does not exist.
    """
    storage, name = open_parent(given)
    if not storage.exists(name):
        raise missing_input(given)
    return storage, name


def missing_input(given: str) -> ConfigError:
    """The error for an input that does not exist."""
    return ConfigError(f"{given} does not exist, or is empty; check the path")


def check_outside(output: Storage, inputs: Sequence[str]) -> None:
    """Checks that the output lies outside the inputs, as the next run would take it for input, and not around them.

    Raises:
        ConfigError: The output lies in an input, or an input lies in the output.
    """
    for given in inputs:
        if output.uri().startswith(given.rstrip("/") + "/"):
            raise ConfigError(f"the output {output.uri()} lies in the input {given}; choose a folder outside")
        if given.startswith(output.uri().rstrip("/") + "/"):
            raise ConfigError(f"the input {given} lies in the output {output.uri()}; choose a folder outside")


def root_storage(given: str) -> Storage:
    """The storage of an input. The paths of its items are relative to this storage's root."""
    return _expand(given)[0]


def _expand(given: str) -> tuple[Storage, str, Callable[[], Iterator[Entry]]]:
    """The storage of an input, the input's name in keys, and a function that lists the input's files.

    The caller lists the files if it needs them: listing takes long, and workers need the storage alone.
    """
    uri = normalise(given)
    try:
        parent, last = open_parent(uri)
    except StorageError:
        parent, last = open_storage(uri), ""  # a bucket or the root folder has no parent and is not a file
    if last and parent.exists(last):
        return parent, posixpath.basename(parent.uri()), lambda: iter([Entry(last, parent.size(last))])
    folder = open_storage(uri)
    glob = split_glob(uri)
    if glob is None or next(folder.list(), None):  # a folder may have the name `holidays [2020]`
        return folder, posixpath.basename(uri), folder.list
    above, matches = glob
    name = posixpath.basename(above.uri().rstrip("/"))
    return above, name, lambda: (entry for entry in above.list() if matches(entry.path))


def split_glob(uri: str) -> tuple[Storage, Callable[[str], object]] | None:
    """The folder before the first wildcard, and what tells whether a path below it matches; None without wildcards."""
    parts = uri.split("/")
    first = next((index for index, part in enumerate(parts) if _WILDCARDS.search(part)), None)
    if first is None:
        return None
    matches = _glob_expression("/".join(parts[first:])).fullmatch
    return open_storage("/".join(parts[:first]) or "/"), matches


def _glob_expression(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob as in a shell: `*`, `?` and `[...]` match within a folder, `**/` any folders."""
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    return re.compile(
        "".join(
            meanings.get(token) or (token.replace("[!", "[^") if token.startswith("[") else re.escape(token))
            for token in tokens
        )
    )


def _find_in_tar(storage: Storage, root: int, path: str, full: str) -> Iterator[Item]:
    try:
        with storage.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                if member.isreg() and posixpath.splitext(member.name)[1].lower() in IMAGE_EXTENSIONS:
                    name = posixpath.join(full, member.name.removeprefix("./"))
                    yield Item(_key(name), name, root, path, member.size, offset=member.offset_data)
                archive.members = []  # type: ignore[attr-defined]  # else a million headers stay in memory
    except tarfile.TarError as error:
        where = storage.uri(path)
        raise DamagedDataError(f"{where} is not a plain tar: {error}; if it is compressed, unpack it first") from None


def _find_in_parquet(storage: Storage, root: int, path: str, full: str, image_column: str | None) -> Iterator[Item]:
    with storage.open(path) as stream:
        for row, position, size in image_places(stream, storage.uri(path), image_column):
            name = f"{full}/{row:09d}" if position is None else f"{full}/{row:09d}/{position:03d}"
            yield Item(_key(name), name, root, path, size, row=row, position=position)


def _key(full: str) -> str:
    """The WebDataset key of a path: the last part has no dot, and the hash keeps any two paths apart."""
    stem = posixpath.splitext(full)[0]
    readable = re.sub(r"[^\w/=+-]", "_", stem).strip("_/") or "image"
    return f"{readable}-{hashlib.sha256(full.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


class ItemReader:
    """Reads the bytes of items. Keeps the last Parquet row group, as the items of a unit are mostly neighbours.

    Args:
        inputs: The inputs as they were given to `find_items`.
        image_column: The column as it was given to `find_items`.
    """

    def __init__(self, inputs: Sequence[str], image_column: str | None = None) -> None:
        self._inputs = inputs
        self._image_column = image_column
        self._rows: tuple[int, str, ImageRows] | None = None
        self._storages: dict[int, Storage] = {}

    def read(self, item: Item) -> bytes:
        """The encoded image.

        Raises:
            Rejected: `missing`: the file was deleted after the plan was made, or the row is null. `forbidden`: the
                file's permissions do not allow reading it. `corrupt`: the row's pages do not fit their checksums.
            DamagedDataError: The tar or Parquet file is shorter than when the plan was made.
            StorageError: The file cannot be read for another reason, which may pass.
        """
        if item.root not in self._storages:
            self._storages[item.root] = root_storage(self._inputs[item.root])
        storage = self._storages[item.root]
        try:
            if item.row is not None:
                return self._read_row(storage, item)
            if item.offset is not None:
                with storage.open(item.path) as stream:
                    stream.seek(item.offset, io.SEEK_SET)
                    data = stream.read(item.bytes)
                if len(data) != item.bytes:
                    raise DamagedDataError(
                        f"{storage.uri(item.path)} has shrunk since the plan was made; restore the file"
                    )
                return data
            return storage.read(item.path)
        except MissingFileError:
            raise Rejected(Reason.MISSING, "the file was deleted after the plan was made") from None
        except ForbiddenFileError:
            raise Rejected(Reason.FORBIDDEN, "the file's permissions do not allow reading it") from None

    def _read_row(self, storage: Storage, item: Item) -> bytes:
        assert item.row is not None
        if self._rows is not None:
            root, path, rows = self._rows
            if (root, path) == (item.root, item.path) and rows.first <= item.row < rows.first + rows.count:
                return rows.image(item.row, item.position)
        with storage.open(item.path) as stream:
            rows = ImageRows(stream, storage.uri(item.path), self._image_column, item.row)
        self._rows = (item.root, item.path, rows)
        return rows.image(item.row, item.position)
