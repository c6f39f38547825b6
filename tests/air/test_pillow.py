"""`Image.open` and `Image.save` with .air files, and the ways in which Pillow is told that a file is no good."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

import air.pillow
from air.codec.file import decode, encode_gaussians
from air.codec.sensitivity import SensitivityQuantizer
from air.gaussians import Gaussians
from air.rendering.render import render

HEIGHT, WIDTH = 37, 53


@pytest.fixture(scope="module")
def blob() -> bytes:
    """A file of sixty Gaussians."""
    random = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=random)

    xy = uniform(0, 1, 60, 2) * torch.tensor([WIDTH - 1.0, HEIGHT - 1.0])
    gaussians = Gaussians(xy, uniform(1, 6, 60, 2), uniform(0, 3, 60), uniform(-0.2, 0.6, 60, 3))
    return encode_gaussians(gaussians, HEIGHT, WIDTH, SensitivityQuantizer(step=2000))


def test_open_gives_the_picture_of_the_decoded_gaussians(blob: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.air").write_bytes(blob)
    with Image.open(tmp_path / "x.air") as picture:
        assert (picture.format, picture.mode, picture.size) == ("AIR", "RGB", (WIDTH, HEIGHT))
        assert picture.get_format_mimetype() == "image/x-air"
        pixels = np.asarray(picture)
    exact = render(decode(blob).to(torch.float64), HEIGHT, WIDTH, backend="reference").clamp(0, 1) * 255
    assert np.abs(pixels - exact.permute(1, 2, 0).numpy()).max() < 0.51  # rounded, not cut


def test_pixels_are_drawn_when_they_are_asked_for(blob: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(air.pillow, "draw", lambda *args: drawn.append(args) or Image.new("RGB", (WIDTH, HEIGHT)))
    picture = Image.open(io.BytesIO(blob))
    assert not drawn
    picture.load()
    picture.load()
    assert len(drawn) == 1


@pytest.mark.parametrize(
    "broken", [lambda blob: b"\x88" + blob[1:], lambda blob: blob[:20], lambda blob: blob[:9] + b"\xff" + blob[10:]]
)
def test_what_is_no_air_file_is_not_identified(blob: bytes, broken) -> None:
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(broken(blob)))


@pytest.mark.parametrize("broken", [lambda blob: blob[:-5], lambda blob: blob[:-9] + bytes([blob[-9] ^ 1]) + blob[-8:]])
def test_damage_behind_the_header_is_an_error_on_loading(blob: bytes, broken) -> None:
    picture = Image.open(io.BytesIO(broken(blob)))
    with pytest.raises(OSError, match="stage"):
        picture.load()


def test_pillows_limit_on_pixels_holds(blob: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 3)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(blob))


def test_save_encodes_with_the_target_that_is_given(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, HEIGHT * WIDTH * 3).reshape(HEIGHT, WIDTH, 3).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.air", bpp=2, steps=20, stored_steps=5)
    assert (tmp_path / "ramp.air").stat().st_size * 8 <= 2 * HEIGHT * WIDTH
    error = np.asarray(Image.open(tmp_path / "ramp.air")).astype(float) - ramp
    assert np.sqrt(np.square(error).mean()) < 0.5 * ramp.std()  # nearer than a picture of one colour


def test_save_refuses_transparency(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="convert to RGB"):
        Image.new("RGBA", (8, 8)).save(tmp_path / "x.air")
    assert not (tmp_path / "x.air").exists()


@pytest.mark.parametrize(("scale", "size"), [(2.0, (2 * WIDTH, 2 * HEIGHT)), (0.5, (26, 18)), (0.001, (1, 1))])
def test_draw_gives_other_sizes(blob: bytes, scale: float, size: tuple[int, int]) -> None:
    picture = air.pillow.draw(decode(blob), HEIGHT, WIDTH, scale=scale)
    assert picture.size == size
