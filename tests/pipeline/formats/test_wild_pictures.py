"""The pictures of ../shared/data/wild, each of a kind of fault: right pixels, or a reason that is true."""

from collections.abc import Callable

import numpy as np
import pytest
import tifffile

from pipeline.formats.images import decode
from tests.support.paths import WILD
from tests.support.picture_files import reason_of

pytestmark = pytest.mark.skipif(not WILD.is_dir(), reason="needs the wild pictures of ../shared/data/wild")

REFUSED = {
    "int8.tif": "unsupported",
    "jpeg12bit.jpg": "unsupported",
    "rgb32bf.bmp": "unsupported",
    "png_cicp_pq.png": "unsupported",
    "jpeg_half_then_EOI.jpg": "truncated",
}
RIGHT: dict[str, Callable[[np.ndarray], bool]] = {
    "gray12.tif": lambda rgb: (rgb.min(), rgb.max()) == (0, 255),
    "miniswhite16.tif": lambda rgb: (rgb[0, 0] == 255).all(),
    # Premultiplied gray 60 with alpha 128, over white.
    "gray_premultiplied.tif": lambda rgb: np.abs(rgb.astype(int) - (60 + 255 - 128)).max() <= 1,
    "png_trns_gray4.png": lambda rgb: (rgb[:, : rgb.shape[1] // 2] == 255).all(),
    "png_gamma1.png": lambda rgb: (rgb == 188).all(),
    "ztxt_2mb.png": lambda rgb: rgb.size > 0,
    "png_icc_1.5mb.png": lambda rgb: rgb.size > 0,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    assert reason_of((WILD / name).read_bytes()) == REFUSED[name]


@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str):
    assert RIGHT[name](decode((WILD / name).read_bytes()))


def test_planes_of_16_bits():
    samples = np.moveaxis(tifffile.imread(WILD / "planar_rgb16.tif"), 0, -1)
    assert np.array_equal(decode((WILD / "planar_rgb16.tif").read_bytes()), np.rint(samples * (255 / 65535)))
