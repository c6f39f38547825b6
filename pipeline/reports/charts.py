"""Line charts as SVG, for the figures of commands and benchmarks. They need no plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#264653", "#d1495b", "#e9a23b", "#2a9d8f", "#6a4c93", "#7f7f7f")

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 104, 44, 36  # pixels around the axes; the names of curves are on the right
_LINE_HEIGHT = 15
_LETTER_WIDTH = 7.3  # of the widest usual fonts


@dataclass(frozen=True)
class Curve:
    """Points (x, y) with a name; `joined` connects the points by lines."""

    name: str
    points: Sequence[tuple[float, float]]
    joined: bool = True


@dataclass(frozen=True)
class Chart:
    """Curves over one pair of axes.

    Attributes:
        title: The quantities, with units.
        curves: Each has at least one point. Curves with the same index have the same colour in all charts.
        log_x, log_y: Whether the axis of x or of y is logarithmic; all values on it must then be positive.
    """

    title: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False


def svg(charts: Sequence[Chart], width: int = 560, height: int = 420, columns: int | None = None) -> str:
    """An SVG document of charts.

    Args:
        charts: At least one.
        width: Pixels of each chart; more where a name is too long for the space on the right.
        height: Pixels of each chart.
        columns: Number of charts side by side; all if not given.
    """
    columns = columns or len(charts)
    longest = max(len(curve.name) for chart in charts for curve in chart.curves)
    margin = max(_RIGHT, math.ceil(16 + _LETTER_WIDTH * longest))
    width += margin - _RIGHT
    drawn = [
        f'<g transform="translate({number % columns * width} {number // columns * height})">'
        f"{''.join(_draw(chart, width, height, margin))}</g>"
        for number, chart in enumerate(charts)
    ]
    across, down = min(columns, len(charts)), math.ceil(len(charts) / columns)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * across}" height="{height * down}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        + "".join(drawn)
        + "</svg>\n"
    )


def _draw(chart: Chart, width: int, height: int, margin: int) -> Iterator[str]:
    points = [point for curve in chart.curves for point in curve.points]
    stretch_x: Callable[[float], float] = math.log10 if chart.log_x else float
    stretch_y: Callable[[float], float] = math.log10 if chart.log_y else float
    left, right = _widened([stretch_x(x) for x, _ in points])
    low, high = _widened([stretch_y(y) for _, y in points])

    def across(x: float) -> float:
        return _LEFT + (stretch_x(x) - left) / (right - left) * (width - _LEFT - margin)

    def down(y: float) -> float:
        return height - _BOTTOM - (stretch_y(y) - low) / (high - low) * (height - _TOP - _BOTTOM)

    yield f'<text x="{_LEFT}" y="24" font-size="13">{escape(chart.title)}</text>'
    for tick in _round_powers(low, high) if chart.log_y else round_numbers(low, high):
        y = down(tick)
        yield f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{width - margin}" y2="{y:.1f}" stroke="#ddd"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
    for tick in _round_powers(left, right) if chart.log_x else round_numbers(left, right):
        x = across(tick)
        yield f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{height - _BOTTOM}" stroke="#eee"/>'
        yield f'<text x="{x:.1f}" y="{height - _BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
    for number, curve in enumerate(chart.curves):
        colour = COLOURS[number % len(COLOURS)]
        places = [(across(x), down(y)) for x, y in curve.points]
        if curve.joined:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for x, y in places:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
    ends = [down(curve.points[-1][1]) for curve in chart.curves]
    for number, y in enumerate(_apart(ends, _LINE_HEIGHT)):
        colour, name = COLOURS[number % len(COLOURS)], escape(chart.curves[number].name)
        yield f'<text x="{width - margin + 8}" y="{y + 4:.1f}" fill="{colour}">{name}</text>'


def _widened(values: Sequence[float]) -> tuple[float, float]:
    """The range of values, widened on both sides by 4 % of it, or by 0.5 if all values are equal."""
    low, high = min(values), max(values)
    around = 0.04 * (high - low) or 0.5
    return low - around, high + around


def round_numbers(low: float, high: float) -> list[float]:
    """Ticks within the range: about seven multiples of 1, 2 or 5 times a power of ten."""
    step = (high - low) / 8
    power = 10.0 ** math.floor(math.log10(step))
    step = power * min((factor for factor in (1, 2, 5, 10) if factor * power >= step), default=10)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _round_powers(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis, whose logarithms lie within the range.

    They are 1, 2 and 5 times powers of ten, or in a range that has hardly any of these, round numbers.
    """
    candidates = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in (1, 2, 5)]
    ticks = [tick for tick in candidates if low <= math.log10(tick) <= high]
    return ticks if len(ticks) > 2 else round_numbers(10.0**low, 10.0**high)


def _apart(values: Sequence[float], distance: float) -> list[float]:
    """Moves values apart until no two are nearer than `distance`; they keep their order.

    Values that are too near form a cluster, which is spread about its mean.
    """
    clusters: list[list[int]] = []
    centre: list[float] = []
    for index in sorted(range(len(values)), key=values.__getitem__):
        clusters.append([index])
        centre.append(values[index])
        while len(clusters) > 1 and centre[-1] - centre[-2] < distance * (len(clusters[-1]) + len(clusters[-2])) / 2:
            upper = clusters.pop()
            clusters[-1] += upper
            centre.pop()
            centre[-1] = sum(values[index] for index in clusters[-1]) / len(clusters[-1])
    moved = list(values)
    for members, middle in zip(clusters, centre, strict=True):
        for place, index in enumerate(members):
            moved[index] = middle + (place - (len(members) - 1) / 2) * distance
    return moved
