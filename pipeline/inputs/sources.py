"""Finding images: in folders, behind globs, in tars and in Parquet files with image bytes.

A listing reads names and sizes only. Keys depend on an image's path below the input that was given and on nothing
else: not on the machine, the order, or what lies beside it.
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

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, DamagedDataError, Reason, Rejected, StorageError
from pipeline.formats.images import IMAGE_EXTENSIONS
from pipeline.storage.base import Entry, ForbiddenFileError, MissingFileError, Storage
from pipeline.storage.open import open_parent, open_storage
from pipeline.storage.uri import normalise

logger = logging.getLogger(__name__)

_WILDCARDS = re.compile(r"[*?\[]")
_IMAGE_COLUMNS = ("image", "bytes", "image_bytes", "jpg", "jpeg", "png", "webp", "img")


@dataclass(frozen=True)
class Item:
    """Where one encoded image lies.

    Attributes:
        key: Unique and stable: the path below its input without ending, and 8 hex digits of its full name's hash.
        source: The name for people, such as `photos/cat.jpg` or `photos/batch.tar/cat.jpg`.
        root: Position of its input in the list that was given.
        path: The file below that input.
        bytes: Its size; an estimate for a row of Parquet.
        offset: Where its bytes begin in a tar.
        row: Its row in a Parquet file.
    """

    key: str
    source: str
    root: int
    path: str
    bytes: int
    offset: int | None = None
    row: int | None = None


def find_items(inputs: Sequence[str], image_column: str | None = None) -> list[Item]:
    """All images of the inputs, sorted by key.

    Args:
        inputs: Folders, globs, image files, tars and Parquet files; local paths or URIs.
        image_column: Parquet column with the encoded bytes; by default the first known name that is there.

    Raises:
        ConfigError: An input holds no image, or two images would get the same key.
        StorageError: An input cannot be read.
    """
    items: list[Item] = []
    for root, given in enumerate(inputs):
        found = list(_find_in(root, given, image_column))
        if not found:
            endings = ", ".join(sorted(IMAGE_EXTENSIONS))
            raise ConfigError(f"{given} holds no images (files ending in {endings}, .tar or .parquet)")
        items += found
    items.sort(key=lambda item: item.key)
    for one, other in pairwise(items):
        if one.key == other.key and one.root == other.root:
            raise ConfigError(f"{inputs[one.root]} holds {one.source} twice: remove one of them")
        if one.key == other.key:
            raise ConfigError(
                f"{inputs[one.root]} and {inputs[other.root]} both hold {one.source}: "
                "give the folders different names, or shard them separately"
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
                    raise  # named by the user, not met in a folder
                logger.warning("skipped: %s", error)
                continue
            yield from inside
        else:
            skipped[ending or "no ending"] += 1
    if not seen:
        raise missing_input(given)
    if skipped:
        kinds = ", ".join(f"{ending} {count}" for ending, count in skipped.most_common(5))
        logger.info("%s: skipped %d files that are no images, tars or Parquet (%s)", given, skipped.total(), kinds)


def find_file(given: str) -> tuple[Storage, str]:
    """Where a single file lies, and its path there. Raises ConfigError if there is none."""
    storage, name = open_parent(given)
    if not storage.exists(name):
        raise missing_input(given)
    return storage, name


def missing_input(given: str) -> ConfigError:
    """The error for an input where nothing lies."""
    return ConfigError(f"{given} does not exist, or is empty")


def check_outside(output: Storage, inputs: Sequence[str]) -> None:
    """Raises ConfigError for an output in one of the inputs, whose next run would find it there, or around one."""
    for given in inputs:
        if output.uri().startswith(given.rstrip("/") + "/"):
            raise ConfigError(f"the output {output.uri()} lies in the input {given}: choose a folder outside")
        if given.startswith(output.uri().rstrip("/") + "/"):
            raise ConfigError(f"the input {given} lies in the output {output.uri()}: choose a folder outside")


def root_storage(given: str) -> Storage:
    """The storage that the item paths of an input are relative to."""
    return _expand(given)[0]


def _expand(given: str) -> tuple[Storage, str, Callable[[], Iterator[Entry]]]:
    """The storage of an input, the name that stands for it in keys, and what lists its files.

    Listing is left to the caller: it takes long, and workers need the storage alone.
    """
    uri = normalise(given)
    try:
        parent, last = open_parent(uri)
    except StorageError:
        parent, last = open_storage(uri), ""  # a bucket or the root folder has no parent, and is no file
    if last and parent.exists(last):
        return parent, posixpath.basename(parent.uri()), lambda: iter([Entry(last, parent.size(last))])
    folder = open_storage(uri)
    if not _WILDCARDS.search(uri) or next(folder.list(), None):  # a folder may be called `holidays [2020]`
        return folder, posixpath.basename(uri), folder.list
    fixed, pattern = _split_glob(uri)
    above = open_storage(fixed or "/")
    matches = _glob_expression(pattern).fullmatch
    return above, posixpath.basename(fixed), lambda: (entry for entry in above.list() if matches(entry.path))


def _split_glob(uri: str) -> tuple[str, str]:
    """The folder before the first wildcard, and the pattern below it."""
    parts = uri.split("/")
    first = next(index for index, part in enumerate(parts) if _WILDCARDS.search(part))
    return "/".join(parts[:first]), "/".join(parts[first:])


def _glob_expression(pattern: str) -> re.Pattern[str]:
    """As in a shell: `*`, `?` and `[...]` stay within a folder, `**/` crosses folders."""
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
                archive.members = []  # type: ignore[attr-defined]  # a million headers would stay in memory
    except tarfile.TarError as error:
        where = storage.uri(path)
        raise DamagedDataError(f"{where} is not a plain tar: {error} (if it is compressed, unpack it first)") from None


def _find_in_parquet(storage: Storage, root: int, path: str, full: str, image_column: str | None) -> Iterator[Item]:
    try:
        with storage.open(path) as stream:
            file = pq.ParquetFile(stream)
            column = _image_column(file.schema_arrow, storage.uri(path), image_column)
            row = 0
            for group in range(file.metadata.num_row_groups):
                metadata = file.metadata.row_group(group)
                total = sum(
                    metadata.column(index).total_uncompressed_size
                    for index in range(metadata.num_columns)
                    if metadata.column(index).path_in_schema.split(".")[0] == column
                )
                for _ in range(metadata.num_rows):
                    name = f"{full}/{row:09d}"
                    yield Item(_key(name), name, root, path, total // metadata.num_rows, row=row)
                    row += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise DamagedDataError(f"{storage.uri(path)} is not a Parquet file: {error}") from None


def _image_column(schema: pa.Schema, uri: str, wanted: str | None) -> str:
    """The column with encoded images: binary, or a struct with a binary field `bytes` as Hugging Face writes it."""
    candidates = (wanted,) if wanted else _IMAGE_COLUMNS
    for name in candidates:
        if name in schema.names:
            kind = schema.field(name).type
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                kind = kind.field("bytes").type
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return name
    raise ConfigError(
        f"{uri} has no column of image bytes called {' or '.join(candidates)} (columns: {', '.join(schema.names)}); "
        "name it with --image-column"
    )


def _key(full: str) -> str:
    """A WebDataset key out of a path: its last part has no dot, and the hash keeps any two paths apart."""
    stem = posixpath.splitext(full)[0]
    readable = re.sub(r"[^\w/=+-]", "_", stem).strip("_/") or "image"
    return f"{readable}-{hashlib.sha256(full.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


class ItemReader:
    """Reads items' bytes; keeps the last Parquet row group, as items of one unit follow each other."""

    def __init__(self, inputs: Sequence[str], image_column: str | None = None) -> None:
        self._inputs = inputs
        self._image_column = image_column
        self._group: tuple[tuple[int, str, int], pa.ChunkedArray] | None = None
        self._storages: dict[int, Storage] = {}

    def read(self, item: Item) -> bytes:
        """The encoded image.

        Raises:
            Rejected: `missing`: the file was there when the plan was made, and is gone; or the row is null.
                `forbidden`: its permissions do not allow reading it.
            StorageError: It cannot be read for a reason that may pass.
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
                    raise DamagedDataError(f"{storage.uri(item.path)} has shrunk since the plan was made")
                return data
            return storage.read(item.path)
        except MissingFileError:
            raise Rejected(Reason.MISSING, "the file is gone since the plan was made") from None
        except ForbiddenFileError:
            raise Rejected(Reason.FORBIDDEN, "the file's permissions do not allow reading it") from None

    def _read_row(self, storage: Storage, item: Item) -> bytes:
        assert item.row is not None
        if self._group is not None:
            (root, path, first), column = self._group
            if (root, path) == (item.root, item.path) and first <= item.row < first + len(column):
                return self._value(column, item.row - first)
        with storage.open(item.path) as stream:
            file = pq.ParquetFile(stream)
            name = _image_column(file.schema_arrow, storage.uri(item.path), self._image_column)
            first = 0
            for group in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if item.row < first + rows:
                    column = file.read_row_group(group, columns=[name]).column(0)
                    self._group = ((item.root, item.path, first), column)
                    return self._value(column, item.row - first)
                first += rows
        raise DamagedDataError(f"{storage.uri(item.path)} has lost rows since the plan was made")

    @staticmethod
    def _value(column: pa.ChunkedArray, row: int) -> bytes:
        value = column[row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if value is None:
            raise Rejected(Reason.MISSING, "the row holds no image bytes")
        return value
