"""What the documents tell people to type works, and what they name exists."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.cli import COMMANDS
from jobs.distill import distill
from jobs.encode import encode
from pipeline.bulk.distill import DistillConfig
from pipeline.bulk.encode import EncodeConfig
from pipeline.config import RunnerConfig
from pipeline.reports.query import connect
from pipeline.storage.open import open_storage
from tests.support.paths import ROOT

INLINE = RunnerConfig(executor="inline")

FOLDERS = ("air", "benchmarks", "configs", "docs", "examples", "jobs", "pipeline", "tests")
"""Where the repository's files are: a path that begins with one of these names is a file of the repository."""

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")))
)


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
def test_the_ways_to_read_a_table_print_its_rows(outputs: Path, document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block runs as a script: it imports what it uses, and prints each table."""
    code = find_code(document, "python", "read_parquet")
    for name in ("duckdb", "pandas", "polars"):
        pytest.importorskip(name)
    monkeypatch.chdir(outputs)
    printed: list[Any] = []
    exec(code, {"print": printed.append})
    assert [len(table) for table in printed] == [4] * code.count("print(")
    assert len(printed) >= 3
    assert all(str(table) for table in printed)


def test_the_query_for_angles_counts_directions_of_the_longer_axis(outputs: Path) -> None:
    with connect(open_storage(outputs / "targets")) as connection:
        counted = dict(connection.execute(find_code("docs/tables.md", "sql", "target_angle")).fetchall())
        columns = connection.execute("select target_angle, target_scale_1, target_scale_2 from gaussians").fetchnumpy()
    angle, first, second = (columns[f"target_{name}"] for name in ("angle", "scale_1", "scale_2"))
    assert (second > first).any()
    assert (angle > np.pi).any()
    assert ((angle >= 0) & (angle <= 2 * np.pi)).all()
    longer = np.degrees(np.where(second > first, angle + np.pi / 2, angle)) % 180
    expected = np.histogram(longer, np.arange(0, 181, 10))[0]
    assert [counted.get(float(degrees), 0) for degrees in range(0, 180, 10)] == expected.tolist()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    """Relative links lead to files, and their anchors to headings."""
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text()):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), f"{document} links to {target}"
        if anchor:
            assert anchor in anchors_of(path), f"{document} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    named = re.findall(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)", text)
    lost = [name for name in named if not (ROOT / name).exists()]
    assert not lost, f"{document} names files that are not there"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_name_of_the_package_exists(document: str) -> None:
    """Modules, functions and classes, such as `air.fit`, and the keys of file metadata, such as `air.plan`."""
    text = (ROOT / document).read_text()
    named = set(re.findall(r"(?<![\w./-])((?:air|pipeline|jobs)(?:\.[A-Za-z_]\w*)+)(?![\w/*-])", text))
    for module, names in re.findall(r"^from (\S+) import ([\w, ]+)", text, re.MULTILINE):
        if module.split(".")[0] in FOLDERS:
            named.update(f"{module}.{name.strip()}" for name in names.split(","))
    sources = "".join(path.read_text() for folder in ("pipeline", "jobs") for path in (ROOT / folder).rglob("*.py"))
    lost = sorted(name for name in named if f'"{name}"' not in sources and not is_importable(name))
    assert not lost, f"{document} names things that are not there"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_option_that_is_named_exists(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each `--option` of a command that a document spells out is an option of that command."""
    for command, rest in re.findall(r"\bair ([a-z-]+)\b([^`\n]*)", (ROOT / document).read_text()):
        options = re.findall(r"(?<!\S)--[a-z][a-z-]+", rest.partition("#")[0].partition("&&")[0])
        if options and command in COMMANDS:
            unknown = set(options) - options_of(command, rest, capsys)
            assert not unknown, f"{document} names options that `air {command}` does not have"


def anchors_of(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_importable(name: str) -> bool:
    """Whether the dotted name leads to a module, or to something that a module or a class holds."""
    first, *rest = name.split(".")
    found: Any = import_module(first)
    for number, part in enumerate(rest):
        if not hasattr(found, part):  # not before: importing a module named like a function would replace the function
            try:
                import_module(".".join([first, *rest[: number + 1]]))
            except ModuleNotFoundError:
                return False
        found = getattr(found, part)
    return True


def options_of(command: str, rest: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The long options that the help of a command lists; `rest` of the line may choose another set of options."""
    chosen = re.findall(r"--rule \S+|--phase rule", rest)
    if command == "registry":
        chosen = rest.split()[:1]
    if command == "submit":  # its own options, and those of the command that it submits
        submitted, _, others = rest.strip().partition(" ")
        if submitted:
            return options_of("submit", "", capsys) | options_of(submitted, others, capsys)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        import_module(f"jobs.{command.replace('-', '_')}").main([*" ".join(chosen).split(), "--help"])
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out))
    sent, _, sent_rest = rest.strip().partition(" ")
    return options | options_of(sent, sent_rest, capsys) if command == "submit" and sent in COMMANDS else options
