"""Gates: what a candidate must reach on the frozen set to become the champion.

This module judges numbers that were measured; it must not know how, nor what follows from the verdict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from math import ceil, isnan, nan
from statistics import mean, median
from typing import Any

from pipeline.config import Config
from pipeline.retraining.config import GatesConfig

Rows = Sequence[Mapping[str, Any]]
"""Rows of `pipeline.formats.tables.EVALUATION`, one for each image."""


class Gate(Config):
    """One gate, and what the candidate reached.

    Attributes:
        name: The gate, such as "psnr_change" or "slice faces".
        passed: Whether it holds.
        reached: The candidate's number; None if nothing could be measured.
        needed: The bound.
        champion: The champion's number, where the gate compares with it.
        said: One phrase with the numbers.
    """

    name: str
    passed: bool
    reached: float | None
    needed: float
    champion: float | None
    said: str


def judge(
    rows: Rows, candidate: str, champion: str | None, diverged: int, encode_error: str, config: GatesConfig
) -> list[Gate]:
    """All gates, in a fixed order.

    Args:
        rows: What was measured, one row for each image and predictor.
        candidate: The candidate's name in the rows.
        champion: The champion's name; None if there is none, and then changes are not judged.
        diverged: Number of images for which the candidate's numbers were not finite.
        encode_error: Why the candidate could not encode an image; empty if it could.
        config: The bounds.
    """
    own = {row["key"]: row for row in rows if row["predictor"] == candidate}
    other = {row["key"]: row for row in rows if row["predictor"] == champion}
    gates = [
        _fact("finite", not diverged, f"images for which its numbers are not finite: {diverged}"),
        _fact("encodes", not encode_error, f"encoding one image: {encode_error or 'done'}"),
    ]
    gates += _quality("psnr", own, other, config.min_psnr, config.min_psnr_change, "mean PSNR, dB")
    gates += _quality("ms_ssim", own, other, config.min_ms_ssim, config.min_ms_ssim_change, "mean MS-SSIM")
    worst, other_worst = (_worst(found, config.worst_share) for found in (own, other))
    about = f"mean PSNR of the worst {config.worst_share:.0%}, dB"
    gates += _quality(
        "psnr", worst, other_worst, config.min_worst_psnr, config.min_worst_psnr_change, about, "worst_psnr"
    )
    for name, pattern in config.slices.items():
        inside, other_inside = (
            {key: row for key, row in found.items() if fnmatchcase(key, pattern)} for found in (own, other)
        )
        about, change = f"mean PSNR of {len(inside)} images {pattern}, dB", config.min_slice_psnr_change
        if not inside:
            gates.append(_fact(f"slice {name}", False, f"no image of the frozen set has a key like {pattern}"))
        else:
            gates += _quality("psnr", inside, other_inside, None, change, about, f"slice {name}", suffix="")
    return gates + list(_seconds(own, other, config))


def _quality(
    column: str,
    own: Mapping[str, Mapping[str, Any]],
    other: Mapping[str, Mapping[str, Any]],
    least: float | None,
    least_change: float,
    about: str,
    name: str = "",
    suffix: str = "_change",
) -> Iterator[Gate]:
    """The gates of a mean: the absolute one if there is a bound, and the change if there is a champion."""
    reached, before = (mean(row[column] for row in found.values()) if found else nan for found in (own, other))
    if least is not None:
        yield _gate(name or column, reached, least, about)
    if other or not own:
        yield _gate(f"{name or column}{suffix}", reached, before + least_change, about, champion=before)


def _worst(found: Mapping[str, Mapping[str, Any]], share: float) -> dict[str, Mapping[str, Any]]:
    """The images with the lowest PSNR, at least one."""
    ranked = sorted(found, key=lambda key: (found[key]["psnr"], key))
    return {key: found[key] for key in ranked[: ceil(share * len(ranked))]}


def _seconds(
    own: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]], config: GatesConfig
) -> Iterator[Gate]:
    if not own:
        return  # the gates of quality have failed
    if config.max_predict_seconds is not None:
        reached = median(row["predict_seconds"] for row in own.values())
        yield _gate("seconds", reached, config.max_predict_seconds, "median seconds of a prediction", at_most=True)
    shared = own.keys() & other.keys()
    if shared:
        ratio = median(own[key]["predict_seconds"] / max(other[key]["predict_seconds"], 1e-9) for key in shared)
        about = "median of prediction times by the champion's"
        yield _gate("seconds_ratio", ratio, config.max_predict_ratio, about, at_most=True, champion=1.0)


def _fact(name: str, holds: bool, said: str) -> Gate:
    return Gate(name=name, passed=holds, reached=float(holds), needed=1.0, champion=None, said=said)


def _gate(
    name: str, reached: float, needed: float, about: str, at_most: bool = False, champion: float | None = None
) -> Gate:
    passed = reached <= needed if at_most else reached >= needed  # false if a number is not one
    sign = "<=" if at_most else ">="
    against = "" if champion is None else f" (champion {champion:.4f})"
    return Gate(
        name=name,
        passed=passed,
        reached=None if isnan(reached) else reached,
        needed=0.0 if isnan(needed) else needed,
        champion=None if champion is None or isnan(champion) else champion,
        said=f"{about}: {reached:.4f}, needs {sign} {needed:.4f}{against}",
    )
