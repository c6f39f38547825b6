"""Curves of quality over time: a curve for every method, a point for every number of steps."""

from xml.etree import ElementTree

import pytest

from pipeline.reports.charts import svg
from pipeline.reports.front_curves import charts


def row(method: str, steps: int, psnr: float, ms_ssim: float, seconds: float) -> dict:
    times = {"seconds": seconds, "cpu_seconds": seconds / 2}
    return {"method": method, "steps": steps, "num_gaussians": 1, "psnr": psnr, "ms_ssim": ms_ssim, "loss": 0.1} | times


ROWS = [
    row("network", 0, 30.0, 0.90, 0.4),
    row("fit", 0, 20.0, 0.70, 0.1),
    row("network", 10, 34.0, 0.99, 0.8),
    row("fit", 10, 36.0, 1.0, 0.3),
    row("network", 0, 32.0, 0.90, 0.6),
    row("fit", 0, 22.0, 0.90, 0.1),
    row("network", 10, 36.0, 0.99, 0.8),
    row("fit", 10, 38.0, 1.0, 0.3),
]


@pytest.mark.parametrize(("clock", "factor"), [("seconds", 1.0), ("cpu_seconds", 0.5)])
def test_points_are_means_over_images(clock: str, factor: float) -> None:
    psnr, ms_ssim, loss = charts(ROWS, clock)
    for chart in (psnr, ms_ssim, loss):
        assert [curve.name for curve in chart.curves] == ["network", "fit"]
        assert chart.log_x
    network, fit = psnr.curves
    assert network.points == [pytest.approx((0.5 * factor, 31.0)), pytest.approx((0.8 * factor, 35.0))]
    assert fit.points == [pytest.approx((0.1 * factor, 21.0)), pytest.approx((0.3 * factor, 37.0))]
    assert [y for _, y in ms_ssim.curves[0].points] == pytest.approx([10, 20])  # 1 - 0.9 and 1 - 0.99 in dB
    assert loss.log_y
    assert ("CPU" in psnr.title) == (clock == "cpu_seconds")


def test_a_perfect_picture_can_be_drawn() -> None:
    ElementTree.fromstring(svg(charts(ROWS, "seconds")))
