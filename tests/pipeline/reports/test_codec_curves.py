"""Rate-quality curves: a curve for every codec, a point for every target, each a mean over images."""

import pytest

from pipeline.reports.charts import Curve
from pipeline.reports.codec_curves import charts


def row(target: float, codec: str, bpp: float, psnr: float, ms_ssim: float) -> dict:
    figures = {"bpp": bpp, "psnr": psnr, "ms_ssim": ms_ssim}
    return {
        "target_bpp": target,
        "codec": codec,
        **figures,
        "num_gaussians": 1,
        "encode_seconds": 1,
        "decode_seconds": 1,
    }


ROWS = [
    row(0.5, "AIR", 0.4, 30.0, 0.90),
    row(0.5, "JPEG", 0.3, 28.0, 0.80),
    row(1.0, "AIR", 0.9, 33.0, 0.94),
    row(1.0, "JPEG", 0.8, 31.0, 0.90),
    row(0.5, "AIR", 0.5, 31.0, 0.92),
    row(0.5, "JPEG", 0.5, 29.0, 0.82),
    row(1.0, "AIR", 1.0, 35.0, 0.96),
    row(1.0, "JPEG", 1.0, 32.0, 0.92),
]


def test_points_are_means_over_images() -> None:
    psnr, ms_ssim = charts(ROWS)
    assert [curve.name for curve in psnr.curves] == [curve.name for curve in ms_ssim.curves] == ["AIR", "JPEG"]
    assert psnr.log_x
    assert ms_ssim.log_x
    air, jpeg = psnr.curves
    assert air.points == [pytest.approx((0.45, 30.5)), pytest.approx((0.95, 34.0))]
    assert jpeg.points == [pytest.approx((0.4, 28.5)), pytest.approx((0.9, 31.5))]
    assert ms_ssim.curves[0].points == [pytest.approx((0.45, 0.91)), pytest.approx((0.95, 0.95))]


def test_further_curves_join_the_chart_of_psnr() -> None:
    further = Curve("published", [(0.5, 29.0)])
    psnr, ms_ssim = charts(ROWS, [further])
    assert psnr.curves[-1] is further
    assert len(ms_ssim.curves) == 2
