"""`air demo` on little data: the last line is the path of a picture."""

from pathlib import Path

import pytest
from PIL import Image

from jobs.cli import main
from tests.support.paths import ROOT

SMALL = """
demo: {pictures: 2}
shard: {max_count: 1}
distill: {stages: 2, steps: [5], min_view_pixels: 20000, max_view_pixels: 20000}
runner: {executor: inline}
"""


def test_demo_ends_with_the_path_of_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skimage", reason="the pictures come with scikit-image")
    pytest.importorskip("sklearn", reason="two pictures come with scikit-learn")
    (tmp_path / "small.yaml").write_text(SMALL)
    assert main(["demo", str(tmp_path / "out"), "--config", str(tmp_path / "small.yaml")]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    picture = Path(lines[-1])
    assert picture == tmp_path / "out" / "contact-sheet.png"
    with Image.open(picture) as sheet:
        assert sheet.width > sheet.height > 300
    shown = "\n".join(lines)
    for command in ("air shard", "air distill", "air verify", "air stats"):
        assert f"$ {command} " in shown
    assert "complete and intact" in shown


@pytest.mark.parametrize("name", ["demo", "single-machine", "cluster"])
def test_the_shipped_configurations_are_valid(name: str) -> None:
    from jobs.sections import sections
    from pipeline.config import read_sections

    assert read_sections(ROOT / "configs" / f"{name}.yaml", sections())
