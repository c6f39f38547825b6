"""`air fit`: one image gives a picture and the PSNR of that picture."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.cli import main


def test_fit_writes_the_render_that_it_reports(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fitted.png"
    assert main(["fit", str(photographs / "astronaut.png"), str(out), "--steps", "30", "--patch-size", "4"]) == 0
    text = capsys.readouterr().out
    first, last = (float(value) for value in re.findall(r"([\d.]+) dB", text))
    original = np.asarray(Image.open(photographs / "astronaut.png"), np.float64)
    fitted = np.asarray(Image.open(out), np.float64)
    assert fitted.shape == original.shape
    psnr = 10 * np.log10(255**2 / np.square(fitted - original).mean())
    assert psnr == pytest.approx(last, abs=0.05)
    assert last > first + 3
    assert text.strip().endswith(str(out))


def test_the_budget_of_gaussians_is_kept(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["fit", str(photographs / "china.jpg"), str(tmp_path / "o.png"), "--gaussians", "150", "--steps", "9"])
        == 0
    )
    counted = re.search(r"([\d,]+) Gaussians", capsys.readouterr().out)
    assert counted is not None
    assert 100 < int(counted[1]) <= 150


def test_without_steps_the_start_is_drawn(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", str(photographs / "china.jpg"), str(tmp_path / "start.png"), "--steps", "0"]) == 0
    first, last = (float(value) for value in re.findall(r"([\d.]+) dB", capsys.readouterr().out))
    assert first == last


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["missing.jpg"], 2, "missing.jpg"),
        (["text.jpg"], 1, "not_an_image"),
        (["fine.png", "out.jpg"], 2, ".png"),
        (["fine.png", "nowhere/out.png"], 1, "nowhere/out.png"),
        (["fine.png", "--steps", "-1"], 2, "steps"),
        (["fine.png", "--gaussians", "9", "--patch-size", "4"], 2, "not both"),
        (["fine.png", "--stepz", "1"], 2, "--stepz"),
        (["fine.png", "--seconds", "0.1", "--steps", "3"], 2, "--seconds"),
        (["fine.png", "--seconds", "0.1", "--patch-size", "4"], 2, "--seconds"),
        (["fine.png", "--rule", "best"], 1, "unknown update rule 'best'"),
        (["fine.png", "--rule", "missing.safetensors"], 1, "missing.json"),
    ],
)
def test_bad_input_is_explained(
    arguments: list[str],
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.jpg").write_text("no picture")
    Image.new("RGB", (16, 16), (200, 10, 10)).save("fine.png")
    assert main(["fit", *arguments]) == status
    assert said in capsys.readouterr().err
