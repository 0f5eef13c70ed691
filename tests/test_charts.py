"""Charts: what is drawn where, that no peak is lost, and that no text becomes markup."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cytoclip import charts
from cytoclip.charts import Line, Points


def bars(svg: str) -> list[tuple[int, float, float]]:
    """(series, x, height) of each bar."""
    found = re.findall(r'<rect class="s(\d)" x="([\d.]+)" y="[\d.]+" width="[\d.]+" height="([\d.]+)"', svg)
    return [(int(s), float(x), float(height)) for s, x, height in found]


def test_histograms_of_one_value_and_of_many() -> None:
    one = charts.histogram("t", {"train": np.array([360, 360]), "val": np.array([360])}, (224, "read"))
    assert [(s, height) for s, _, height in bars(one.svg)] == [(0, 116), (1, 116)]
    assert ">360</text>" in one.svg
    assert 'class="mark"' not in one.svg
    many = charts.histogram("t", {"train": np.arange(1000)}, (500, "read"))
    drawn = bars(many.svg)
    assert len(drawn) == 24
    assert sum(height for *_, height in drawn) == pytest.approx(24 * 116, rel=0.03)
    assert 'class="mark" x1="160' in many.svg
    ratios = bars(charts.histogram("t", {"train": np.array([4 / 3, 4 / 3])}).svg)
    assert len(ratios) == 1
    assert 150 <= ratios[0][1] <= 165


def test_bars_are_shares_of_their_own_series() -> None:
    chart = charts.binned("t", np.array([0.0, 1, 2]), {"right": np.array([1, 3]), "wrong": np.array([200, 0])})
    assert [(s, round(height)) for s, _, height in bars(chart.svg)] == [(0, 29), (0, 87), (1, 116)]
    assert chart.rows == [("0 to 1", "25.0%", "100.0%"), ("1 to 2", "75.0%", "0.0%")]


@pytest.mark.parametrize("count", [3, 500, 501, 5_000, 200_000])
def test_a_thinned_curve_keeps_both_ends_and_every_extreme_of_a_stretch(count: int) -> None:
    y = np.random.default_rng(count).normal(size=count)
    y[count // 3], y[count // 2] = 50, -50
    x, kept = charts.thinned(np.arange(count, dtype=float), y)
    assert len(x) <= 500
    assert (x[0], x[-1]) == (0, count - 1)
    assert (kept.max(), kept.min()) == (50 if count > 3 else y.max(), -50)
    assert (kept == y[x.astype(int)]).all()
    assert (np.diff(x) > 0).all()


def test_what_is_not_finite_is_left_out() -> None:
    x, y = charts.thinned(np.array([1.0, 2, 3]), np.array([1.0, np.nan, np.inf]))
    assert (x.tolist(), y.tolist()) == ([1], [1])
    chart = charts.curves("t", [Line("none", np.array([1.0]), np.array([np.nan]))])
    assert "polyline" not in chart.svg
    assert "nan" not in chart.svg


def test_curves_stand_where_their_numbers_say() -> None:
    chart = charts.curves("loss", [Line("loss", np.array([0.0, 10]), np.array([0.0, 4]))], [("floor", 2.0)])
    (places,) = re.findall(r'points="([^"]+)"', chart.svg)
    (x0, y0), (x1, y1) = (tuple(map(float, place.split(","))) for place in places.split())
    level = float(re.findall(r'class="level"[^>]*y1="([\d.]+)"', chart.svg)[0])
    assert (x0, x1) == (42, 312)
    assert y0 > level > y1
    assert level == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert "floor 2" in chart.svg
    assert chart.rows == [("0", "0"), ("10", "4")]
    assert "from 0 to 4" in chart.summary


@pytest.mark.parametrize("value", [0.0, 5.0, -3e-9, 1e9])
def test_a_flat_curve_lies_in_the_middle(value: float) -> None:
    chart = charts.curves("t", [Line("a", np.array([1.0, 2]), np.array([value, value]))])
    (places,) = re.findall(r'points="([^"]+)"', chart.svg)
    assert [place.split(",")[1] for place in places.split()] == ["80.0", "80.0"]


def test_ends_have_their_names() -> None:
    chart = charts.curves("t", [Line("a", np.array([1.0, 0]), np.array([0.0, 1]))], ends=("start", "end"))
    assert ">start</text>" in chart.svg
    assert ">end</text>" in chart.svg


def test_points_of_one_name_share_colour_and_shape_and_nothing_leaves_the_drawing() -> None:
    xy = np.random.default_rng(0).normal(size=(50, 2)) * [1e-3, 2e-3]
    series = [Points("a", xy[:20]), Points("b", xy[20:40]), Points("a", xy[40:], open=True)]
    chart = charts.points("map", series, "a map")
    assert re.findall(r'class="point (full|open) c(\d)"', chart.svg) == [("full", "0"), ("full", "1"), ("open", "0")]
    height = int(re.findall(r'viewBox="0 0 320 (\d+)"', chart.svg)[0])
    places = [(float(x), float(y)) for x, y in re.findall(r"M([\d.-]+) ([\d.-]+)m", chart.svg)]
    assert len(places) == 50
    assert all(0 < x < 320 and 0 < y < height for x, y in places)
    assert [row[:3] for row in chart.rows] == [("a", "filled", "20"), ("b", "filled", "20"), ("a", "outline", "10")]


def test_one_place_for_all_points() -> None:
    chart = charts.points("map", [Points("a", np.zeros((4, 2)))], "a map")
    assert "nan" not in chart.svg


def test_a_matrix_is_shaded_by_rows_and_says_its_counts() -> None:
    chart = charts.matrix("confusion", ["a", "b"], np.array([[8.0, 2], [0, 0.5]]))
    assert re.findall(r'fill-opacity="([\d.]+)"', chart.svg) == ["0.48", "0.12", "0.00", "0.60"]
    assert "a taken for b: 2 (20%)" in chart.svg
    assert chart.summary == "confusion. 8.5 of 10.5 on the diagonal"
    assert charts.matrix("none", ["a"], np.zeros((1, 1))).rows == [("a", "0")]


def test_names_stay_text() -> None:
    evil = '"><script>alert(1)</script>'
    drawn = [
        charts.curves(evil, [Line(evil, np.array([1.0, 2]), np.array([1.0, 2]))], [(evil, 1.0)], ends=(evil, evil)),
        charts.matrix(evil, [evil], np.ones((1, 1))),
        charts.points(evil, [Points(evil, np.ones((3, 2)))], evil),
        charts.binned(evil, np.array([0.0, 1]), {evil: np.array([1])}, (0.5, evil)),
    ]
    assert not any("<script" in chart.svg for chart in drawn)
