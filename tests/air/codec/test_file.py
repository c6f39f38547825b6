"""The .air format: what is decoded is what was quantised, a prefix is a coarser image, and no damage passes unseen."""

import itertools
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch

import air
from air.codec.bitstream import read_sections, write_file
from air.codec.file import decode, decode_stages, encode_gaussians, encode_stages, read_header, read_info
from air.codec.sensitivity import SensitivityQuantizer
from air.codec.symbols import Stage, gaussians_of, lay_out, quantize_stages
from air.codec.uniform import channel_values, fit_uniform_quantizer
from air.encoding.encode import encode
from air.errors import CheckpointError, CodecError, TargetMissedError
from air.gaussians import Gaussians, anchors
from air.metrics import psnr
from air.predictor.load import load_predictor
from air.rendering.render import render
from air.stages.loop import run_stages
from air.warmup import kernels_of, warm_up
from tests.support.cases import random_gaussians

FIELDS = ("xy", "scale", "angle", "colour")
QUANTIZER = SensitivityQuantizer(step=3000)


def assert_equal(first: Gaussians, second: Gaussians) -> None:
    for name in FIELDS:
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype == torch.float32
        assert torch.equal(one, other), name


def own_quantised(stages: list[Stage], height: int, width: int, patch_size: int, quantizer) -> Gaussians:
    header, quantized = quantize_stages(stages, height, width, patch_size, quantizer)
    return Gaussians.concatenate([gaussians_of(stage, header) for stage in quantized])


def uniform_quantizer(stages: list[Stage], height: int, width: int, patch_size: int):
    grid = anchors(height, width, patch_size)
    values = [channel_values(stage.gaussians, grid[torch.from_numpy(stage.patch)]) for stage in stages]
    return fit_uniform_quantizer(torch.cat([torch.zeros(0, 8), *values]))


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """A crop of a photograph, 120 x 150 x 3."""
    data = pytest.importorskip("skimage.data", reason="the photograph comes with scikit-image")
    return np.ascontiguousarray(data.astronaut()[40:160, 150:300])


@pytest.fixture(scope="module")
def small_file() -> bytes:
    """Forty Gaussians in several stages, a few hundred bytes."""
    return encode_gaussians(random_gaussians(40, 30, 40, 3), 30, 40, QUANTIZER)


@pytest.mark.parametrize("kind", ["sensitivity", "uniform"])
@pytest.mark.parametrize(
    ("count", "height", "width"), [(1, 1, 1), (5, 1, 1), (1, 37, 1), (300, 41, 53), (900, 64, 17), (0, 12, 9)]
)
def test_decoding_gives_the_quantised_gaussians_bit_for_bit(kind: str, count: int, height: int, width: int):
    gaussians = random_gaussians(count, height, width, count, outside=3.0)
    patch_size = 5
    stages = lay_out(gaussians, height, width, patch_size)
    quantizer = QUANTIZER if kind == "sensitivity" else uniform_quantizer(stages, height, width, patch_size)
    decoded = decode(encode_stages(stages, height, width, patch_size, quantizer))
    expected = own_quantised(stages, height, width, patch_size, quantizer)
    assert_equal(decoded, expected)
    assert torch.equal(render(decoded, height, width), render(expected, height, width))
    if kind == "uniform":
        assert len(decoded) == len(gaussians)


def test_finer_steps_come_nearer_and_cost_more():
    gaussians = random_gaussians(200, 48, 48, 1)
    picture = render(gaussians, 48, 48)
    errors, sizes = [], []
    for step in (16000, 4000, 1000, 250):
        blob = encode_gaussians(gaussians, 48, 48, SensitivityQuantizer(step))
        errors.append(float((render(decode(blob), 48, 48) - picture).square().mean()))
        sizes.append(len(blob))
    assert sizes == sorted(sizes)
    assert all(finer < 0.35 * coarser for coarser, finer in itertools.pairwise(errors))


