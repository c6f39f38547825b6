"""Every example runs as a script on small pictures, and prints what it promises."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import duckdb
import numpy as np
import pytest
from PIL import Image

import air
from air.arguments import image_tensor
from air.metrics import psnr
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"


class Script:
    """Runs an example in a folder of its own, as `python examples/NAME.py ARGUMENTS` does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, name: str, *arguments: object) -> str:
        path = EXAMPLES / f"{name}.py"
        self._monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        self._capsys.readouterr()
        runpy.run_path(str(path), run_name="__main__")
        return self._capsys.readouterr().out


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Script:
    monkeypatch.chdir(tmp_path)
    return Script(monkeypatch, capsys)


def pixels(path: Path) -> np.ndarray:
    """The pixels of an image file, shape (H, W, 3), uint8."""
    return np.asarray(Image.open(path).convert("RGB"))


def test_fit_one_picture(script: Script, photographs: Path, tmp_path: Path) -> None:
    picture, out = photographs / "flower.png", tmp_path / "fitted.png"
    printed = script("fit_one_picture", picture, "--gaussians", 300, "--steps", 20, "--out", out)
    height, width, _ = pixels(picture).shape
    assert pixels(out).shape == (2 * height, 2 * width, 3)
    first, *_, last = map(float, re.findall(r"steps: ([\d.]+) dB", printed))
    assert last > first
    assert f"300 Gaussians for {width} x {height} pixels" in printed


def test_encode_and_decode(script: Script, photographs: Path, tmp_path: Path) -> None:
    picture, out = photographs / "flower.png", tmp_path / "flower.air"
    printed = script("encode_and_decode", picture, "--bpp", 1, 2, "--out", out)
    height, width, _ = pixels(picture).shape
    sizes = [int(size) for size in re.findall(r"bits per pixel: (\d+) bytes", printed)]
    assert [8 * size <= bpp * height * width for size, bpp in zip(sizes, (1, 2), strict=True)] == [True, True]
    assert out.stat().st_size == sizes[-1]
    # The printed quality of the whole file is that of what the file draws.
    image = image_tensor(pixels(picture))
    drawn = air.render(air.decode(out.read_bytes()), height, width)
    assert printed.rstrip().endswith(f"{sizes[-1]} bytes, {psnr(drawn, image):.2f} dB")


def test_targets_in_duckdb_makes_targets_of_its_own(script: Script) -> None:
    pytest.importorskip("sklearn.datasets", reason="the packaged photographs come with scikit-learn")
    pytest.importorskip("skimage.data", reason="the packaged photographs come with scikit-image")
    printed = script("targets_in_duckdb")
    assert "china" in printed
    assert "flower" in printed
    # The canvas is "target", so all target_* columns together draw the picture of the last psnr_target.
    stated = re.search(r"pictures/china-\w+ +(?:│ +\d+ +){4}│ +([\d.]+) +│", printed)
    drawn = re.search(r"drawn, are ([\d.]+) dB", printed)
    assert stated is not None
    assert drawn is not None
    assert float(drawn[1]) == pytest.approx(float(stated[1]), abs=0.011)


def test_train_on_a_folder(script: Script, photographs: Path, tmp_path: Path) -> None:
    printed = script("train_on_a_folder", photographs, "--steps", 3, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "run" / "best.safetensors").exists()
    assert "3 steps in" in printed
    assert re.search(r"astronaut.png: \d+ bytes, Gaussians by stage \[\d+", printed)


def test_own_job(script: Script, pictures: Path, tmp_path: Path) -> None:
    whole = pictures / "0.png"
    (pictures / "cut.png").write_bytes(whole.read_bytes()[:-20])
    printed = script("own_job", pictures, tmp_path / "colours")
    assert "6 rows in 1 unit(s)" in printed
    assert re.search(r"pictures/cut-\w+ +in quarantine: truncated", printed)
    rows = duckdb.sql(f"select * from '{tmp_path}/colours/data/*.parquet' where key like '%/0-%'").fetchall()
    assert rows[0][1:] == pytest.approx(tuple(pixels(whole).reshape(-1, 3).mean(axis=0)))
    # The job resumes: run again, it does nothing and says the same.
    assert script("own_job", pictures, tmp_path / "colours") == printed


def test_the_page_of_examples_shows_each(script: Script) -> None:
    page = (EXAMPLES / "README.md").read_text()
    for path in sorted(EXAMPLES.glob("*.py")):
        assert f"$ python examples/{path.name}" in page
