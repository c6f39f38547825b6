"""Charts: points where their numbers say, names that can be told apart, a document that a browser reads."""

import itertools
import math
from xml.etree import ElementTree

import pytest

from pipeline.reports.charts import Chart, Curve, round_numbers, svg

NAMESPACE = "{http://www.w3.org/2000/svg}"


def circles(document: str) -> list[tuple[float, float]]:
    found = ElementTree.fromstring(document).iter(f"{NAMESPACE}circle")
    return [(float(circle.attrib["cx"]), float(circle.attrib["cy"])) for circle in found]


def ticks(document: str) -> dict[str, tuple[float, float]]:
    """Places of all texts."""
    found = ElementTree.fromstring(document).iter(f"{NAMESPACE}text")
    return {text.text or "": (float(text.attrib["x"]), float(text.attrib["y"])) for text in found}


@pytest.mark.parametrize("log_x", [False, True])
def test_points_lie_where_the_axes_say(log_x: bool) -> None:
    points = [(1.0, 10.0), (2.0, 12.0), (5.0, 20.0)]
    document = svg([Chart("title", [Curve("a", points)], log_x)])
    texts = ticks(document)
    for (x, y), (across, down) in zip(points, circles(document), strict=True):
        if f"{x:g}" in texts:
            assert texts[f"{x:g}"][0] == pytest.approx(across, abs=0.2)
        if f"{y:g}" in texts:
            assert texts[f"{y:g}"][1] - 4 == pytest.approx(down, abs=0.2)
    assert {"1", "2", "5", "10", "12", "20"} <= set(texts)
    stretch = math.log if log_x else float
    (x0, y0), (x1, y1), (x2, y2) = circles(document)
    assert (x1 - x0) / (x2 - x0) == pytest.approx((stretch(2) - stretch(1)) / (stretch(5) - stretch(1)), abs=2e-3)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(0.2, abs=2e-3)


def test_names_do_not_overlap_and_may_hold_any_character() -> None:
    curves = [Curve(f"<{number} & more>", [(0, 0), (1, 1 + number / 1000)]) for number in range(6)]
    places = sorted(place[1] for text, place in ticks(svg([Chart("t", curves)])).items() if text.startswith("<"))
    assert len(places) == 6
    assert all(below - above >= 14.9 for above, below in itertools.pairwise(places))


def test_charts_stand_side_by_side_and_points_may_stay_apart() -> None:
    chart = Chart("one point", [Curve("x", [(3.0, 4.0)], joined=False)])
    document = svg([chart, chart], width=300, height=200)
    root = ElementTree.fromstring(document)
    assert (root.attrib["width"], root.attrib["height"]) == ("600", "200")
    assert len(circles(document)) == 2
    assert not list(root.iter(f"{NAMESPACE}polyline"))
    for x, y in circles(document):
        assert 0 < x < 300
        assert 0 < y < 200


def test_charts_may_stand_in_rows() -> None:
    chart = Chart("t", [Curve("x", [(3.0, 4.0)])])
    root = ElementTree.fromstring(svg([chart] * 3, width=300, height=200, columns=2))
    assert (root.attrib["width"], root.attrib["height"]) == ("600", "400")
    moves = [group.attrib["transform"] for group in root.iter(f"{NAMESPACE}g")]
    assert moves == ["translate(0 0)", "translate(300 0)", "translate(0 200)"]


def test_a_long_name_is_within_its_chart_and_right_of_all_points() -> None:
    name = "a name of forty letters, digits or signs"
    document = svg([Chart("t", [Curve(name, [(0, 0), (1, 1)]), Curve("short", [(0, 1), (2, 2)])])], width=300)
    width = float(ElementTree.fromstring(document).attrib["width"])
    begin = ticks(document)[name][0]
    assert begin + 7 * len(name) <= width  # 7 pixels a letter, at 12 pixels
    assert max(x for x, _ in circles(document)) < begin


def test_a_logarithmic_axis_of_y_is_evenly_divided_by_factors() -> None:
    document = svg([Chart("t", [Curve("x", [(20, 0.1), (21, 1.0), (22, 10.0)])], log_y=True)])
    (_, bottom), (_, middle), (_, top) = circles(document)
    assert middle - top == pytest.approx(bottom - middle, abs=0.2)
    assert ticks(document)["1"][1] - 4 == pytest.approx(middle, abs=0.2)
    assert {"0.1", "0.2", "0.5", "2", "5", "10"} <= set(ticks(document))


def test_a_short_logarithmic_axis_has_ticks_too() -> None:
    document = svg([Chart("t", [Curve("x", [(1, 0.021), (2, 0.046)])], log_y=True)])
    assert {"0.025", "0.03", "0.035", "0.04", "0.045"} <= set(ticks(document))


def test_round_numbers_are_round_and_within() -> None:
    assert round_numbers(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert round_numbers(23.4, 40.1) == pytest.approx([25, 30, 35, 40])
    assert round_numbers(-0.03, 0.02) == pytest.approx([-0.03, -0.02, -0.01, 0, 0.01, 0.02])
