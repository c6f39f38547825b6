"""The codec's benchmarks: bits by their definition, ways compared at one quality, curves read where they are."""

import math

import numpy as np
import pytest
import torch

from air.fitting.fit import fit
from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def _import_from_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_static_histograms_cost_the_entropy_of_the_symbols():
    pytest.importorskip("constriction", reason="the static histograms' coder is constriction's")
    from codec import static_histogram_bits

    generator = np.random.default_rng(3)
    symbols = np.stack([generator.geometric(0.3, 4000) - 50, generator.integers(0, 16, 4000), np.full(4000, 7)], axis=1)
    entropy = 0.0
    for channel in symbols.T:
        counts = np.unique(channel, return_counts=True)[1]
        entropy -= sum(count * math.log2(count / 4000) for count in counts)
    assert entropy <= static_histogram_bits(symbols.astype(np.int32)) < 1.01 * entropy + 64


def test_the_ways_are_compared_at_one_quality():
    data = pytest.importorskip("skimage.data", reason="the photograph comes with scikit-image")
    pytest.importorskip("constriction", reason="the static histograms' coder is constriction's")
    from codec import code_five_ways

    crop = np.ascontiguousarray(data.astronaut()[40:136, 160:288])
    gaussians = fit(crop, 30, num_gaussians=400).gaussians
    row = code_five_ways(gaussians, torch.from_numpy(crop).permute(2, 0, 1) / 255)
    assert row["gaussians"] == len(gaussians)
    assert row["psnr_exact"] > row["psnr_sensitivity"] >= row["psnr_uniform"]
    assert row["psnr_sensitivity"] < row["psnr_uniform"] + 0.3
    assert row["static"] < row["static_file"]
    assert row["sensitivity"] < 53


def test_curves_are_read_at_a_size_over_its_logarithm():
    from rate_distortion import quality_at

    curve = [(0.1, 20.0), (0.4, 24.0), (1.6, 26.0)]
    assert quality_at(0.2, curve) == pytest.approx(22)
    assert quality_at(0.4, curve) == pytest.approx(24)
    assert quality_at(3.2, curve) == pytest.approx(27)
    assert quality_at(0.09, curve) is None


def test_the_table_says_how_far_other_codecs_are_at_our_size(capsys):
    from rate_distortion import print_table

    def figures(bpp: float, psnr: float) -> dict[str, float]:
        return {
            "bpp": bpp,
            "psnr": psnr,
            "ms_ssim": 0.9,
            "num_gaussians": 1000.0,
            "encode_seconds": 1.0,
            "decode_seconds": 0.01,
        }

    means = {(0.15, "AIR"): figures(0.15, 26.0), (0.15, "X"): figures(0.16, 22.0)}
    means |= {(0.3, "AIR"): figures(0.3, 28.0), (0.3, "X"): figures(0.32, 24.0)}
    print_table(means)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines[0].startswith("| 0.15 | AIR | 0.150 | 26.00 |  |")
    assert lines[1].startswith("| 0.15 | GaussianImage, published | 0.15 | 25.0 | -1.00 |")
    assert lines[2].startswith("| 0.15 | X | 0.160 | 22.00 | none so small |")
    x_at_our_size = 22 + 2 * math.log2(0.3 / 0.16)
    assert lines[4].startswith(f"| 0.3 | X | 0.320 | 24.00 | {x_at_our_size - 28:+.2f} |")
