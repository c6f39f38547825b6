"""`air decode` and `air render`: correct pixels from tars, folders and single files; damaged files are named."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from air.codec.file import decode, encode_gaussians
from air.codec.sensitivity import SensitivityQuantizer
from air.gaussians import Gaussians
from air.rendering.render import render
from jobs.cli import main
from pipeline.bulk.encode import EncodeConfig, EncodedFile, EncodeJob, measure
from pipeline.storage.open import open_storage
from pipeline.work.audit import verify
from pipeline.work.manifest import read_manifests, read_quarantine
from pipeline.work.plan import Plan, Unit, settle_plan
from pipeline.work.process import EncodedImage, Sample, execute
from tests.support.paths import WILD

HEIGHT, WIDTH = 30, 44
INLINE = ["--executor", "inline"]


def make_file(seed: int) -> bytes:
    """Fifty Gaussians in several stages."""
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=random)

    xy = uniform(0, 1, 50, 2) * torch.tensor([WIDTH - 1.0, HEIGHT - 1.0])
    gaussians = Gaussians(xy, uniform(1, 6, 50, 2), uniform(0, 3, 50), uniform(-0.2, 0.6, 50, 3))
    return encode_gaussians(gaussians, HEIGHT, WIDTH, SensitivityQuantizer(step=2000), patch_size=10)


def expected(blob: bytes, stages: int | None = None, scale: float = 1.0) -> np.ndarray:
    """The levels of the picture by the reference renderer, before rounding."""
    height, width = round(HEIGHT * scale), round(WIDTH * scale)
    gaussians = decode(blob, stages).to(torch.float64)
    gaussians = gaussians.rescaled(scale) if scale != 1 else gaussians
    drawn = render(gaussians, height, width, backend="reference").clamp(0, 1) * 255
    return drawn.permute(1, 2, 0).numpy()


def assert_shows(picture: bytes | Path, levels: np.ndarray, tolerance: float = 0.51) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture))
    assert pixels.shape == levels.shape
    assert np.abs(pixels - levels).max() < tolerance


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def read_pictures(folder: Path) -> dict[str, bytes]:
    """Members of the committed tars by name."""
    members = {}
    for manifest in read_manifests(open_storage(folder)):
        for file in manifest.files:
            with tarfile.open(folder / file.path) as archive:
                for member in archive:
                    stream = archive.extractfile(member)
                    assert stream is not None
                    members[member.name] = stream.read()
    return members


BLOBS = {f"a/{number}": make_file(number) for number in range(3)}


def test_a_tar_gives_a_tar_of_pictures(tmp_path: Path) -> None:
    write_tar(tmp_path / "in.tar", {f"{key}.air": blob for key, blob in BLOBS.items()})
    assert main(["decode", str(tmp_path / "in.tar"), str(tmp_path / "out"), *INLINE]) == 0
    pictures = read_pictures(tmp_path / "out")
    assert sorted(pictures) == sorted([f"{key}.{ending}" for key in BLOBS for ending in ("png", "json")])
    for key, blob in BLOBS.items():
        assert_shows(pictures[f"{key}.png"], expected(blob))
        about = json.loads(pictures[f"{key}.json"])
        assert (about["height"], about["width"], about["format"]) == (HEIGHT, WIDTH, "PNG")
    assert not list(verify(open_storage(tmp_path / "out")))


@pytest.mark.parametrize("embed", [False, True])
def test_the_output_of_encode_gives_its_pictures(tmp_path: Path, embed: bool) -> None:
    commit_encoded(tmp_path / "encoded", embed)
    assert main(["decode", str(tmp_path / "encoded"), str(tmp_path / "out"), *INLINE]) == 0
    pictures = read_pictures(tmp_path / "out")
    for key, blob in BLOBS.items():
        assert_shows(pictures[f"{key}.png"], expected(blob))


class Given(EncodeJob):
    """A job whose samples are encoded already."""

    def prepare(self, say: object) -> None:
        """Needs no kernels."""

    def process(self, image: EncodedImage) -> EncodedFile:
        black = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        return EncodedFile({"key": image.key, "shard": image.unit, **measure(image.data, black)}, image.data, {})


def commit_encoded(folder: Path, embed: bool) -> None:
    """An output of `air encode` with the files above, as its own writer and the commit protocol make it."""
    config = EncodeConfig(embed=embed)
    unit = Unit(name="shard-00000", input="in", bytes=0, sha256="", samples=len(BLOBS))
    plan = settle_plan(open_storage(folder), Plan.make("encode", config, [unit], ["in"]))
    samples = [Sample(key, key, lambda blob=blob: blob) for key, blob in BLOBS.items()]
    execute(Given(config, None, lambda _: iter(samples)), unit, plan.hash, str(folder))


def test_a_file_gives_a_picture_at_any_size_and_of_any_stages(tmp_path: Path) -> None:
    blob = BLOBS["a/0"]
    (tmp_path / "x.air").write_bytes(blob)
    for scale in (0.5, 2.0):
        assert main(["render", str(tmp_path / "x.air"), str(tmp_path / "x.png"), "--scale", str(scale)]) == 0
        assert_shows(tmp_path / "x.png", expected(blob, scale=scale))
    assert main(["decode", str(tmp_path / "x.air"), str(tmp_path / "folder"), "--stages", "1"]) == 0
    assert_shows(tmp_path / "folder" / "x.png", expected(blob, stages=1))
    assert np.abs(expected(blob, stages=1) - expected(blob)).max() > 10
    assert main(["decode", str(tmp_path / "x.air"), str(tmp_path / "x.webp"), "--quality", "95"]) == 0
    assert Image.open(tmp_path / "x.webp").format == "WEBP"
    assert_shows(tmp_path / "x.webp", expected(blob), tolerance=60)


@pytest.mark.parametrize("command", ["render", "decode"])
@pytest.mark.parametrize(
    ("out", "options", "said"),
    [
        ("x.gif", [], "x.gif: the name of a picture ends in .png, .webp, .jpg, .jpeg, not in .gif"),
        ("x.air", [], "not in .air"),
        ("x.jpg", ["--format", "png"], "--format png contradicts x.jpg"),
    ],
)
def test_a_name_that_says_something_else_is_refused(
    command: str,
    out: str,
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.air").write_bytes(BLOBS["a/0"])
    assert main([command, "x.air", out, *options]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["x.air"]
    assert Path("x.air").read_bytes() == BLOBS["a/0"]


@pytest.mark.parametrize("command", ["render", "decode"])
def test_a_missing_file_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([command, str(tmp_path / "x.air"), str(tmp_path / "x.png")]) == 2
    assert "x.air does not exist" in capsys.readouterr().err


def test_names_that_agree_with_the_format_and_folders_with_dots_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.air").write_bytes(BLOBS["a/0"])
    Path("there.v1").mkdir()
    for out, options, file, kind in (
        ("x.JPEG", ["--format", "jpeg"], "x.JPEG", "JPEG"),
        ("there.v1", ["--format", "webp"], "there.v1/x.webp", "WEBP"),
        ("new.v2/", [], "new.v2/x.png", "PNG"),
        ("new", [], "new/x.png", "PNG"),
    ):
        assert main(["render", "x.air", out, *options]) == 0
        assert Image.open(file).format == kind


def test_several_pictures_do_not_go_into_a_folder_called_as_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_tar(tmp_path / "in.tar", {f"{key}.air": blob for key, blob in BLOBS.items()})
    assert main(["decode", str(tmp_path / "in.tar"), str(tmp_path / "x.png"), *INLINE]) == 2
    assert (
        "x.png is the name of one picture, but several are drawn: name a folder, without .png"
        in capsys.readouterr().err
    )


def test_a_folder_of_files_gives_a_folder_of_pictures_and_names_what_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "in" / "below").mkdir(parents=True)
    (tmp_path / "in" / "below" / "good.air").write_bytes(BLOBS["a/1"])
    (tmp_path / "in" / "bad.air").write_bytes(BLOBS["a/2"][:-7])
    assert main(["decode", str(tmp_path / "in"), str(tmp_path / "out"), "--format", "jpeg"]) == 1
    assert "bad.air: damaged: the file is cut off in stage" in capsys.readouterr().err
    assert_shows(tmp_path / "out" / "below" / "good.jpg", expected(BLOBS["a/1"]), tolerance=60)
    assert not (tmp_path / "out" / "bad.jpg").exists()


def test_a_damaged_file_in_a_tar_is_named_and_quarantined(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    broken = BLOBS["a/2"][:-9] + bytes([BLOBS["a/2"][-9] ^ 1]) + BLOBS["a/2"][-8:]
    write_tar(tmp_path / "in.tar", {"a/0.air": BLOBS["a/0"], "a/1.air": BLOBS["a/1"], "a/2.air": broken})
    assert main(["decode", str(tmp_path / "in.tar"), str(tmp_path / "out"), *INLINE]) == 1
    error = capsys.readouterr().err
    assert "in/a/2" in error
    assert "damaged" in error
    assert {name for name in read_pictures(tmp_path / "out") if name.endswith("png")} == {"a/0.png", "a/1.png"}


def test_a_picture_above_the_limit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.air").write_bytes(BLOBS["a/0"])
    limit = ["--max-pixels", str(HEIGHT * WIDTH * 3)]
    assert main(["render", str(tmp_path / "x.air"), str(tmp_path / "x.png"), *limit]) == 0
    assert main(["render", str(tmp_path / "x.air"), str(tmp_path / "x.png"), "--scale", "2", *limit]) == 1
    assert "too_many_pixels" in capsys.readouterr().err


def wide_file(width: int) -> bytes:
    """A file for a picture of 2 x `width` pixels."""
    gaussians = Gaussians(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1), torch.full((1, 3), 0.5))
    return encode_gaussians(gaussians, 2, width, SensitivityQuantizer(step=2000), patch_size=10)


@pytest.mark.parametrize(("ending", "limit"), [("webp", 16383), ("jpg", 65500)])
def test_a_picture_that_its_format_cannot_hold_is_unsupported(
    ending: str, limit: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for command in ("render", "decode"):
        for name, width, status in (("fits", limit, 0), ("wide", limit + 1, 1)):
            (tmp_path / f"{name}.air").write_bytes(wide_file(width))
            picture = tmp_path / f"{command}-{name}.{ending}"
            assert main([command, str(tmp_path / f"{name}.air"), str(picture)]) == status
            assert picture.exists() == (status == 0)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert "wide.air: unsupported" in lines[0]


def test_a_picture_that_its_format_cannot_hold_is_quarantined_in_bulk(tmp_path: Path) -> None:
    write_tar(tmp_path / "in.tar", {"a/0.air": BLOBS["a/0"], "a/1.air": wide_file(16384)})
    options = ["--format", "webp", "--max-bad-share", "1", *INLINE]
    assert main(["decode", str(tmp_path / "in.tar"), str(tmp_path / "out"), *options]) == 1
    (row,) = read_quarantine(open_storage(str(tmp_path / "out")))
    assert (row["key"], row["reason"]) == ("a/1", "unsupported")


@pytest.mark.skipif(not WILD.is_dir(), reason="needs the panorama of ../shared/data/wild")
@pytest.mark.parametrize(("name", "scale"), [("x.webp", "2"), ("x.jpg", "5")])
def test_the_wild_panorama(name: str, scale: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["decode", str(WILD / "pano16k.air"), str(tmp_path / name), "--scale", scale]) == 1
    assert "pano16k.air: unsupported" in capsys.readouterr().err
