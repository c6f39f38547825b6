"""Rate-quality curves of an evaluation of codecs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.codec import means
from pipeline.reports.charts import Chart, Curve


def charts(rows: Sequence[Mapping[str, Any]], more: Sequence[Curve] = ()) -> list[Chart]:
    """Charts of mean PSNR and of mean MS-SSIM over mean bits per pixel, with a curve for every codec.

    Args:
        rows: Rows of `pipeline.formats.tables.CODEC_EVALUATION`.
        more: Further curves for the chart of PSNR.
    """
    mean = means(rows)
    names = list(dict.fromkeys(codec for _, codec in mean))

    def curves(quantity: str) -> list[Curve]:
        return [
            Curve(name, [(figures["bpp"], figures[quantity]) for (_, codec), figures in mean.items() if codec == name])
            for name in names
        ]

    return [
        Chart("mean PSNR in dB over bits per pixel", [*curves("psnr"), *more], log_x=True),
        Chart("mean MS-SSIM over bits per pixel", curves("ms_ssim"), log_x=True),
    ]
