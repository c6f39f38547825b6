"""What is decoded is the encoder's own quantised picture, bit for bit: on every kind of image, small, odd or empty.

A folder of further pictures is named by the environment variable AIR_ROUND_TRIP_PICTURES:

    AIR_ROUND_TRIP_PICTURES=kodak/ pytest tests/air/encoding/test_encode.py
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from air.codec.file import decode, encode_stages, read_header
from air.codec.sensitivity import SensitivityQuantizer
from air.codec.symbols import Stage, gaussians_of, quantize_stages
from air.codec.uniform import UniformQuantizer, channel_values, fit_uniform_quantizer
from air.encoding import encode, search
from air.gaussians import Gaussians, anchors
from air.predictor.base import GridPredictor, Prediction
from air.rendering.render import render
from jobs.sections import DemoConfig
from pipeline.formats import images
from pipeline.inputs.packaged import collect_pictures

FOLDER = "AIR_ROUND_TRIP_PICTURES"
DEMO_PICTURES = DemoConfig().pictures

Check = Callable[..., Gaussians]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Check:
    """Encodes an image, holds what is decoded against what the encoder quantised, and returns it."""
    written = {}

    def write_and_remember(header, stages):
        blob = write_stages(header, stages)
        written[blob] = [gaussians_of(stage, header) for stage in stages]
        return blob

    write_stages = search.write_stages
    monkeypatch.setattr(search, "write_stages", write_and_remember)

    def check(rgb: np.ndarray, **options) -> Gaussians:
        blob = encode.encode(rgb, **options)
        height, width, _ = rgb.shape
        header = read_header(blob)
        assert (header.height, header.width) == (height, width)
        own, decoded = Gaussians.concatenate(written[blob]), decode(blob)
        for name in ("xy", "scale", "angle", "colour"):
            assert getattr(decoded, name).dtype == torch.float32
            assert torch.equal(getattr(decoded, name), getattr(own, name)), name
        assert torch.equal(render(decoded, height, width), render(own, height, width))
        return decoded

    return check


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (13, 1), (2, 2), (23, 37), (31, 16)])
@pytest.mark.parametrize("content", ["noise", "one colour", "black", "one bright pixel"])
def test_images_of_any_size_and_content(check: Check, shape: tuple[int, int], content: str) -> None:
    image = np.zeros((*shape, 3), np.uint8)
    if content == "noise":
        image[:] = np.random.default_rng(1).integers(0, 256, image.shape)
    elif content == "one colour":
        image[:] = (200, 90, 30)
    elif content == "one bright pixel":
        image[-1, -1] = 255
    assert len(check(image, gaussians=40, steps=10, stored_steps=5)) <= 40


@pytest.mark.parametrize("kind", ["sensitivity", "uniform"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (23, 37)])
def test_no_gaussians(kind: str, shape: tuple[int, int]) -> None:
    quantizer: SensitivityQuantizer | UniformQuantizer = SensitivityQuantizer(step=3000)
    if kind == "uniform":
        quantizer = fit_uniform_quantizer(torch.zeros(0, 8))
    blob = encode_stages([], *shape, 5, quantizer)
    assert (read_header(blob).height, read_header(blob).width) == shape
    assert len(decode(blob)) == 0
    assert not render(decode(blob), *shape).any()


def one_symbol_stages(count: int, height: int, width: int, patch_size: int) -> list[Stage]:
    """Stages that are alike: in every patch the same Gaussian at the same place."""
    rows, columns = -(-height // patch_size), -(-width // patch_size)
    patch = np.arange(rows * columns)
    corner = torch.from_numpy(np.stack([patch % columns, patch // columns], axis=1) * patch_size).float()
    gaussians = Gaussians(
        corner + 1.25,
        torch.tensor([[2.5, 1.5]]).repeat(len(patch), 1),
        torch.full((len(patch),), 0.4),
        torch.tensor([[0.5, 0.25, -0.125]]).repeat(len(patch), 1),
    )
    return [Stage(patch, gaussians)] * count


@pytest.mark.parametrize("kind", ["sensitivity", "uniform"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_single_symbol_in_every_channel(kind: str, count: int) -> None:
    height, width, patch_size = 30, 42, 6
    stages = one_symbol_stages(count, height, width, patch_size)
    quantizer: SensitivityQuantizer | UniformQuantizer = SensitivityQuantizer(step=3000)
    if kind == "uniform":
        grid = anchors(height, width, patch_size)
        quantizer = fit_uniform_quantizer(channel_values(stages[0].gaussians, grid))
    header, quantized = quantize_stages(stages, height, width, patch_size, quantizer)
    for stage in quantized:
        assert len(stage.patch) == 35
        assert (stage.symbols == stage.symbols[0]).all()
    own = Gaussians.concatenate([gaussians_of(stage, header) for stage in quantized])
    blob = encode_stages(stages, height, width, patch_size, quantizer)
    decoded = decode(blob)
    for name in ("xy", "scale", "angle", "colour"):
        assert torch.equal(getattr(decoded, name), getattr(own, name)), name
    assert torch.equal(render(decoded, height, width), render(own, height, width))
    # It is the Gaussians that came back, and not only two equal mistakes.
    target = render(Gaussians.concatenate([stage.gaussians for stage in stages]), height, width)
    assert float((render(decoded, height, width) - target).abs().mean()) < 0.015 * count


@pytest.fixture(scope="module")
def demo_pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    pytest.importorskip("skimage", reason="the pictures come with scikit-image")
    pytest.importorskip("sklearn", reason="two pictures come with scikit-learn")
    folder = tmp_path_factory.mktemp("demo")
    collect_pictures(folder, DEMO_PICTURES)
    return sorted(folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", range(DEMO_PICTURES))
def test_the_pictures_of_the_demo(check: Check, demo_pictures: list[Path], number: int) -> None:
    rgb = images.decode(demo_pictures[number].read_bytes())
    assert len(check(rgb, steps=5, stored_steps=3)) > 100


@pytest.mark.slow
def test_the_pictures_of_a_folder(check: Check) -> None:
    folder = os.environ.get(FOLDER)
    if not folder:
        pytest.skip(f"{FOLDER} names no folder of pictures, such as the 24 of Kodak")
    paths = [path for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in (".png", ".jpg", ".webp")]
    assert paths, f"{folder} holds no pictures"
    for path in paths:
        assert len(check(images.decode(path.read_bytes()), bpp=0.25, steps=20, stored_steps=10)) > 0


class Watched(GridPredictor):
    """The grid, which notes the threads it is given and those of torch."""

    def __init__(self, patch_size: int) -> None:
        super().__init__(patch_size)
        self.threads: list[tuple[int, int]] = []

    def predict(self, image, canvas, active, stage, threads=1) -> Prediction:
        self.threads.append((threads, torch.get_num_threads()))
        return super().predict(image, canvas, active, stage, threads)


def test_a_file_depends_neither_on_the_threads_nor_on_those_of_torch() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8)
    predictor = Watched(7)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        file = encode.encode(rgb, predictor=predictor, stages=2, steps=2, stored_steps=2, threads=2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(predictor.threads) == {(1, 1)}
    assert encode.encode(rgb, predictor=GridPredictor(7), stages=2, steps=2, stored_steps=2) == file
