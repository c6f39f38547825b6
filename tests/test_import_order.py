"""The order of the house: a room imports from lower rooms only, and no files import each other in a circle.

Imports inside functions count, too: a lazy import that runs upwards hides a circle, and does not remove it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ORDER = [
    "air.version",
    "air.errors",
    "air.cards",
    "air.defaults",
    "air.vector_math",
    "air.gaussians",
    "air.arguments",
    "air.compute",
    "air.rendering",
    "air.loss",
    "air.metrics",
    "air.codec",
    "air.optimization",
    "air.fitting",
    "air.predictor",
    "air.predictor.compact",
    "air.predictor.dinov3",
    "air.stages",
    "air.encoding",
    "air.warmup",
    "air",
    "air.pillow",
    "pipeline",
    "pipeline.errors",
    "pipeline.config",
    "pipeline.identity",
    "pipeline.logs",
    "pipeline.storage",
    "pipeline.formats",
    "pipeline.work",
    "pipeline.weights",
    "pipeline.registry",
    "pipeline.predictors",
    "pipeline.inputs",
    "pipeline.bulk",
    "pipeline.training",
    "pipeline.rules",
    "pipeline.evaluation",
    "pipeline.retraining",
    "pipeline.reports",
    "jobs",
]
"""Every room, lowest first: a folder, or a file directly in a package. docs/architecture.md draws the same order."""

MAX_FILES = 15
MAX_LINES = 450
MAX_FUNCTION_LINES = 120


def modules_of(root: Path) -> dict[str, Path]:
    """The modules of the three packages by dotted name."""
    found = {}
    for package in ("air", "pipeline", "jobs"):
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def room_of(module: str, is_package: bool) -> str:
    """The room of a module: the innermost entry of ORDER that it lies in; itself where there is none."""
    if module in ORDER and (is_package or "." in module):
        return module
    parts = module.split(".")
    for length in range(len(parts) - 1, 0, -1):
        room = ".".join(parts[:length])
        if room == "jobs" or (room in ORDER and "." in room):
            return room
    return module


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """The project's modules that a module imports, anywhere in it, each with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: line {node.lineno}: write the whole name of what is imported"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [target if target in modules else str(node.module) for target in full]
        else:
            continue
        yield from ((target, node.lineno) for target in targets if target in modules and target != name)


def faults_of(root: Path) -> list[str]:
    """A sentence for each import that breaks the order, and for each circle of files."""
    modules = modules_of(root)
    faults = []
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        room = room_of(name, path.name == "__init__.py")
        if room not in ORDER:
            faults.append(f"{name} is in no room of ORDER")
            continue
        for target, line in imports_of(name, path, modules):
            graph[name].add(target)
            other = room_of(target, modules[target].name == "__init__.py")
            if other in ORDER and ORDER.index(other) > ORDER.index(room):
                faults.append(f"{name} (line {line}) imports {target}: {room} lies below {other}")
    return faults + [f"these files import each other: {', '.join(circle)}" for circle in circles_of(graph)]


def circles_of(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files each of which leads to all others of its group."""

    def reached_from(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = graph[ahead.pop()] - seen
            seen |= new
            ahead.extend(new)
        return seen

    reached = {name: reached_from(name) for name in graph}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def test_no_import_runs_upwards_and_none_in_a_circle() -> None:
    assert faults_of(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        (
            "air/rendering/reference.py",
            "from air.loss.reference import loss",
            "air.rendering.reference (line {line}) imports air.loss.reference: air.rendering lies below air.loss",
        ),
        (
            "air/codec/entropy.py",
            "def late(): import pipeline.errors",
            "air.codec.entropy (line {line}) imports pipeline.errors: air.codec lies below pipeline.errors",
        ),
        (
            "pipeline/storage/uri.py",
            "from jobs import cli",
            "pipeline.storage.uri (line {line}) imports jobs.cli: pipeline.storage lies below jobs",
        ),
        (
            "air/stages/control.py",
            "from air.stages import loop",
            "these files import each other: air.stages.control, air.stages.loop",
        ),
        ("air/nowhere.py", "", "air.nowhere is in no room of ORDER"),
    ],
)
def test_a_line_that_breaks_the_order_is_named(file: str, line: str, fault: str, tmp_path: Path) -> None:
    for name, path in modules_of(ROOT).items():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
        assert name
    broken = tmp_path / file
    broken.touch()
    before = broken.read_text()
    broken.write_text(before + line + "\n")
    assert fault.format(line=len(before.splitlines()) + 1) in faults_of(tmp_path)


def test_no_room_and_no_file_outgrows_its_bounds() -> None:
    files = [path for top in ("air", "pipeline", "jobs", "tests") for path in (ROOT / top).rglob("*.py")]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > MAX_LINES} == {}
    folders = {path.parent for path in files if path.relative_to(ROOT).parts[0] in ("air", "pipeline")}
    files_of = {str(folder): len(list(folder.glob("*.py"))) - 1 for folder in folders}  # __init__.py apart
    assert {folder: count for folder, count in files_of.items() if count > MAX_FILES} == {}
    longest = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno + 1 >= MAX_FUNCTION_LINES
    ]
    assert longest == []


@pytest.mark.parametrize("package", ["air", "pipeline", "jobs"])
def test_every_folder_says_what_it_is_for_and_defines_nothing(package: str) -> None:
    for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
        tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), folder
        if folder.name != "air":  # the package hands on its names lazily
            assert not [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)], folder
