"""docs/architecture.md draws the rooms in the order that is held, and its flows name what exists."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.paths import ROOT
from tests.test_import_order import ORDER

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^ +((?:air|pipeline|jobs)/[\w/]+\.py) +(\w+)(?=\W)", PAGE, re.MULTILINE)
"""The file and the function or class of every line of the five flows."""


def test_the_page_lists_the_rooms_in_their_order() -> None:
    rooms = re.findall(r"^\| `([\w.]+)` \|", PAGE, re.MULTILINE)
    assert rooms == ORDER


def test_the_five_flows_are_there() -> None:
    flows = PAGE.partition("## The five flows")[2].partition("\n## ")[0]
    assert re.findall(r"^### (\w+)$", flows, re.MULTILINE) == ["Shard", "Distill", "Train", "Encode", "Decode"]
    assert len(STEPS) >= 50


@pytest.mark.parametrize(("file", "name"), sorted(set(STEPS)))
def test_what_a_flow_passes_is_defined_there(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert name in defined
