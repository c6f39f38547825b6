"""Curves of quality over time, of an evaluation of the front."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.evaluation.front import means
from pipeline.reports.charts import Chart, Curve

_CLOCKS = {"cpu_seconds": "CPU seconds an image", "seconds": "seconds an image"}
_MOST_SIMILAR = 1 - 1e-9  # its decibels are finite


def charts(rows: Sequence[Mapping[str, Any]], clock: str) -> list[Chart]:
    """Charts of mean PSNR, MS-SSIM and loss over mean seconds, with a curve for every method.

    MS-SSIM is drawn in decibels, as -10 log10(1 - MS-SSIM), since good pictures differ in its third digit.

    Args:
        rows: Rows of `pipeline.formats.tables.FRONT`.
        clock: "seconds" or "cpu_seconds".
    """
    mean = means(rows)
    names = list(dict.fromkeys(method for method, _ in mean))

    def curves(quantity: Callable[[Mapping[str, float]], float]) -> list[Curve]:
        points: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for (method, _), figures in mean.items():
            points[method].append((figures[clock], quantity(figures)))
        return [Curve(name, points[name]) for name in names]

    over = f"over {_CLOCKS[clock]}"
    return [
        Chart(f"mean PSNR in dB {over}", curves(lambda mean: mean["psnr"]), log_x=True),
        Chart(f"mean MS-SSIM in dB, -10 log10(1 - MS-SSIM), {over}", curves(_decibels), log_x=True),
        Chart(f"mean loss {over}", curves(lambda mean: mean["loss"]), log_x=True, log_y=True),
    ]


def _decibels(figures: Mapping[str, float]) -> float:
    return -10 * math.log10(1 - min(figures["ms_ssim"], _MOST_SIMILAR))