def test_every_number_errs_about_as_much_as_the_strength_does():
    # The rounding errors that `air.codec.sensitivity` predicts: eight numbers of each Gaussian, each of variance
    # step²/12 and weight π, three channels. Gaussians far apart, so that their errors add without touching.
    side, spacing = 12, 40
    generator = torch.Generator().manual_seed(5)
    count = side * side
    index = torch.arange(count)
    gaussians = Gaussians(
        torch.stack([index % side, index // side], dim=1) * spacing
        + 18
        + 4 * torch.rand(count, 2, generator=generator),
        torch.exp(torch.rand(count, 2, generator=generator)) * 1.5,
        torch.rand(count, generator=generator) * 7,
        0.2 + 0.6 * torch.rand(count, 3, generator=generator),
    )
    size = side * spacing
    step = 0.05
    blob = encode_gaussians(gaussians, size, size, SensitivityQuantizer(round(step * 65536)))
    error = float((render(decode(blob), size, size) - render(gaussians, size, size)).square().sum())
    predicted = count * 8 * np.pi * 3 * step**2 / 12
    assert 0.5 * predicted < error < 1.5 * predicted


def test_stages_of_the_stage_loop_keep_their_patches(photograph: np.ndarray):
    from air.optimization.config import OptimizeConfig
    from air.predictor.base import GridPredictor

    image = torch.from_numpy(photograph).permute(2, 0, 1) / 255
    results = list(run_stages(image, GridPredictor(8), [OptimizeConfig(steps=3)] * 3))
    from air.gaussians import activate

    stages = [Stage(r.patch.numpy(), activate(r.target, r.anchor, 8)) for r in results]
    quantizer = uniform_quantizer(stages, 120, 150, 8)
    decoded = decode_stages(encode_stages(stages, 120, 150, 8, quantizer))
    assert [stage.patch.tolist() for stage in decoded] == [stage.patch.tolist() for stage in stages]
    for stage, original in zip(decoded, stages, strict=True):
        assert float((stage.gaussians.xy - original.gaussians.xy).abs().max()) < 0.1


def test_a_prefix_is_a_coarser_image(small_file: bytes):
    info = read_info(small_file)
    whole = decode_stages(small_file)
    assert len(whole) == info.header.num_stages > 2
    for stages, end in enumerate(info.ends[:-1], start=1):
        for blob in (small_file, small_file[:end]):
            decoded = decode(blob, stages=stages)
            assert_equal(decoded, Gaussians.concatenate([stage.gaussians for stage in whole[:stages]]))
        with pytest.raises(CodecError, match=f"ask for its first {stages}$"):
            decode(small_file[:end])
    with pytest.raises(CodecError, match=r"cut off in stage 0 of .*: no stage of it is whole"):
        decode(small_file[: info.ends[0] - 1])
    assert len(decode(small_file, stages=0)) == 0
    with pytest.raises(ValueError, match="stages"):
        decode(small_file, stages=info.header.num_stages + 1)


def test_a_path_is_no_file():
    with pytest.raises(TypeError, match=r"from its bytes.*not str"):
        decode("photo.air")  # type: ignore[arg-type]


def test_the_header_says_what_was_encoded(small_file: bytes):
    header = read_header(small_file)
    assert (header.height, header.width) == (30, 40)
    assert header.quantizer == QUANTIZER
    assert sum(read_info(small_file).num_gaussians) == len(decode(small_file))


@pytest.mark.parametrize("byte", [0, 0xFF, None])
def test_no_changed_byte_passes(small_file: bytes, byte: int | None):
    for place in range(len(small_file)):
        changed = bytearray(small_file)
        changed[place] = changed[place] ^ 0x10 if byte is None else byte
        if bytes(changed) == small_file:
            continue
        with pytest.raises(CodecError):
            decode(bytes(changed))


def test_no_truncation_passes(small_file: bytes):
    for length in range(len(small_file)):
        with pytest.raises(CodecError):
            decode(small_file[:length])
    with pytest.raises(CodecError, match="follow"):
        decode(small_file + b"\0")


def test_stages_cannot_change_places():
    gaussians = random_gaussians(100, 40, 40, 4)
    blob = encode_gaussians(gaussians, 40, 40, QUANTIZER, patch_size=4)
    info = read_info(blob)
    start = info.ends[0]
    swapped = blob[:start] + blob[info.ends[1] : info.ends[2]] + blob[start : info.ends[1]] + blob[info.ends[2] :]
    with pytest.raises(CodecError, match="damaged"):
        decode(swapped)


def mutated(blob: bytes, generator: np.random.Generator) -> bytes:
    """The file with some bytes changed, removed, doubled or inserted."""
    data = bytearray(blob)
    for _ in range(int(generator.integers(1, 5))):
        place = int(generator.integers(0, len(data)))
        end = place + int(generator.integers(1, 9))
        match int(generator.integers(0, 4)):
            case 0:
                data[place] = int(generator.integers(0, 256))
            case 1 if len(data) > 20:
                del data[place:end]
            case 2:
                data[place:place] = data[place:end]
            case _:
                data[place:end] = generator.bytes(end - place)
    return bytes(data)


def resealed(blob: bytes) -> bytes:
    """The file with its checksums made right as far as its lengths make sense, so that a decoder looks further."""
    data = bytearray(blob)
    size = {0: 26 + 72, 1: 26 + 10}.get(data[5] if len(data) > 5 else -1)
    if size is None or len(data) < size + 4:
        return blob
    checksum = zlib.crc32(data[:size])
    data[size : size + 4] = struct.pack("<I", checksum)
    place = size + 4
    while place < len(data):
        start = place
        numbers = []
        for _ in range(2):
            value = shift = 0
            while place < len(data):
                byte = data[place]
                place += 1
                value |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
            numbers.append(value)
        end = place + numbers[1]
        if end + 4 > len(data):
            break
        checksum = zlib.crc32(data[start:end], checksum)
        data[end : end + 4] = struct.pack("<I", checksum)
        place = end + 4
    return bytes(data)


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("kind", ["sensitivity", "uniform"])
def test_thousands_of_damaged_files_are_refused_or_decoded_within_bounds(kind: str, sealed: bool, count: int):
    generator = np.random.default_rng(7 * count)
    gaussians = random_gaussians(30, 25, 31, 8)
    stages = lay_out(gaussians, 25, 31, 6)
    quantizer = QUANTIZER if kind == "sensitivity" else uniform_quantizer(stages, 25, 31, 6)
    blob = encode_stages(stages, 25, 31, 6, quantizer)
    decode(blob)
    refused = 0
    tracemalloc.start()
    for _ in range(count):
        damaged = mutated(blob, generator)
        if sealed:
            damaged = resealed(damaged)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            decoded = decode(damaged, max_pixels=1 << 20)
        except CodecError:
            refused += 1
        else:
            assert len(decoded) <= 64 * len(damaged)
            decoded.validate()
        # Half a megabyte is the models that every decoder has; the rest is in proportion to the file.
        assert tracemalloc.get_traced_memory()[1] - before < 1e6 + 20_000 * len(damaged)
    tracemalloc.stop()
    assert refused > count * (0.1 if sealed else 0.95)


def test_a_file_that_claims_a_billion_gaussians_is_refused_before_anything_is_allocated(small_file: bytes):
    header, sections = read_sections(small_file)
    claims = write_file(header, [(s.num_gaussians, s.payload, b"") for s in sections])
    assert claims == small_file
    end_of_header = len(small_file) - sum(
        len(s.payload) + 4 + sum(1 + (v > 127) + (v > 16383) for v in (s.num_gaussians, len(s.payload)))
        for s in sections
    )
    huge = (
        small_file[:end_of_header] + b"\x80\x94\xeb\xdc\x03" + small_file[end_of_header + 1 :]
    )  # 10^9 as 7 bits a byte
    tracemalloc.start()
    with pytest.raises(CodecError, match="1000000000 Gaussians"):
        decode(resealed(huge))
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_huge_images_are_refused_unless_allowed():
    blob = encode_gaussians(random_gaussians(3, 30, 30, 1), 5000, 5000, QUANTIZER)
    with pytest.raises(CodecError, match="max_pixels"):
        decode(blob, max_pixels=10_000)
    assert len(decode(blob)) == 3


def test_other_files_and_versions_are_named(small_file: bytes):
    with pytest.raises(CodecError, match=r"not an \.air file"):
        decode(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(CodecError, match="version 9"):
        decode(small_file[:4] + b"\x09" + small_file[5:])
    with pytest.raises(CodecError):
        decode(b"")


def test_the_same_cost_only_their_lowest_bits_and_the_weak_nothing():
    # Gaussians that are all alike: after the first few, every decision is foreseen, and raw bits remain.
    side, spacing = 40, 8
    index = torch.arange(side * side)
    gaussians = Gaussians(
        torch.stack([index % side, index // side], dim=1) * float(spacing) + 3.5,
        torch.full((side * side, 2), 4.0),
        torch.zeros(side * side),
        torch.full((side * side, 3), 0.5),
    )
    size = side * spacing
    blob = encode_gaussians(gaussians, size, size, QUANTIZER, patch_size=spacing)
    assert len(decode(blob)) == side * side
    assert len(blob) * 8 < 53 / 4 * side * side  # 53 bits are what method.md stores
    too_weak = Gaussians(gaussians.xy, gaussians.scale, gaussians.angle, gaussians.colour * 1e-4)
    assert len(decode(encode_gaussians(too_weak, size, size, QUANTIZER))) == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (13, 1), (23, 37)])
@pytest.mark.parametrize("content", ["noise", "one colour", "black"])
def test_images_of_any_size_and_content_are_encoded(shape: tuple[int, int], content: str):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    if content != "noise":
        image[:] = 0 if content == "black" else (200, 90, 30)
    blob = encode(image, gaussians=40, steps=10, stored_steps=5)
    header = read_header(blob)
    assert (header.height, header.width) == shape
    decoded = decode(blob)
    assert len(decoded) <= 40
    assert torch.isfinite(render(decoded, *shape)).all()


def test_bits_per_pixel_are_an_upper_bound_that_is_nearly_used(photograph: np.ndarray):
    for bpp in (0.3, 1.0):
        blob = encode(photograph, bpp=bpp, steps=30, stored_steps=10)
        assert 0.9 * bpp <= len(blob) * 8 / photograph[..., 0].size <= bpp
    with pytest.raises(TargetMissedError, match="too few"):
        encode(photograph, bpp=0.001, steps=2)


def test_decibels_are_a_lower_bound_that_is_nearly_met(photograph: np.ndarray):
    target = torch.from_numpy(photograph).permute(2, 0, 1) / 255
    for wanted in (24.0, 28.0):
        blob = encode(photograph, psnr=wanted, steps=30, stored_steps=10)
        reached = psnr(render(decode(blob), 120, 150), target)
        assert wanted - 1e-3 <= reached < wanted + 0.5
    with pytest.raises(TargetMissedError, match="not reached"):
        encode(photograph, psnr=90, steps=1, stored_steps=0)


def test_refining_the_quantised_gaussians_pays(photograph: np.ndarray):
    target = torch.from_numpy(photograph).permute(2, 0, 1) / 255
    plain = encode(photograph, gaussians=1500, steps=60, stored_steps=0)
    refined = encode(photograph, gaussians=1500, steps=60, stored_steps=40)
    gain = psnr(render(decode(refined), 120, 150), target) - psnr(render(decode(plain), 120, 150), target)
    assert gain > 0.15
    assert len(refined) < 1.03 * len(plain)


def test_threads_do_not_change_the_file(photograph: np.ndarray):
    assert encode(photograph, gaussians=200, steps=5, threads=2) == encode(photograph, gaussians=200, steps=5)


def test_the_shipped_predictor_starts_without_a_target_and_growing_with_one(photograph: np.ndarray):
    quick = {"steps": 2, "stored_steps": 1}
    assert encode(photograph, **quick) == encode(photograph, predictor=load_predictor("compact"), **quick)
    grown = encode(photograph, gaussians=100, **quick)
    assert grown == encode(photograph, predictor="grow", gaussians=100, **quick)
    assert grown != encode(photograph, predictor="compact", gaussians=100, **quick)
    assert read_info(encode(photograph, predictor="grid", stages=1, **quick)).header.num_stages == 1
    with pytest.raises(ValueError, match="needs a predictor"):
        encode(photograph, gaussians=100, stages=1)
    with pytest.raises(ValueError, match="stages must be a whole number, at least 1, got 0"):
        encode(photograph, stages=0)
    with pytest.raises(CheckpointError, match="'gorw': give grow, grid, compact or a file"):
        encode(photograph, predictor="gorw")


def test_wrong_targets_are_refused(photograph: np.ndarray):
    with pytest.raises(ValueError, match="one target"):
        encode(photograph, bpp=1, psnr=30)
    with pytest.raises(ValueError, match="bpp"):
        encode(photograph, bpp=0)
    with pytest.raises(ValueError, match="gaussians"):
        encode(photograph, gaussians=0)


def test_the_package_exports_both_ways(photograph: np.ndarray):
    blob = air.encode(photograph[:20, :20], gaussians=5, steps=2, stored_steps=0)
    assert isinstance(air.decode(blob), Gaussians)


def test_kernels_are_known_to_be_compiled():
    for task in ("decode", "encode"):
        warm_up(task)
        assert kernels_of(task).is_compiled()


@pytest.mark.slow
def test_one_process_of_a_machine_compiles_and_the_others_wait(tmp_path):
    """Of two that start together with an empty cache, one finds what the other has compiled."""
    program = (
        "from air.codec.file import KERNELS\n"
        "from air.codec.sections import code_section\n"
        "assert not KERNELS.is_compiled()\n"
        "KERNELS.compile()\n"
        "print(len(code_section.stats.cache_misses))\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate()[0].strip() for process in both) == ["0", "1"]
