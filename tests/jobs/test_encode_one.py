"""`air encode IMAGE OUT.air`: one image becomes one file, the same file as in bulk; other inputs are refused."""

import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import air
from jobs.cli import main
from pipeline.storage.open import open_storage

QUICK = ["--steps", "4", "--stored-steps", "2"]


def said_in(text: str, pattern: str) -> float:
    """The number that the pattern captures."""
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1].replace(",", ""))


@pytest.mark.parametrize("target", [["--bpp", "1"], []], ids=["grown", "predicted"])
def test_one_image_gives_the_file_that_bulk_gives(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: list[str]
) -> None:
    image, out = photographs / "china.jpg", tmp_path / "new" / "china.air"
    assert main(["encode", str(image), str(out), *QUICK, *target]) == 0
    said = capsys.readouterr().out
    options = [*QUICK, *target, "--executor", "inline"]
    assert main(["encode", str(image), str(tmp_path / "bulk"), *options]) == 0
    with tarfile.open(next((tmp_path / "bulk" / "data").glob("*.tar"))) as archive:
        stream = archive.extractfile(archive.getmembers()[0])
        assert stream is not None
        assert out.read_bytes() == stream.read()
    assert list(out.parent.iterdir()) == [out]
    height, width, _ = np.asarray(Image.open(image)).shape
    assert f"{width} x {height} pixels" in said
    assert said_in(said, r"([\d,]+) bytes") == out.stat().st_size
    assert said_in(said, r"([\d,]+) Gaussians") == len(air.decode(out.read_bytes()))
    assert said_in(said, r"([\d.]+) bits per pixel") == pytest.approx(8 * out.stat().st_size / height / width, abs=5e-4)
    assert said.endswith(f"\n{out}\n")
    assert main(["render", str(out), str(tmp_path / "drawn.png")]) == 0
    error = np.asarray(Image.open(tmp_path / "drawn.png"), np.float64) - np.asarray(Image.open(image))
    assert said_in(said, r"([\d.]+) dB") == pytest.approx(10 * np.log10(255**2 / np.square(error).mean()), abs=0.05)


def test_a_file_that_is_there_is_replaced_whole_or_stays(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "photo.air"
    out.write_bytes(b"old")
    image = str(photographs / "china.jpg")
    assert main(["encode", image, str(out), "--bpp", "0.0001", *QUICK]) == 1
    assert out.read_bytes() == b"old"
    assert main(["encode", image, str(out), "--gaussians", "50", *QUICK]) == 0
    assert 0 < len(air.decode(out.read_bytes())) <= 50


def test_the_file_may_go_to_an_object_store(photographs: Path) -> None:
    image = str(photographs / "china.jpg")
    assert main(["encode", image, "memory://encode-one/a/photo.air", "--gaussians", "50", *QUICK]) == 0
    (path,) = [path for path, _ in open_storage("memory://encode-one").list()]
    assert path == "a/photo.air"
    assert 0 < len(air.decode(open_storage("memory://encode-one").read(path))) <= 50


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["."], 2, "out.air is one .air file, which is made from one image file"),
        (["fine.png", "fine.png"], 2, "made from one image file"),
        (["missing.png"], 2, "missing.png does not exist"),
        (["text.jpg"], 1, "text.jpg: not_an_image"),
        (
            ["fine.png", "--embed", "--executor", "inline"],
            2,
            "--embed, --executor: only for bulk work, not for a single .air file",
        ),
        (["fine.png", "--max-count", "3"], 2, "--max-count: only for bulk work, not for a single .air file"),
        (["fine.png", "--psnr", "99", "--steps", "0"], 1, "fine.png: target_missed: 99.00 dB were not reached"),
        (["fine.png", "--predictor", "gorw"], 1, "unknown predictor 'gorw': give grow, grid, compact or a file"),
    ],
)
def test_what_cannot_become_one_file_is_explained(
    arguments: list[str],
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.jpg").write_text("no picture")
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save("fine.png")
    inputs = [word for word in arguments if "." in word]
    assert main(["encode", *inputs, "out.air", *arguments[len(inputs) :]]) == status
    assert said in capsys.readouterr().err
    assert not Path("out.air").exists()


def test_a_folder_of_that_name_is_no_file(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.air").mkdir()
    assert main(["encode", str(photographs / "china.jpg"), str(tmp_path / "out.air"), "--gaussians", "9"]) == 1
    assert "it is a folder; choose another name" in capsys.readouterr().err
