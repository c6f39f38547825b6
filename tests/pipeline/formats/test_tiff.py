"""TIFF: every layout of samples has the pixels that tifffile reads, or is refused as unsupported."""

import io
from itertools import product

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.errors import Rejected
from pipeline.formats.images import decode
from tests.support.picture_files import PICTURE, linear_profile, reason_of, saved, srgb_encoded
from tests.support.tiff_files import tiff

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

HEIGHT, WIDTH = 7, 21
COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3}
EXTRAS = ((), (0,), (1,), (2,), (0, 0), (1, 0), (2, 0), (0, 2))


def made(photometric: int, bits: int, extras: tuple[int, ...] = (), **options) -> bytes:
    """A file of random samples. Premultiplied colours are no larger than their alpha."""
    rng = np.random.default_rng(bits)
    count = COLOURS[photometric]
    samples = rng.integers(0, 2**bits, (HEIGHT, WIDTH, count + len(extras)), dtype=np.uint64)
    if extras[:1] == (1,):
        samples[..., :count] = samples[..., :count] * samples[..., [count]] // (2**bits - 1)
    if photometric == 3:
        options["colour_map"] = rng.integers(0, 256, (3, 2**bits), dtype=np.uint16) * 257
    return tiff(samples, bits, photometric, extras=extras, **options)


