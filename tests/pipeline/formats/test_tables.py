"""The tables' promises: documented columns, units in the file, encodings that keep every bit."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import Reason
from pipeline.formats import tables
from tests.support.paths import ROOT

DOCUMENT = ROOT / "docs" / "tables.md"


@pytest.mark.parametrize(
    "schema",
    [
        tables.TARGETS,
        tables.ROLL_OUTS,
        tables.QUARANTINE,
        tables.EVALUATION,
        tables.CODEC_EVALUATION,
        tables.FRONT,
        tables.ENCODED_WITH_FILES,
    ],
    ids=["targets", "roll-outs", "quarantine", "evaluation", "codec-evaluation", "front", "encoded"],
)
def test_every_column_is_documented_with_its_type_and_unit(schema: pa.Schema) -> None:
    text = DOCUMENT.read_text()
    for field in schema:
        nested = pa.types.is_list(field.type)
        kind = f"list of {described(field.type.value_type)}" if nested else str(field.type)
        assert f"| {field.name} | {kind} | {field.metadata[b'unit'].decode()} |" in text


def described(kind: pa.DataType) -> str:
    """The type of a list's entries, as the document has it."""
    return f"{kind.list_size} {kind.value_type}" if isinstance(kind, pa.FixedSizeListType) else str(kind)


def test_the_table_of_reasons_is_the_enum() -> None:
    table = DOCUMENT.read_text().partition("| reason | what was found |")[2].partition("\n## ")[0]
    assert re.findall(r"^\| (\w+) \|", table, re.MULTILINE) == list(Reason)


def test_the_readme_lists_every_reason() -> None:
    items = re.split(r"\n(?=- |\n)", (ROOT / "README.md").read_text())
    (item,) = (item for item in items if f"`{Reason.NOT_AN_IMAGE}`" in item)
    assert re.findall(r"`(\w+)`", item) == list(Reason)


def test_a_file_keeps_values_units_and_metadata(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    row = {}
    for field in tables.TARGETS:
        if pa.types.is_list(field.type):
            kind = field.type.value_type.to_pandas_dtype()
            row[field.name] = (random.normal(size=1000) * 50).astype(kind)
        elif pa.types.is_integer(field.type):
            row[field.name] = 7
        else:
            row[field.name] = "x" if pa.types.is_string(field.type) else bytes(range(256))
    table = pa.Table.from_pylist([row, row], schema=tables.stamped(tables.TARGETS, {"air.plan": "abc"}))
    path = tmp_path / "table.parquet"
    with tables.open_writer(str(path), table.schema) as writer:
        writer.write_table(table)
    back = pq.read_table(path)
    assert back.equals(table)
    assert back.schema.field("target_x").metadata[b"unit"].startswith(b"per Gaussian: pixels")
    assert back.schema.metadata[b"air.plan"] == b"abc"
    assert back.schema.metadata[b"air.schema_version"] == str(tables.SCHEMA_VERSION).encode()
    encodings = pq.read_metadata(path).row_group(0)
    floats = [
        encodings.column(index)
        for index in range(encodings.num_columns)
        if encodings.column(index).path_in_schema.startswith("target_")
    ]
    assert len(floats) == len(tables.GAUSSIAN_QUANTITIES)
    assert all("BYTE_STREAM_SPLIT" in column.encodings for column in floats)
    assert all(column.compression == "ZSTD" for column in floats)
