"""Decoding: every kind of pixel comes out as the sRGB one should see."""

import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from pipeline.errors import DamagedDataError
from pipeline.formats.images import IMAGE_EXTENSIONS, ImageInfo, decode, decode_png, encode_png, probe
from tests.support.paths import AWKWARD
from tests.support.picture_files import (
    FILES,
    GRAY,
    HEIGHT,
    PICTURE,
    WIDTH,
    chunk,
    linear_profile,
    over,
    png,
    reason_of,
    saved,
    smooth_picture,
    srgb_encoded,
)

# Pillow's remarks on odd TIFF and EXIF tags.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

needs_awkward = pytest.mark.skipif(not AWKWARD.is_dir(), reason="needs the awkward images of ../shared/data/awkward")


@pytest.mark.parametrize(
    ("format_name", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 30),
        ("JPEG", {"quality": 95, "subsampling": 0}, 8),
        ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}, 8),
    ],
)
def test_formats(format_name: str, options: dict, tolerance: int):
    data = saved(PICTURE, format_name, **options)
    rgb = decode(data)
    assert (rgb.shape, rgb.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
    assert rgb.flags.c_contiguous
    assert rgb.flags.writeable
    assert np.abs(rgb.astype(int) - PICTURE).max() <= tolerance
    assert probe(data) == ImageInfo(format_name, "RGB", WIDTH, HEIGHT, 1)


@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "BMP", "JPEG"])
def test_gray(format_name: str):
    rgb = decode(saved(GRAY, format_name))
    assert np.abs(rgb.astype(int) - GRAY[..., None]).max() <= (6 if format_name == "JPEG" else 0)


def test_one_bit():
    bits = GRAY > 128
    assert np.array_equal(decode(saved(Image.fromarray(bits), "PNG")), np.repeat(bits[..., None] * 255, 3, axis=2))


EVERY_16_BIT_VALUE = np.arange(65536, dtype=np.uint16).reshape(256, 256)
ROUNDED = np.rint(EVERY_16_BIT_VALUE.astype(np.float64) * 255 / 65535)


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3)])
def test_16_bit_png_is_rounded_and_not_cut(colour_type: int, channels: int):
    shuffled = [EVERY_16_BIT_VALUE, EVERY_16_BIT_VALUE.T, EVERY_16_BIT_VALUE[::-1]][:channels]
    expected = [ROUNDED, ROUNDED.T, ROUNDED[::-1]][:channels]
    rgb = decode(png(np.stack(shuffled, axis=2), colour_type))
    assert np.array_equal(rgb, np.broadcast_to(np.stack(expected, axis=2), (256, 256, 3)))


@pytest.mark.parametrize(("colour_type", "channels"), [(4, 1), (6, 3)])
def test_16_bit_png_with_alpha(colour_type: int, channels: int):
    colour = [EVERY_16_BIT_VALUE, EVERY_16_BIT_VALUE.T, EVERY_16_BIT_VALUE[::-1]][:channels]
    alpha = EVERY_16_BIT_VALUE[:, ::-1]
    rgb = decode(png(np.stack([*colour, alpha], axis=2), colour_type))
    expected = over(np.stack([ROUNDED, ROUNDED.T, ROUNDED[::-1]][:channels], axis=2), ROUNDED[:, ::-1], (255,) * 3)
    assert np.abs(rgb - expected).max() <= 1


def test_16_bit_tiff_gray():
    assert np.array_equal(decode(saved(Image.fromarray(EVERY_16_BIT_VALUE), "TIFF"))[..., 0], ROUNDED)


def test_16_bit_png_with_a_transparent_colour():
    gray = np.full((4, 4, 1), 1000, np.uint16)
    gray[0, 0] = 1001  # the same in 8 bits, and yet another colour
    rgb = decode(png(gray, 0, chunk(b"tRNS", struct.pack(">H", 1000))))
    assert (rgb[0, 0] == 4).all()
    assert (rgb[1:] == 255).all()


ALPHA = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 90)])
def test_transparency_is_composited(background: tuple[int, int, int]):
    rgba = np.dstack([PICTURE, ALPHA])
    expected = over(PICTURE, ALPHA, background)
    for data in (saved(rgba, "PNG"), saved(rgba, "WEBP", lossless=True, exact=True), saved(rgba, "TIFF")):
        assert np.abs(decode(data, background=background) - expected).max() <= 1
    gray_alpha = saved(Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(ALPHA)]), "PNG")
    assert np.abs(decode(gray_alpha, background=background) - over(GRAY[..., None], ALPHA, background)).max() <= 1


def test_transparency_is_white_by_default():
    assert (decode(saved(np.zeros((3, 3, 4), np.uint8), "PNG")) == 255).all()


@pytest.mark.parametrize("format_name", ["PNG", "GIF"])
def test_palette(format_name: str):
    palette = Image.fromarray(PICTURE).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert np.array_equal(decode(saved(palette, format_name)), expected)
    transparent = np.asarray(palette) == 3
    rgb = decode(saved(palette, format_name, transparency=3), background=(1, 2, 3))
    assert transparent.any()
    assert (rgb[transparent] == (1, 2, 3)).all()
    assert np.array_equal(rgb[~transparent], expected[~transparent])


