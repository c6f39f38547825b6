"""Images in the columns of Parquet files: which column holds them, how many each row has, and their bytes.

A column may be of any type that holds bytes: binary, large_binary, binary_view, fixed_size_binary, a dictionary of
them, a struct with a field `bytes` (which Hugging Face writes), or a list of any of these.

This module must not know how inputs are found or what keys images have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, DamagedDataError, Reason, Rejected, StorageError

IMAGE_COLUMNS = ("image", "bytes", "image_bytes", "jpg", "jpeg", "png", "webp", "img")
"""Names of columns that are taken for images where none is named, first come first; any case."""

_BYTES: tuple[Callable[[pa.DataType], bool], ...] = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)
_LISTS: tuple[Callable[[pa.DataType], bool], ...] = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def image_places(stream: BinaryIO, uri: str, wanted: str | None) -> Iterator[tuple[int, int | None, int]]:
    """The place of every image of a file. Reads the images' bytes only where the column has lists.

    Args:
        stream: The file.
        uri: Its name in messages.
        wanted: The column; None takes the first known name.

    Yields:
        The row, the position in the row's list (None where the column has no lists or the list is empty), and about how
        many bytes the image has.

    Raises:
        ConfigError: There is no such column, its type holds no bytes, or the name is ambiguous.
        DamagedDataError: The file is not a whole Parquet file.
        StorageError: The file cannot be read for another reason, which may pass.
    """
    with _naming_damage(uri):
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        name = _image_column(file.schema_arrow, uri, wanted)
        in_lists = _is_list(file.schema_arrow.field(name).type)
        row = 0
        for group in range(file.metadata.num_row_groups):
            metadata = file.metadata.row_group(group)
            total = sum(
                metadata.column(index).total_uncompressed_size
                for index in range(metadata.num_columns)
                if metadata.column(index).path_in_schema.split(".")[0] == name
            )
            if not in_lists:
                for _ in range(metadata.num_rows):
                    yield row, None, total // metadata.num_rows
                    row += 1
                continue
            lengths = [
                length or 0
                for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[name])
                for length in compute.call_function("list_value_length", [batch.column(0)]).to_pylist()
            ]
            about = total // max(1, sum(lengths))
            for length in lengths:
                yield from ((row, position if length else None, about) for position in range(max(1, length)))
                row += 1


class ImageRows:
    """A row group in memory, whose images are read.

    Args:
        stream: The file.
        uri: Its name in messages.
        wanted: The column as it was given to `image_places`.
        row: A row of the group.

    Attributes:
        first: The group's first row.
        count: The number of its rows.

    Raises:
        ConfigError: As `image_places` does.
        DamagedDataError: The file is no whole Parquet file, or has lost rows.
        StorageError: The file cannot be read for another reason, which may pass.
    """

    def __init__(self, stream: BinaryIO, uri: str, wanted: str | None, row: int) -> None:
        with _naming_damage(uri):
            file = pq.ParquetFile(stream, page_checksum_verification=True)
        name = _image_column(file.schema_arrow, uri, wanted)
        self.first = 0
        for group in range(file.metadata.num_row_groups):
            self.count = file.metadata.row_group(group).num_rows
            if row < self.first + self.count:
                break
            self.first += self.count
        else:
            raise DamagedDataError(f"{uri} has lost rows since the plan was made; restore the file")
        self._damage = ""
        self._column: pa.ChunkedArray | None = None
        try:
            self._column = file.read_row_group(group, columns=[name]).column(0)
        except (pa.ArrowException, OSError) as error:
            _check_disk(uri, error)
            self._damage = f"{uri}: row group {group} (rows {self.first} to {self.first + self.count - 1}): {error}"

    def image(self, row: int, position: int | None) -> bytes:
        """The bytes of an image; `row` and `position` as `image_places` gives them.

        Raises:
            Rejected: `corrupt`: the row group's pages are damaged. `missing`: there are no bytes.
        """
        if self._column is None:
            raise Rejected(Reason.CORRUPT, self._damage)
        value: Any = self._column[row - self.first].as_py()
        if isinstance(value, list):
            value = value[position] if position is not None and position < len(value) else None
        if isinstance(value, dict):
            where = next((value[key] for key in value if key.lower() == "path"), None)
            value = next((value[key] for key in value if key.lower() == "bytes"), None)
            if value is None and where:
                raise Rejected(Reason.MISSING, f"the row holds no image bytes, only the path {where}")
        if value is None:
            raise Rejected(Reason.MISSING, "the row holds no image bytes")
        return value


def _image_column(schema: pa.Schema, uri: str, wanted: str | None) -> str:
    """The column with encoded images. A name in another case is found, too."""
    candidates = (wanted,) if wanted else IMAGE_COLUMNS
    unreadable = []
    for candidate in candidates:
        exact = [name for name in schema.names if name == candidate]
        found = exact or [name for name in schema.names if name.lower() == candidate.lower()]
        readable = []
        for name in dict.fromkeys(found):
            kinds = [schema.field(index).type for index in schema.get_all_field_indices(name)]
            readable += [name for kind in kinds if _holds_bytes(kind)]
            unreadable += [f"{name} is {kind}" for kind in kinds if not _holds_bytes(kind)]
        if readable and len(found) > 1:
            raise ConfigError(
                f"{uri} has {len(found)} columns called {' and '.join(found)}; write the table again with one of them, "
                "or name another one with --image-column"
            )
        if readable:
            return readable[0]
    seen = f"; {', '.join(unreadable)}, which holds no bytes" if unreadable else ""
    raise ConfigError(
        f"{uri} has no column of image bytes called {' or '.join(candidates)}{seen} "
        f"(columns: {', '.join(schema.names)}); name it with --image-column"
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if _is_list(kind):
        kind = kind.value_type
        return not _is_list(kind) and _holds_bytes(kind)
    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return any(field.name.lower() == "bytes" and _is_bytes(field.type) for field in fields)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(test(kind) for test in _BYTES)


def _is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in _LISTS)


@contextmanager
def _naming_damage(uri: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        _check_disk(uri, error)
        raise DamagedDataError(f"{uri} is not a Parquet file: {error}") from None


def _check_disk(uri: str, error: Exception) -> None:
    """Tells an error of the disk or the network from one of the file's content, which has no number.

    Raises:
        StorageError: It is the disk's.
    """
    if isinstance(error, OSError) and error.errno is not None:
        raise StorageError(f"cannot read {uri}: {error.strerror or error}") from None