def shown(data: bytes) -> np.ndarray:
    """What a file means, from tifffile's samples and the TIFF specification: over white, rounded to 8 bits."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        samples = page.asarray()
        bits, photometric, extras = page.bitspersample, int(page.photometric), [int(e) for e in page.extrasamples]
        if page.planarconfig == 2 and page.samplesperpixel > 1:
            samples = np.moveaxis(samples, 0, -1)
        samples = samples.reshape(*samples.shape[:2], -1)
        colour_map = page.colormap
    count = COLOURS[photometric]
    values = samples.astype(np.float64) / (2**bits - 1)
    colour, alpha = values[..., :count], values[..., [count]] if extras[:1] in ([1], [2]) else 1.0
    if photometric == 0:
        colour = 1 - colour
    elif photometric == 3:
        colour = np.moveaxis(colour_map[:, samples[..., 0].astype(int)], 0, -1) / 65535
    elif photometric == 5:
        colour = (1 - colour[..., :3]) * (1 - colour[..., 3:])
    over_white = (colour if extras[:1] == [1] else colour * alpha) + 1 - alpha
    return np.broadcast_to(np.rint(255 * over_white), (*samples.shape[:2], 3))


def error_of(data: bytes) -> float:
    return float(np.abs(decode(data) - shown(data)).max())


@pytest.mark.parametrize("photometric", COLOURS)
@pytest.mark.parametrize("planar", [False, True], ids=["together", "planes"])
def test_every_layout_is_right_or_unsupported(photometric: int, planar: bool):
    read, refusals = set(), []
    kinds = [*product((1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16), (1,)), *product((8, 16, 32), (2, 3)), (32, 1), (8, 4)]
    for (bits, sample_format), extras, order in product(kinds, EXTRAS, "<>"):
        if photometric == 3 and bits > 8:
            continue
        data = made(photometric, bits, extras, planar=planar, order=order, sample_format=sample_format)
        try:
            rgb = decode(data)
        except Rejected as error:
            refusals.append((error.reason, bits, sample_format, extras, order))
            continue
        assert sample_format == 1
        # Inks and alpha each are rounded once more.
        tolerance = (photometric == 5) + bool(set(extras[:1]) & {1, 2})
        assert np.abs(rgb - shown(data)).max() <= tolerance, (bits, sample_format, extras, order)
        read.add((bits, extras))
    assert [refusal for refusal in refusals if refusal[0] != "unsupported"] == []
    assert {bits for bits, _ in read} == ALL_READ[photometric, planar]
    if photometric == 2:
        assert {extras for _, extras in read} >= {(), (0,), (1,), (2,)}


ALL_READ = {
    **{(photometric, planar): set() for photometric, planar in product((4, 6, 8), (False, True))},
    (0, False): {1, 2, 4, 8, 16},
    (0, True): {1, 2, 4, 8, 16},
    (1, False): {1, 2, 4, 8, 12, 16},
    (1, True): {1, 2, 4, 8, 12, 16},
    (2, False): {8, 16},
    (2, True): {8, 16},
    (3, False): {1, 2, 4, 8},
    (3, True): {1, 2, 4, 8},
    (5, False): {8, 16},
    (5, True): {8, 16},
}
"""(photometric, in planes): the bits that are read. A test that refuses everything would hold nothing."""


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planar", [False, True], ids=["together", "planes"])
@pytest.mark.parametrize("options", [{"tile": 16}, {"rows_per_strip": HEIGHT}, {"rows_per_strip": 1}], ids=str)
def test_tiles_and_strips(options: dict, planar: bool, order: str):
    for photometric, bits in (
        (0, 1),
        (1, 4),
        (1, 8),
        (1, 12),
        (0, 16),
        (2, 8),
        (2, 16),
        (3, 4),
        (3, 8),
        (5, 8),
        (5, 16),
    ):
        if (bits, order) == (12, ">"):
            continue
        assert error_of(made(photometric, bits, planar=planar, order=order, **options)) <= (photometric == 5)


@pytest.mark.parametrize(("photometric", "bits"), [(0, 1), (0, 2), (0, 4), (1, 1), (1, 2), (1, 4), (1, 8), (3, 8)])
def test_reversed_bits(photometric: int, bits: int):
    assert error_of(made(photometric, bits, fill_order=2)) == 0


COMPRESSIONS = ["lzw", "zlib", "packbits", "lzma", "zstd"]


def written(samples: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **options)
    return file.getvalue()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("predictor", [False, True], ids=["", "predictor"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressions(compression: str, predictor: bool, order: str):
    if predictor and compression == "packbits":
        pytest.skip("PackBits has no predictor")
    rng = np.random.default_rng(0)
    for dtype, planar, channels, big in product(
        (np.uint8, np.uint16), ("contig", "separate"), (1, 3, 4), (False, True)
    ):
        samples = rng.integers(0, np.iinfo(dtype).max, (40, 50, channels), dtype=dtype)
        if planar == "separate":
            samples = np.moveaxis(samples, -1, 0)
        colours = {
            "photometric": "rgb",
            "planarconfig": planar,
            "extrasamples": ["unassalpha"] if channels == 4 else [],
        }
        if channels == 1:
            samples, colours = samples.reshape(40, 50), {"photometric": "minisblack"}
        layout = {"byteorder": order, "bigtiff": big, "rowsperstrip": 16}
        data = written(samples, compression=compression, predictor=predictor, **layout, **colours)
        if big and order == ">":
            assert reason_of(data) == "unsupported"  # Pillow does not read it
            continue
        assert error_of(data) <= (channels == 4), (dtype, planar, channels, big)


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_a_profile_is_converted_whatever_the_layout(planar: str):
    """Samples in planes reach Pillow under a directory without the profile."""
    samples = np.full((9, 12, 3), 64, np.uint8)
    turned = np.moveaxis(samples, -1, 0) if planar == "separate" else samples
    data = written(turned, photometric="rgb", planarconfig=planar, iccprofile=linear_profile())
    assert np.abs(decode(data) - 255 * srgb_encoded(np.array(64 / 255))).max() <= 1.5


def test_a_profile_of_16_bits_where_white_is_zero_is_read():
    samples = np.full((9, 12), 65535 - 64 * 257, np.uint16)
    data = written(samples, photometric="miniswhite", iccprofile=linear_profile())
    assert np.abs(decode(data) - 255 * srgb_encoded(np.array(64 / 255))).max() <= 1.5


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_fax(compression: str):
    bits = np.random.default_rng(0).integers(0, 2, (30, 50)).astype(bool)
    assert np.array_equal(decode(saved(Image.fromarray(bits), "TIFF", compression=compression))[..., 0], bits * 255)


def test_jpeg_inside():
    """Lossy, so held to the picture rather than to tifffile's samples."""
    for picture in (PICTURE, PICTURE[..., 0]):
        rgb = decode(saved(picture, "TIFF", compression="jpeg", quality=95))
        assert np.abs(rgb.astype(int) - (picture if picture.ndim == 3 else picture[..., None])).mean() <= 3
    # tifffile stores these as YCbCr with subsampled colours.
    ycbcr = written(PICTURE[:32, :48], compression="jpeg", photometric="rgb", compressionargs={"level": 95})
    assert np.abs(decode(ycbcr).astype(int) - PICTURE[:32, :48]).mean() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_planes_and_16_bits_are_turned(orientation: int):
    for photometric, bits, planar in ((2, 8, True), (2, 16, True), (2, 16, False), (1, 16, False), (5, 16, False)):
        upright = decode(made(photometric, bits, planar=planar))
        turned = decode(made(photometric, bits, planar=planar, more={274: (orientation,)}))
        expected = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: np.rot90(upright, -1),
            7: upright[::-1, ::-1].transpose(1, 0, 2),
            8: np.rot90(upright, 1),
        }[orientation]
        assert np.array_equal(turned, expected)


def test_a_colour_map_of_8_bit_numbers():
    colour_map = np.arange(48, dtype=np.uint16).reshape(3, 16) * 5
    samples = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    assert np.array_equal(decode(tiff(samples, 4, 3, colour_map=colour_map)).reshape(16, 3), colour_map.T)


@pytest.mark.parametrize(
    "more",
    [{259: (32809,)}, {259: (34712,)}, {259: (6,)}, {332: (2,)}, {317: (3,)}, {258: (5, 6, 5)}, {273: (0, 8, 8)}],
    ids=["ThunderScan", "JPEG 2000", "old JPEG", "other inks", "predictor of floats", "mixed bits", "a hole"],
)
def test_other_tags_are_unsupported(more: dict[int, tuple[int, ...]]):
    assert reason_of(made(2, 8, more=more)) == "unsupported"


def test_too_few_strips_are_no_black_pixels():
    assert reason_of(made(2, 8, more={273: (8,), 279: (9,)})) == "corrupt"