def test_transparent_colour_of_rgb_and_gray():
    rgb = np.full((2, 2, 3), 7, np.uint8)
    rgb[0, 0] = (1, 2, 3)
    decoded = decode(png(rgb, 2, chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))))
    assert decoded[..., 0].tolist() == [[255, 7], [7, 7]]
    decoded = decode(png(rgb[..., :1], 0, chunk(b"tRNS", struct.pack(">H", 7))))
    assert decoded[..., 0].tolist() == [[1, 255], [255, 255]]


def test_cmyk_without_a_profile():
    # No ink is white, full cyan has no red, full black is black.
    inks = np.zeros((8, 32, 4), np.uint8)
    inks[:, 8:16, 0] = 255
    inks[:, 16:24, 3] = 255
    inks[:, 24:, 1:3] = 255
    rgb = decode(saved(Image.frombytes("CMYK", (32, 8), inks.tobytes()), "JPEG", quality=100, subsampling=0))
    for column, expected in ((4, (255, 255, 255)), (12, (0, 255, 255)), (20, (0, 0, 0)), (28, (255, 0, 0))):
        assert np.abs(rgb[4, column].astype(int) - expected).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation(format_name: str, orientation: int):
    # How the standard's eight orientations store an upright picture.
    stored = {
        1: PICTURE,
        2: PICTURE[:, ::-1],
        3: PICTURE[::-1, ::-1],
        4: PICTURE[::-1],
        5: PICTURE.transpose(1, 0, 2),
        6: np.rot90(PICTURE, 1),
        7: PICTURE[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PICTURE, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format_name, {})
    data = saved(np.ascontiguousarray(stored), format_name, exif=exif, **options)
    assert np.abs(decode(data).astype(int) - PICTURE).max() <= (8 if format_name == "JPEG" else 0)
    assert probe(data)[2:4] == (WIDTH, HEIGHT)


def test_orientation_behind_the_pixels_of_a_png():
    exif = Image.Exif()
    exif[0x0112] = 3
    data = png(PICTURE, 2, after=chunk(b"eXIf", exif.tobytes()[6:]))
    assert np.array_equal(decode(data), PICTURE[::-1, ::-1])


@pytest.mark.parametrize(
    "block", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x01\0"]
)
def test_broken_exif_is_upright(block: bytes):
    data = saved(PICTURE, "JPEG", exif=block)
    assert decode(data).shape == (HEIGHT, WIDTH, 3)
    assert probe(data).width == WIDTH


def test_animations_give_their_first_frame():
    frames = [Image.fromarray(smooth_picture(seed)) for seed in range(3)]
    for format_name, options in (("WEBP", {"lossless": True}), ("PNG", {})):
        data = saved(frames[0], format_name, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(decode(data), np.asarray(frames[0]))
        assert probe(data).frames == 3
    palettes = [frame.quantize(64) for frame in frames]
    data = saved(palettes[0], "GIF", save_all=True, append_images=palettes[1:])
    assert np.array_equal(decode(data), np.asarray(palettes[0].convert("RGB")))
    assert probe(data) == ImageInfo("GIF", "P", WIDTH, HEIGHT, 3)


# Colour profiles.


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_icc_profiles_are_converted_to_srgb(format_name: str):
    flat = np.full((16, 16, 3), 64, np.uint8)
    options = {"WEBP": {"lossless": True}}.get(format_name, {})
    expected = 255 * srgb_encoded(np.array(64 / 255))  # 137
    assert np.abs(decode(saved(flat, format_name, icc_profile=linear_profile(), **options)) - expected).max() <= 1.5
    rgba = np.dstack([flat, np.full((16, 16), 255, np.uint8)])
    if format_name != "JPEG":
        assert np.abs(decode(saved(rgba, format_name, icc_profile=linear_profile(), **options)) - expected).max() <= 1.5


def test_icc_of_an_rgb_program_in_a_gray_file():
    expected = 255 * srgb_encoded(np.array(64 / 255))
    assert (
        np.abs(decode(saved(np.full((9, 9), 64, np.uint8), "PNG", icc_profile=linear_profile())) - expected).max()
        <= 1.5
    )


def test_srgb_profile_changes_nothing():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.abs(decode(saved(PICTURE, "PNG", icc_profile=srgb)).astype(int) - PICTURE).max() <= 1


@pytest.mark.parametrize("profile", [b"garbage", linear_profile()[:200], b"\0" * 1000], ids=["garbage", "cut", "zeros"])
def test_broken_icc_profiles_are_ignored(profile: bytes):
    assert np.array_equal(decode(saved(PICTURE, "PNG", icc_profile=profile)), PICTURE)


def test_icc_profiles_for_other_pixels_are_ignored():
    cmyk = Image.fromarray(PICTURE).convert("CMYK")
    assert np.array_equal(decode(saved(cmyk, "TIFF", icc_profile=linear_profile())), decode(saved(cmyk, "TIFF")))


def test_views_are_stored_without_loss():
    noise = np.random.default_rng(1).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    for view in (noise, PICTURE, np.zeros((1, 1, 3), np.uint8)):
        again = decode_png(encode_png(view))
        assert np.array_equal(again, view)
        assert again.flags.writeable
        assert np.array_equal(decode(encode_png(view)), view)


@pytest.mark.parametrize("data", [b"", FILES["png"][:-20], FILES["jpeg"], saved(GRAY, "PNG")])
def test_damaged_views_are_no_images_fault_but_the_files(data: bytes):
    with pytest.raises(DamagedDataError, match="make its file again"):
        decode_png(data)


@pytest.mark.parametrize("wrong", [PICTURE.astype(np.float32), GRAY, np.zeros((0, 4, 3), np.uint8)])
def test_only_rgb_is_encoded(wrong: np.ndarray):
    with pytest.raises(ValueError, match="encode_png takes"):
        encode_png(wrong)


def test_threads_share_it_and_pillow_stays_as_it_was():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    expected = {name: decode(data) for name, data in FILES.items()}
    with ThreadPoolExecutor(8) as pool:
        for name, rgb in pool.map(lambda name: (name, decode(FILES[name])), list(FILES) * 20):
            assert np.array_equal(rgb, expected[name])
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


# The awkward images of the shared data.

READABLE = {
    "gray8.png": (96, 96),
    "gray16.png": (64, 96),
    "rgb16.png": (64, 96),
    "bilevel1.png": (96, 96),
    "gray_alpha.png": (96, 96),
    "rgba_soft_alpha.png": (96, 96),
    "palette_transparent.png": (80, 120),
    "constant_colour.png": (48, 64),
    "width1_1x400.png": (400, 1),
    "height1_400x1.png": (1, 400),
    "single_pixel_1x1.png": (1, 1),
    "cmyk.jpg": (72, 128),
    "gray.jpg": (96, 96),
    "exif_rotated6.jpg": (120, 80),
    "progressive.jpg": (64, 96),
    "png_named.jpg": (64, 96),
    "lossy.webp": (80, 120),
    "lossless_alpha.webp": (96, 96),
    "animated.gif": (72, 64),
}
BROKEN = {
    "truncated.jpg": "truncated",
    "truncated.png": "truncated",
    "corrupt_data.png": "corrupt",
    "huge_header_60000x60000.png": "too_many_pixels",
    "not_an_image.jpg": "not_an_image",
    "empty.png": "empty",
}


def awkward(name: str) -> np.ndarray:
    return decode((AWKWARD / name).read_bytes())


@needs_awkward
def test_awkward_files_are_all_known():
    files = {path.name for path in AWKWARD.iterdir() if path.suffix in IMAGE_EXTENSIONS}
    assert files == set(READABLE) | set(BROKEN)


@needs_awkward
@pytest.mark.parametrize("name", READABLE)
def test_awkward_readable(name: str):
    assert awkward(name).shape == (*READABLE[name], 3)
    info = probe((AWKWARD / name).read_bytes())
    assert (info.height, info.width) == READABLE[name]


@needs_awkward
@pytest.mark.parametrize("name", BROKEN)
def test_awkward_broken(name: str):
    assert reason_of((AWKWARD / name).read_bytes()) == BROKEN[name]


@needs_awkward
def test_awkward_contents():
    assert (awkward("constant_colour.png") == (120, 130, 140)).all()
    for name in ("rgba_soft_alpha.png", "lossless_alpha.webp", "gray_alpha.png", "palette_transparent.png"):
        rgb = awkward(name)
        assert (rgb[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
        assert rgb[rgb.shape[0] // 2, rgb.shape[1] // 2].max() < 255
    with Image.open(AWKWARD / "gray16.png") as image:
        true_gray = np.asarray(image).astype(np.float64) * 255 / 65535
    gray = awkward("gray16.png")
    assert np.abs(gray - true_gray[..., None]).max() <= 0.5
    # The 16-bit colour picture is the same scene as the 16-bit gray one.
    luma = awkward("rgb16.png") @ np.array([0.299, 0.587, 0.114])
    assert np.corrcoef(luma.ravel(), gray[..., 0].ravel())[0, 1] > 0.9
    # A sunset: the sky in the upper middle is far more red than blue, the ground is dark.
    cmyk = awkward("cmyk.jpg").astype(float)
    assert (cmyk[30:40, :, 0].mean() - cmyk[30:40, :, 2].mean()) > 60
    assert cmyk[60:].mean() < 60
    # Upright, the red guitar stands in the middle, and its body is in the lower part.
    guitar = awkward("exif_rotated6.jpg").astype(float)
    redness = guitar[..., 0] - guitar[..., 1:].mean(axis=2)
    assert redness[60:110, 20:60].mean() > 2 * max(redness[:40].mean(), redness[:, :10].mean(), 10)
    assert set(np.unique(awkward("bilevel1.png"))) == {0, 255}
