"""Images in Parquet columns: every type of bytes is read, others are named, and damaged pages cost their rows."""

import errno
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError, DamagedDataError, Rejected, StorageError
from pipeline.inputs.sources import ItemReader, find_items
from tests.support.paths import WILD

DATA = [bytes([n]) * 40 for n in range(6)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
needs_wild = pytest.mark.skipif(not WILD.is_dir(), reason="needs the tables of ../shared/data/wild")


def read_all(file: Path, column: str | None = None) -> dict[str, bytes | str]:
    """Bytes, or the reason why there are none, by place in the file."""
    given = [str(file)]
    reader = ItemReader(given, column)
    found: dict[str, bytes | str] = {}
    for item in find_items(given, column):
        try:
            value: bytes | str = reader.read(item)
        except Rejected as rejection:
            value = str(rejection.reason)
        found[item.source.partition(".parquet/")[2]] = value
    return found


def write(file: Path, column: pa.Array, name: str = "image", **options) -> Path:
    pq.write_table(pa.table({"label": ["x"] * len(column), name: column}), file, **options)
    return file


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(40), pa.dictionary(pa.int32(), pa.binary())),
        *(STRUCT, pa.struct([("path", pa.string()), ("bytes", pa.large_binary())])),
        pa.struct([("bytes", pa.dictionary(pa.int8(), pa.binary()))]),
    ],
    ids=str,
)
def test_a_column_of_single_images(kind: pa.DataType, tmp_path: Path):
    values = [{"bytes": one} for one in DATA] if pa.types.is_struct(kind) else DATA
    if pa.types.is_dictionary(kind):
        column = pa.array(values, pa.binary()).dictionary_encode()
    elif pa.types.is_struct(kind) and pa.types.is_dictionary(kind.field("bytes").type):
        column = pa.StructArray.from_arrays([pa.array(DATA, pa.binary()).dictionary_encode()], ["bytes"])
    else:
        column = pa.array(values, kind)
    found = read_all(write(tmp_path / "table.parquet", column, row_group_size=4))
    assert found == {f"{row:09d}": one for row, one in enumerate(DATA)}


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.binary()), pa.large_list(pa.large_binary()), pa.list_(pa.binary_view()), pa.list_(STRUCT)],
    ids=str,
)
def test_a_column_of_lists(kind: pa.DataType, tmp_path: Path):
    wrap = (lambda one: {"bytes": one}) if pa.types.is_struct(kind.value_type) else (lambda one: one)
    rows = [[DATA[0], DATA[1]], [], None, [DATA[2]], [DATA[3], None, DATA[4]]]
    column = pa.array([row and [one and wrap(one) for one in row] for row in rows], kind)
    found = read_all(write(tmp_path / "table.parquet", column, row_group_size=2))
    assert found == {
        "000000000/000": DATA[0],
        "000000000/001": DATA[1],
        "000000001": "missing",
        "000000002": "missing",
        "000000003/000": DATA[2],
        "000000004/000": DATA[3],
        "000000004/001": "missing",
        "000000004/002": DATA[4],
    }


def test_a_column_of_lists_of_one_length(tmp_path: Path):
    column = pa.array([DATA[:2], DATA[2:4]], pa.list_(pa.binary(), 2))
    assert list(read_all(write(tmp_path / "table.parquet", column)).values()) == DATA[:4]


@pytest.mark.parametrize("name", ["Image", "IMAGE", "JPG"])
def test_a_name_in_another_case(name: str, tmp_path: Path):
    file = write(tmp_path / "table.parquet", pa.array(DATA), name)
    assert list(read_all(file).values()) == DATA
    assert list(read_all(file, name.lower()).values()) == DATA


