"""The Python and SQL in the documents works on the output of the commands."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

from jobs.distill import distill
from jobs.encode import encode
from pipeline.bulk.distill import DistillConfig
from pipeline.bulk.encode import EncodeConfig
from pipeline.config import RunnerConfig
from pipeline.reports.query import connect
from pipeline.storage.open import open_storage
from tests.support.paths import ROOT

INLINE = RunnerConfig(executor="inline")


@pytest.fixture(scope="module")
def outputs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `encoded` and `targets`, of four photographs in two shards."""
    folder = tmp_path_factory.mktemp("outputs")
    encode([str(shards)], str(folder / "encoded"), EncodeConfig(steps=0, stored_steps=0), INLINE)
    distill(str(shards), str(folder / "targets"), DistillConfig(predictor="grid", stages=2, steps=(4,)), INLINE)
    return folder


def find_code(document: str, language: str, word: str) -> str:
    """The block of code with that word."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    (found,) = [block for block in blocks if word in block]
    return found


@pytest.mark.parametrize("document", ["README.md", "docs/tables.md"])
def test_the_ways_to_read_a_table_give_its_rows(outputs: Path, document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = find_code(document, "python", "read_parquet")
    names = {name: pytest.importorskip(name) for name in ("duckdb", "glob", "pandas", "polars")}
    monkeypatch.chdir(outputs)
    read = 0
    for statement in ast.parse(code).body:
        text = ast.unparse(statement)
        if isinstance(statement, ast.Expr):
            read += 1
            assert len(eval(text, names)) == 4, text
        else:
            exec(text, names)
    assert read >= 3


def test_the_query_for_angles_counts_directions_of_the_longer_axis(outputs: Path) -> None:
    with connect(open_storage(outputs / "targets")) as connection:
        counted = dict(connection.execute(find_code("docs/tables.md", "sql", "target_angle")).fetchall())
        columns = connection.execute("select target_angle, target_scale_1, target_scale_2 from gaussians").fetchnumpy()
    angle, first, second = (columns[f"target_{name}"] for name in ("angle", "scale_1", "scale_2"))
    assert (second > first).any()
    assert (angle > np.pi).any()
    longer = np.degrees(np.where(second > first, angle + np.pi / 2, angle)) % 180
    expected = np.histogram(longer, np.arange(0, 181, 10))[0]
    assert [counted.get(float(degrees), 0) for degrees in range(0, 180, 10)] == expected.tolist()
