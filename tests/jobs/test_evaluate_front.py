"""`air evaluate --front`: a table, a plot, and refusals before anything is measured."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from pipeline.evaluation.front import means
from pipeline.formats import tables

STEPS = (0, 4)


@pytest.fixture(scope="module")
def written(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the table and the plot that the command wrote, of two photographs and a broken one."""
    out = tmp_path_factory.mktemp("front")
    folder = out / "pictures"
    folder.mkdir()
    for name in ("astronaut.png", "chelsea.jpg"):
        (folder / name).write_bytes((photographs / name).read_bytes())
    (folder / "broken.png").write_bytes((photographs / "astronaut.png").read_bytes()[:500])
    files = ["--output", str(out / "front.parquet"), "--plot", str(out / "front.svg")]
    steps = ",".join(map(str, STEPS))
    assert main(["evaluate", str(folder), "--front", "--gaussians", "300", "--steps", steps, *files]) == 0
    return out


def lines_of(printed: str) -> list[list[str]]:
    """The cells of the table, without its heading."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]


def test_there_is_a_row_for_every_image_step_and_method_in_turns(written: Path) -> None:
    table = pq.read_table(written / "front.parquet")
    assert table.schema.equals(tables.FRONT, check_metadata=False)
    metadata = table.schema.metadata
    methods = json.loads(metadata[b"air.methods"])
    network, adam, shipped, grid = methods
    assert methods[network] == network
    assert network.startswith("compact:")
    assert methods[adam] == "adam"
    assert methods[shipped].startswith("rule:")
    assert methods[grid] == "grid"
    rows = table.to_pylist()
    assert [(row["steps"], row["method"]) for row in rows] == 2 * [(count, name) for count in STEPS for name in methods]
    assert json.loads(metadata[b"air.config"])["steps"] == list(STEPS)
    for key in {row["key"] for row in rows}:
        counts = {row["num_gaussians"] for row in rows if row["key"] == key and row["method"] != grid}
        assert len(counts) == 1
        assert 0 < counts.pop() <= 300


def test_the_plot_has_a_curve_for_every_method_in_three_charts(written: Path) -> None:
    root = ElementTree.parse(written / "front.svg").getroot()
    words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    methods = set(pq.read_table(written / "front.parquet")["method"].to_pylist())
    assert len(methods) == 4
    assert all(words.count(name) == 3 for name in methods)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 3 * len(methods) * len(STEPS)


def test_the_means_are_printed_and_the_front_is_marked(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "astronaut.png").write_bytes((photographs / "astronaut.png").read_bytes())
    (tmp_path / "broken.png").write_bytes((photographs / "astronaut.png").read_bytes()[:500])
    out = tmp_path / "front.parquet"
    options = ["--predictor", "grow", "--rules", "adam", "--steps", "0,12", "--gaussians", "200"]
    assert main(["evaluate", str(tmp_path), "--front", *options, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "means over 1 image " in printed
    assert "1 skipped (" in printed
    assert "broken.png" in caplog.text
    lines = lines_of(printed)
    mean = means(pq.read_table(out).to_pylist())
    assert [(line[0], int(line[1]), line[2]) for line in lines] == [
        (method, steps, f"{figures['psnr']:.2f}") for (method, steps), figures in mean.items()
    ]
    best = max(mean, key=lambda group: mean[group]["psnr"])
    marked = {(line[0], int(line[1])) for line in lines if line[-1] == "*"}
    assert best in marked
    assert min(mean, key=lambda group: mean[group]["cpu_seconds"]) in marked


def test_options_come_from_the_section_front_of_a_file(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "front.yaml").write_text("front:\n  predictor: grid\n  steps: 1\n  rules: [auto]\n  baseline: false\n")
    picture = str(photographs / "chelsea.jpg")
    assert main(["evaluate", "--config", str(tmp_path / "front.yaml"), "--front", "--gaussians", "90", picture]) == 0
    printed = capsys.readouterr().out
    assert [(method, steps, count) for method, steps, _, _, _, count, *_ in lines_of(printed)] == [
        ("grid", "1", "90"),
        ("growing, auto", "1", "90"),
    ]


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--front", "--codec"], 2, "unrecognized arguments: --codec"),
        (["--front", "--refine", "1"], 2, "unrecognized arguments: --refine"),
        (["--rules", "adam"], 2, "unrecognized arguments: --rules"),
        (["--front", "--steps", "10,5"], 2, "steps must rise"),
        (["--front", "--rules", "adam,adam"], 2, "rules must be one or more rules, without repetition"),
        (["--front", "--rules", "best"], 1, "unknown update rule 'best'"),
        (["--front", "--predictor", "best"], 1, "unknown predictor 'best': give grid, grow, compact or"),
        (["--front", "--plot", "front.png"], 2, "front.png: the plot is an SVG file"),
        (["--front", "--output", "front.csv"], 2, "front.csv: the table is one Parquet file"),
        (["--plot", "front.svg"], 2, "--plot: only with --codec or --front"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_is_measured(
    photographs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    status: int,
    said: str,
) -> None:
    monkeypatch.setattr("jobs.measuring.find_pictures", lambda *_: pytest.fail("it measures"))
    assert main(["evaluate", str(photographs), *options]) == status
    assert said in capsys.readouterr().err