def test_a_name_in_the_case_that_was_asked_for_goes_first(tmp_path: Path):
    table = pa.table({"Image": [b"wrong"] * 2, "image": DATA[:2]})
    pq.write_table(table, tmp_path / "table.parquet")
    assert list(read_all(tmp_path / "table.parquet").values()) == DATA[:2]
    assert list(read_all(tmp_path / "table.parquet", "Image").values()) == [b"wrong"] * 2


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array(["a.png"]), "image is string"),
        (pa.array([1.5]), "image is double"),
        (pa.array([{"path": "a.png"}]), "image is struct<path: string>"),
        (pa.array([[[b"x"]]]), "image is list<"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_column_of_another_type_is_named_with_its_type(column: pa.Array, kind: str, tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        read_all(write(tmp_path / "table.parquet", column))
    assert kind in str(caught.value)
    assert "--image-column" in str(caught.value)


@pytest.mark.parametrize("names", [["image", "image"], ["Image", "IMAGE"]])
def test_two_columns_of_one_name(names: list[str], tmp_path: Path):
    pq.write_table(pa.Table.from_arrays([pa.array(DATA), pa.array(DATA)], names=names), tmp_path / "table.parquet")
    with pytest.raises(ConfigError, match=r"table\.parquet has 2 columns called"):
        read_all(tmp_path / "table.parquet")
    with pytest.raises(ConfigError, match=r"table\.parquet has 2 columns called"):
        read_all(tmp_path / "table.parquet", "image")


def test_two_other_columns_of_one_name_do_not_matter(tmp_path: Path):
    arrays = [pa.array(DATA), pa.array([1] * 6), pa.array([2] * 6)]
    pq.write_table(pa.Table.from_arrays(arrays, names=["image", "n", "n"]), tmp_path / "table.parquet")
    assert list(read_all(tmp_path / "table.parquet").values()) == DATA


def test_a_page_with_a_wrong_checksum_costs_its_rows(tmp_path: Path):
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    file = write(tmp_path / "table.parquet", pa.array(DATA), row_group_size=3, write_page_checksum=True, **options)
    data = bytearray(file.read_bytes())
    data[data.index(DATA[4]) + 20] ^= 1
    file.write_bytes(data)
    assert list(read_all(file).values()) == [*DATA[:3], "corrupt", "corrupt", "corrupt"]
    given = [str(file)]
    with pytest.raises(Rejected, match=r"table\.parquet: row group 1 \(rows 3 to 5\): .*CRC"):
        ItemReader(given).read(next(item for item in find_items(given) if item.row == 4))


def test_a_page_of_lists_with_a_wrong_checksum_is_damage(tmp_path: Path):
    """Without the page, nobody knows how many images the rows have."""
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    column = pa.array([DATA[:2], DATA[2:]])
    file = write(tmp_path / "table.parquet", column, write_page_checksum=True, **options)
    data = bytearray(file.read_bytes())
    data[data.index(DATA[4]) + 20] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedDataError, match=r"table\.parquet .*CRC"):
        read_all(file)


@pytest.mark.parametrize("broken", ["ParquetFile", "read_row_group"])
def test_an_error_of_the_disk_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str):
    """It may pass, so it is neither quarantine nor the end of the unit."""
    given = [str(write(tmp_path / "table.parquet", pa.array(DATA)))]
    (item, *_) = find_items(given)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pq if broken == "ParquetFile" else pq.ParquetFile, broken, fail)
    with pytest.raises(StorageError, match=r"cannot read .*table\.parquet: Input/output error"):
        ItemReader(given).read(item)


@needs_wild
@pytest.mark.parametrize(("name", "count"), [("view", 2), ("dict", 2), ("caps", 2), ("crc", 4)])
def test_wild_tables_are_read(name: str, count: int):
    found = read_all(WILD / f"{name}.parquet")
    assert len(found) == count
    assert all(isinstance(value, bytes) for value in found.values())


@needs_wild
def test_wild_table_with_two_columns_of_one_name():
    with pytest.raises(ConfigError, match="2 columns called image and image"):
        read_all(WILD / "dupcol.parquet")
