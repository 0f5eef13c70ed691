"""The picture of a soup: every score where it belongs, in one file that asks for nothing."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest

from cytoclip import soup_curve
from cytoclip.soup_curve import Curve

SVG = "{http://www.w3.org/2000/svg}"
VAL = Curve("val hits", [(0.0, 0.1), (0.5, 0.3), (1.0, 0.2)], [("mean of <2> & 4", 0.25)], 0.3)
KEEP = Curve("keep hits", [(0.0, 0.5), (0.5, 0.45), (1.0, 0.2)], [("mean of <2> & 4", 0.4)], 0.45, floor=0.44)


def test_it_is_one_file_that_says_what_it_shows() -> None:
    drawn = soup_curve.svg([VAL, KEEP], 0.5, "alpha 0.5")
    page = ET.fromstring(drawn)  # noqa: S314 - made here
    assert page.findtext(f"{SVG}title") == (
        "val hits and keep hits between the starting model and the last step; chosen: alpha 0.5"
    )
    words = [text.text for text in page.iter(f"{SVG}text")]
    for said in ("val hits", "keep hits, dotted: the lowest allowed", "○ chosen: alpha 0.5", "A: mean of <2> & 4"):
        assert said in words
    assert not re.search(r"href|url\(|script|@import", drawn)


def test_higher_is_higher_and_alpha_goes_to_the_right() -> None:
    page = ET.fromstring(soup_curve.svg([VAL, KEEP], 0.5, "alpha 0.5"))  # noqa: S314
    lines = [
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        for line in page.iter(f"{SVG}polyline")
    ]
    heights = {}
    for curve, line in zip((VAL, KEEP), lines, strict=True):
        assert [x for x, _ in line] == [64, 282, 500]
        heights |= {score: y for (_, score), (_, y) in zip(curve.points, line, strict=True)}
    assert sorted(heights, reverse=True) == sorted(heights, key=lambda score: heights[score])
    each = (heights[0.1] - heights[0.5]) / 0.4
    assert heights[0.3] == pytest.approx(heights[0.1] - 0.2 * each, abs=0.2), "one scale for all"
    rings = [c.attrib for c in page.iter(f"{SVG}circle") if c.attrib["class"] == "ring"]
    assert [(float(ring["cx"]), float(ring["cy"])) for ring in rings] == [(282, heights[0.3]), (282, heights[0.45])]


def test_a_model_beside_the_line_may_be_chosen_and_equal_scores_have_a_scale() -> None:
    flat = Curve("val mrr", [(0.0, 0.2), (1.0, 0.2)], [("step 4 (best/)", 0.2)], 0.2)
    page = ET.fromstring(soup_curve.svg([flat], None, "step 4 (best/)"))  # noqa: S314
    (ring,) = [c.attrib for c in page.iter(f"{SVG}circle") if c.attrib["class"] == "ring"]
    assert float(ring["cx"]) > 500


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0.061, 0.168, [0.08, 0.1, 0.12, 0.14, 0.16]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (0.49, 0.51, [0.49, 0.495, 0.5, 0.505, 0.51]),
])  # fmt: skip
def test_the_scale_has_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert soup_curve._round_values(low, high) == pytest.approx(expected)
