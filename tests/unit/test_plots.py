"""Plots hold their data, axes end at round numbers, and no text can become markup."""

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest

from kdcache.evaluate.page import page, paragraph, table
from kdcache.evaluate.plots import Point, Series, category_axis, escape, line_plot, number_axis, powers_axis

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert('x')</script> & \"quoted\" ]]> </svg></style>\x00\x08 \ud800 \uffff"


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        ([0.3, 9.7], ["0.0", "2.5", "5.0", "7.5", "10.0"]),
        ([3.0, 3.0], ["2.8", "2.9", "3.0", "3.1", "3.2"]),
        ([1e-4, 4e-4], ["0.0001", "0.0002", "0.0003", "0.0004"]),
        ([-200.0, 1500.0], ["-500", "0", "500", "1,000", "1,500"]),
    ],
)
def test_round_numbers(values, ticks):
    axis = number_axis("x", values)
    assert [label for _, label in axis.ticks] == ticks
    assert axis.low <= min(values) and max(values) <= axis.high


def test_axes():
    assert number_axis("x", [0.2, 1.0], percent=True, from_zero=True).ticks[-1][1] == "100%"
    assert [label for _, label in powers_axis("x", 100).ticks] == ["1", "2", "4", "8", "16", "32", "64", "128"]
    assert category_axis("x", ["a", "b"]).ticks == [(0, "a"), (1, "b")]


def test_every_point_is_where_it_belongs():
    points = [Point(float(i), i / 2, f"p{i}", spread=0.1, faint=i == 3) for i in range(4)]
    curve = Series("curve", [Point(float(i), 0.0, "") for i in range(9)], 1, marks=False)
    x, y = number_axis("x", [0.0, 8.0]), number_axis("y", [0.0, 2.0])
    tree = ET.fromstring(line_plot("t", x, y, [Series("line", points, 0), curve]))
    circles = tree.findall(f"{SVG}circle")
    assert [c.findtext(f"{SVG}title") for c in circles] == ["p0", "p1", "p2", "p3"]
    cx, cy = ([float(c.get(name)) for c in circles] for name in ("cx", "cy"))
    assert all(b - a == pytest.approx(cx[1] - cx[0], abs=0.11) for a, b in itertools.pairwise(cx))
    assert all(b - a == pytest.approx(cy[1] - cy[0], abs=0.11) for a, b in itertools.pairwise(cy)) and cy[1] < cy[0]
    lines = tree.findall(f"{SVG}polyline")
    assert [len(line.get("points").split()) for line in lines] == [3, 9], "the faint point is not joined"


def test_names_of_lines_that_end_together_stand_apart():
    some = [Series(f"line {i}", [Point(0, 1.0, ""), Point(1, 1.0, "")], i) for i in range(5)]
    tree = ET.fromstring(line_plot("t", number_axis("x", [0, 1]), number_axis("y", [0, 2]), some))
    places = sorted(float(e.get("y")) for e in tree.findall(f"{SVG}text") if (e.text or "").startswith("line"))
    assert len(places) == 5 and min(b - a for a, b in itertools.pairwise(places)) >= 11
    assert places[-1] < 270


def test_hostile_text_stays_text():
    series = [Series(HOSTILE, [Point(0, 1.0, HOSTILE)], 0)]
    svg = line_plot(HOSTILE, category_axis(HOSTILE, [HOSTILE]), number_axis(HOSTILE, [1.0]), series, standalone=True)
    tree = ET.fromstring(svg)
    assert not list(tree.iter(f"{SVG}script"))
    html = page(HOSTILE, [paragraph(HOSTILE), table(HOSTILE, [HOSTILE], [[escape(HOSTILE)]]), svg])
    assert "<script" not in html and "alert(&#x27;x&#x27;)" in html
    assert not re.search("[\x00-\x08\ud800-\udfff\uffff]", html)
    html.encode()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_has_no_place(bad):
    assert number_axis("y", [1.0, bad, 3.0]) == number_axis("y", [1.0, 3.0])
    number_axis("y", [bad, bad])
    points = [Point(0, 1.0, "there", spread=bad), Point(1, bad, "nowhere"), Point(2, 3.0, "there")]
    svg = line_plot("t", number_axis("x", [0, 2]), number_axis("y", [1.0, bad, 3.0]), [Series("line", points, 0), Series("none", points[1:2], 1)])  # fmt: skip
    assert len(ET.fromstring(svg).findall(f"{SVG}circle")) == 2
    assert not re.search("nan|inf", svg.split("</style>")[-1]) and "nowhere" not in svg
