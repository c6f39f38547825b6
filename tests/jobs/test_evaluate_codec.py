"""`air evaluate --codec`: sizes of files, the best files of other codecs within them, quality of decoded pictures."""

import io
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, features

import air
from jobs.cli import main
from jobs.evaluate import evaluate_codec
from pipeline.errors import ConfigError, JobFailedError
from pipeline.evaluation import baselines
from pipeline.evaluation.codec import means
from pipeline.evaluation.config import EvaluateConfig
from pipeline.formats import tables

TARGETS = (0.8, 2.0)
STEPS, STORED_STEPS = 8, 4
QUICK = EvaluateConfig(codec=True, bpp=(1.0,), steps=STEPS, stored_steps=STORED_STEPS)


def jpeg(quality: float, **options: object) -> dict:
    return {"format": "JPEG", "quality": int(quality), "subsampling": "4:2:0", "optimize": True, **options}


def baseline_sizes_and_pictures(codec: str, setting: float, rgb: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Size and pixels of the files that a user of Pillow gets with the documented options."""
    options = {
        "JPEG": lambda: [jpeg(setting), jpeg(setting, progressive=True)],
        "WebP": lambda: [{"format": "WEBP", "quality": int(setting), "method": 6}],
        "JPEG 2000": lambda: [
            {
                "format": "JPEG2000",
                "quality_mode": "rates",
                "quality_layers": [setting],
                "irreversible": True,
                "mct": 1,
                "no_jp2": True,
            }
        ],
        "AVIF": lambda: [{"format": "AVIF", "quality": int(setting), "subsampling": "4:4:4"}],
    }[codec]()
    found = []
    for option in options:
        file = io.BytesIO()
        Image.fromarray(rgb).save(file, **option)
        found.append((len(file.getvalue()), np.asarray(Image.open(file).convert("RGB"))))
    return found


def psnr_of_pixels(first: np.ndarray, second: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.square(first.astype(np.float64) - second).mean())


@pytest.fixture(scope="module")
def originals() -> dict[str, np.ndarray]:
    """Two crops of photographs, 64 x 96 and 75 x 61 pixels."""
    data = pytest.importorskip("skimage.data", reason="the photographs come with scikit-image")
    return {"face": data.astronaut()[60:124, 180:276], "fur": data.chelsea()[100:175, 120:181]}


@pytest.fixture(scope="module")
def folder(originals: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crops")
    for name, rgb in originals.items():
        Image.fromarray(rgb).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the table and the plot that the command wrote."""
    out = tmp_path_factory.mktemp("figures")
    options = ["--bpp", ",".join(map(str, TARGETS)), "--steps", STEPS, "--stored-steps", STORED_STEPS]
    files = ["--output", out / "figures.parquet", "--plot", out / "figures.svg"]
    assert main([str(word) for word in ["evaluate", folder, "--codec", *options, *files]]) == 0
    return out


@pytest.fixture(scope="module")
def rows(written: Path) -> list[dict]:
    return pq.read_table(written / "figures.parquet").to_pylist()


def original_of(row: dict, originals: dict[str, np.ndarray]) -> np.ndarray:
    return next(rgb for name, rgb in originals.items() if f"/{name}-" in row["key"])


def test_there_is_a_row_for_every_image_target_and_codec(written: Path, rows: list[dict]) -> None:
    table = pq.read_table(written / "figures.parquet")
    assert table.schema.equals(tables.CODEC_EVALUATION, check_metadata=False)
    codecs = ["AIR", *(baseline.name for baseline in baselines.available())]
    assert [(row["target_bpp"], row["codec"]) for row in rows] == [
        (bpp, name) for bpp in TARGETS for name in codecs
    ] * 2
    metadata = table.schema.metadata
    assert json.loads(metadata[b"air.config"])["bpp"] == list(TARGETS)
    assert all(name in metadata[b"air.codecs"].decode() for name in codecs[1:])


def test_bits_are_those_of_the_file_and_keep_the_target(rows: list[dict], originals: dict[str, np.ndarray]) -> None:
    for row in rows:
        height, width, _ = original_of(row, originals).shape
        assert (row["height"], row["width"]) == (height, width)
        assert row["bpp"] == 8 * row["bytes"] / (height * width)
        assert row["encode_seconds"] > 0 < row["decode_seconds"]
        if row["codec"] == "AIR":
            assert 0.8 * row["target_bpp"] < row["bpp"] <= row["target_bpp"]


def test_our_row_is_what_the_decoded_file_shows(rows: list[dict], originals: dict[str, np.ndarray]) -> None:
    for row in (row for row in rows if row["codec"] == "AIR"):
        rgb = original_of(row, originals)
        blob = air.encode(rgb, bpp=row["target_bpp"], steps=STEPS, stored_steps=STORED_STEPS)
        gaussians = air.decode(blob)
        assert (len(blob), len(gaussians)) == (row["bytes"], row["num_gaussians"])
        drawn = air.render(gaussians.to(torch.float64), *rgb.shape[:2], backend="reference").clamp(0, 1)
        seen = (255 * drawn).round().permute(1, 2, 0).numpy()
        assert row["psnr"] == pytest.approx(psnr_of_pixels(seen, rgb), abs=2e-3)


def test_other_codecs_have_the_best_file_that_is_no_larger(rows: list[dict], originals: dict[str, np.ndarray]) -> None:
    settings = {baseline.name: list(baseline.settings) for baseline in baselines.BASELINES}
    ours = {(row["key"], row["target_bpp"]): row["bytes"] for row in rows if row["codec"] == "AIR"}
    for row in (row for row in rows if row["codec"] != "AIR"):
        rgb, limit = original_of(row, originals), ours[row["key"], row["target_bpp"]]
        place = settings[row["codec"]].index(row["setting"])
        files = baseline_sizes_and_pictures(row["codec"], row["setting"], rgb)
        size, picture = min(files, key=lambda file: file[0])
        assert size == row["bytes"]
        assert row["psnr"] == pytest.approx(psnr_of_pixels(picture, rgb), abs=1e-3)
        assert row["num_gaussians"] == 0
        if size > limit:
            assert place == 0
        elif place + 1 < len(settings[row["codec"]]):
            larger = baseline_sizes_and_pictures(row["codec"], settings[row["codec"]][place + 1], rgb)
            assert min(size for size, _ in larger) > limit


def test_the_plot_has_a_curve_for_every_codec_in_both_charts(written: Path, rows: list[dict]) -> None:
    root = ElementTree.parse(written / "figures.svg").getroot()
    words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    names = {row["codec"] for row in rows}
    assert all(words.count(name) == 2 for name in names)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 2 * len(names) * len(TARGETS)


def test_means_are_over_images(rows: list[dict]) -> None:
    mean = means(rows)
    assert [target for target, _ in mean] == sorted(target for target, _ in mean)
    for (target, codec), figures in mean.items():
        chosen = [row["psnr"] for row in rows if (row["target_bpp"], row["codec"]) == (target, codec)]
        assert len(chosen) == 2
        assert figures["psnr"] == pytest.approx(np.mean(chosen))


def test_a_codec_that_pillow_lacks_is_named_and_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(features, "get_supported", lambda: ["pil", "jpg", "webp"])
    rows = evaluate_codec([str(folder / "face.png")], QUICK).rows
    assert [row["codec"] for row in rows] == ["AIR", "JPEG", "WebP"]
    assert "not measured: JPEG 2000, AVIF; this Pillow is built without them" in capsys.readouterr().out


def test_images_that_cannot_be_used_or_miss_a_target_are_named_and_passed_over(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "face.png").write_bytes((folder / "face.png").read_bytes())
    (tmp_path / "broken.png").write_bytes((folder / "face.png").read_bytes()[:500])
    Image.new("RGB", (2, 2), (90, 20, 10)).save(tmp_path / "dot.png")
    options = ["--bpp", "1", "--steps", str(STEPS), "--stored-steps", "0"]
    assert main(["evaluate", str(tmp_path), "--codec", *options]) == 0
    printed = capsys.readouterr().out
    assert "means over 1 image " in printed
    assert "2 skipped (" in printed
    assert "target_missed 1" in printed
    assert {name for name in ("broken.png", "dot.png", "face.png") if name in caplog.text} == {"broken.png", "dot.png"}
    with pytest.raises(JobFailedError, match="no image could be used: 1 skipped"):
        evaluate_codec([str(tmp_path / "dot.png")], QUICK)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--codec", "--refine", "0,10"], "refine: not with codec, which measures no predictor"),
        (["--codec", "--predictor", "grid", "--stages", "2"], "predictor, stages: not with codec"),
        (["--bpp", "0.5"], "bpp: only with codec; set codec, or leave this out"),
        (["--codec", "--bpp", "0"], "bpp must be one or more numbers above 0, at most 24"),
        (["--codec", "--bpp", "1,0.5"], "bpp must rise, without repetition"),
        (["--plot", "curves.svg"], "--plot: only with --codec"),
        (["--codec", "--plot", "curves.png"], "curves.png: the plot is an SVG file; give it a name that ends in .svg"),
        (["--codec", "--output", "rows.csv"], "rows.csv: the table is one Parquet file"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(
    folder: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(folder), *options]) == 2
    assert said in capsys.readouterr().err


def test_no_output_is_written_where_its_name_is_wrong(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.svg"):
        evaluate_codec([str(folder)], QUICK, plot="x")
