"""Charts as SVG without a script: histograms, curves, maps of points, and a matrix of counts.

Every chart carries its numbers too, as a table for those who cannot see it. Series are told apart by more than colour:
bars by filling, lines by their dashes, points by their shape.

Letters: N values, P points, K classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

BINS = 24
MOST_POINTS = 500  # of a curve
WIDTH = 320  # of every chart, in its own units
_BARS_BOTTOM, _BARS_HEIGHT = 120, 116
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 312, 10, 150  # of the plotting area of curves
_SHAPES = 6  # of points; later series begin again with the first
_TABLE_ROWS = 12  # of a curve's table


@dataclass(frozen=True)
class Chart:
    """A drawing, and its numbers in words.

    Parameters
    ----------
    summary
        What a screen reader says instead of the drawing.
    head, rows
        The table of its numbers.
    key
        Names of the series, in the order of their colours; none where there is only one.
    """

    title: str
    svg: Markup
    summary: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    key: Sequence[str] = ()
    kind: str = "bar"

    def marker(self, number: int) -> Markup:
        """The point of a series, for its key."""
        path = _shape_path(number, np.array([[12.0, 6.0]]), 4.0)
        return Markup(f'<path class="point full c{number}" d="{path}"/>')  # noqa: S704 - numbers only


@dataclass(frozen=True)
class Line:
    """One curve; what is not finite is left out."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """One series of a map, (P, 2); `open` ones are drawn as outlines."""

    name: str
    xy: NDArray[np.float64]
    open: bool = False


def histogram(title: str, series: Mapping[str, NDArray[Any]], mark: tuple[float, str] | None = None) -> Chart:
    """Shares of each series; `mark` is where a limit lies and what it is called, drawn where it is in sight."""
    edges, counts = _binned(list(series.values()))
    return binned(title, edges, dict(zip(series, counts, strict=True)), mark)


def binned(
    title: str,
    edges: NDArray[np.float64],
    counts: Mapping[str, NDArray[np.int64]],
    mark: tuple[float, str] | None = None,
) -> Chart:
    """The same from counts that are there already."""
    shares = [count / max(int(count.sum()), 1) for count in counts.values()]
    bins, top = len(edges) - 1, max(max(float(share.max()) for share in shares), 1e-12)
    each = WIDTH / bins
    parts = []
    for s, share in enumerate(shares):
        for i in np.flatnonzero(share):
            height = share[i] / top * _BARS_HEIGHT
            x, wide = i * each + s * each * 0.9 / len(shares), each * 0.9 / len(shares)
            parts.append(
                f'<rect class="s{s}" x="{x:.2f}" y="{_BARS_BOTTOM - height:.2f}" width="{wide:.2f}" '
                f'height="{height:.2f}"><title>{_ticked(edges[i])} to {_ticked(edges[i + 1])}: {share[i]:.1%}'
                "</title></rect>"
            )
    parts.append(f'<line class="axis" x1="0" x2="{WIDTH}" y1="{_BARS_BOTTOM}" y2="{_BARS_BOTTOM}"/>')
    parts += _marked(edges, mark)
    low, high = _inner(edges)
    parts += [_text(0, 135, _ticked(low)), _text(WIDTH, 135, _ticked(high), "end")]
    rows = [
        (f"{_ticked(edges[i])} to {_ticked(edges[i + 1])}", *(f"{share[i]:.1%}" for share in shares))
        for i in range(bins)
        if any(share[i] for share in shares)
    ]
    ranges = "; ".join(
        f"{name}: most at {_ticked(edges[int(count.argmax())])} to {_ticked(edges[int(count.argmax()) + 1])}"
        for name, count in counts.items()
    )
    svg = _svg(parts, 140, f"{title}. {ranges}")
    return Chart(title, svg, f"{title}. {ranges}", ("range", *counts), rows, tuple(counts))


def curves(
    title: str,
    lines: Sequence[Line],
    levels: Sequence[tuple[str, float]] = (),
    x_name: str = "step",
    dots: bool = False,
    ends: tuple[str, str] | None = None,
) -> Chart:
    """Lines over steps; `levels` are horizontal ones with their name, such as what knowing nothing costs.

    Parameters
    ----------
    dots
        Draw each point as well, as where a validation was.
    ends
        What the first and the last point of the first line are called, where x is no time.
    """
    drawn = [Line(line.name, *thinned(line.x, line.y)) for line in lines]
    drawn = [line for line in drawn if len(line.x)]
    every = [line.y for line in drawn] + [np.array([level]) for _, level in levels]
    x_low, x_high = _range([line.x for line in drawn], 0.0)
    y_low, y_high = _range(every, 0.04)
    xs = [(line.x - x_low) / (x_high - x_low) * (_RIGHT - _LEFT) + _LEFT for line in drawn]
    ys = [_BOTTOM - (line.y - y_low) / (y_high - y_low) * (_BOTTOM - _TOP) for line in drawn]
    parts = _axes(x_low, x_high, y_low, y_high, x_name)
    for name, level in levels:
        at = _BOTTOM - (level - y_low) / (y_high - y_low) * (_BOTTOM - _TOP)
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{_RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(_RIGHT, at - 3 if at > _TOP + 12 else at + 11, f"{name} {_ticked(level)}", "end"))
    for s, (x, y) in enumerate(zip(xs, ys, strict=True)):
        places = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        parts.append(f'<polyline class="line c{s}" points="{places}"/>')
        if dots or len(x) == 1:
            parts.append(f'<path class="dot c{s}" d="{_shape_path(s, np.column_stack([x, y]), 3.0)}"/>')
    if ends and drawn:
        parts += [_named_point(xs[0][i], ys[0][i], name) for i, name in zip((0, -1), ends, strict=True)]
    summary = f"{title}. " + "; ".join(f"{line.name}: {_said(line)}" for line in drawn)
    rows = _curve_rows(drawn)
    head = (x_name, *(line.name for line in drawn))
    names = tuple(line.name for line in drawn) if len(drawn) > 1 else ()
    return Chart(title, _svg(parts, 176, summary), summary, head, rows, names, "line")


def points(title: str, series: Sequence[Points], summary: str) -> Chart:
    """A map without axes: what is near is alike. One shape and colour for each name, outlines for `open` ones."""
    names = list(dict.fromkeys(one.name for one in series))
    every = np.concatenate([one.xy for one in series])
    low, high = every.min(axis=0), every.max(axis=0)
    scale = 296 / max(float((high - low).max()), 1e-12)
    height = float((high - low)[1]) * scale + 24
    parts = []
    for one in series:
        placed = (one.xy - low) * scale + 12
        number = names.index(one.name)
        style = "open" if one.open else "full"
        parts.append(f'<path class="point {style} c{number}" d="{_shape_path(number, placed, 2.6)}"/>')
    rows = [
        (one.name, "outline" if one.open else "filled", str(len(one.xy)), *(f"{v:.2f}" for v in one.xy.mean(axis=0)))
        for one in series
    ]
    head = ("colour", "drawn", "points", "mean, across", "mean, down")
    return Chart(title, _svg(parts, round(height), summary), summary, head, rows, tuple(names), "point")


def matrix(title: str, names: Sequence[str], counts_KK: NDArray[np.float64]) -> Chart:
    """How often each true class (row) was taken for each class (column), shaded by the share of its row.

    Counts need not be whole: a class that ties with another shares its pictures with it. Columns are numbered.
    """
    shares_KK = counts_KK / np.maximum(counts_KK.sum(axis=1, keepdims=True), 1e-12)
    left, top, size = 104, 16, len(names)
    each = (WIDTH - left) / max(size, 1)
    tall = min(each, 30.0)
    parts = []
    for i, name in enumerate(names):
        parts.append(_text(left - 6, top + (i + 0.5) * tall + 4, f"{_short(name, 14)} {i + 1}", "end"))
        if each >= 12:
            parts.append(_text(left + (i + 0.5) * each, top - 5, str(i + 1), "middle"))
        for j, other in enumerate(names):
            x, y, share = left + j * each, top + i * tall, float(shares_KK[i, j])
            parts.append(
                f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{each:.1f}" height="{tall:.1f}" '
                f'fill-opacity="{share * 0.6:.2f}"><title>{escape(name)} taken for {escape(other)}: '
                f"{counts_KK[i, j]:.4g} ({share:.0%})</title></rect>"
            )
            if each >= 24 and counts_KK[i, j]:
                parts.append(_text(x + each / 2, y + tall / 2 + 4, f"{counts_KK[i, j]:.4g}", "middle", "count"))
    summary = f"{title}. {np.trace(counts_KK):.4g} of {counts_KK.sum():.4g} on the diagonal"
    rows = [(name, *(f"{count:.4g}" for count in counts_KK[i])) for i, name in enumerate(names)]
    svg = _svg(parts, round(top + tall * size + 6), summary)
    return Chart(title, svg, summary, ("true \\ taken for", *names), rows, (), "matrix")


def thinned(
    x: NDArray[np.float64], y: NDArray[np.float64], most: int = MOST_POINTS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most `most` points of a curve: the lowest and the highest of each stretch, and the first and the last.

    No peak is lost, however long the curve; what is not finite is left out.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(y), (most - 2) // 2 + 1).astype(np.int64)
    kept = {0, len(y) - 1}
    for begin, end in itertools.pairwise(edges):
        kept |= {begin + int(y[begin:end].argmin()), begin + int(y[begin:end].argmax())}
    rows = np.array(sorted(kept), np.int64)
    return x[rows], y[rows]


def _binned(series: Sequence[NDArray[Any]]) -> tuple[NDArray[np.float64], list[NDArray[np.int64]]]:
    everything = np.concatenate(series)
    low, high = float(everything.min()), float(everything.max())
    bins = BINS
    if everything.dtype.kind == "i":
        bins = int(min(BINS, high - low + 1))
        edges = np.linspace(low - 0.5, high + 0.5, bins + 1)
    else:  # ratios: so wide that equal ones stand in the middle
        low, high = min(low, (low + high) / 2 - 0.25), max(high, (low + high) / 2 + 0.25)
        edges = np.linspace(low, high, bins + 1)
    return edges, [np.histogram(values, edges)[0] for values in series]


def _inner(edges: NDArray[np.float64]) -> tuple[float, float]:
    """What is written at the two ends: whole numbers stand in the middle of their bars."""
    halves = edges[0] % 1 == 0.5 and edges[-1] % 1 == 0.5
    return (edges[0] + 0.5, edges[-1] - 0.5) if halves else (edges[0], edges[-1])


def _marked(edges: NDArray[np.float64], mark: tuple[float, str] | None) -> list[str]:
    if mark is None or not edges[0] <= mark[0] <= edges[-1]:
        return []
    at = (mark[0] - edges[0]) / (edges[-1] - edges[0]) * WIDTH
    return [
        f'<line class="mark" x1="{at:.2f}" x2="{at:.2f}" y1="4" y2="{_BARS_BOTTOM}"/>',
        _text(at - 4, 14, mark[1], "end") if at > WIDTH / 3 else _text(at + 4, 14, mark[1]),
    ]


def _range(values: Sequence[NDArray[np.float64]], margin: float) -> tuple[float, float]:
    found = [one for one in values if len(one)]
    if not found:
        return 0.0, 1.0
    low, high = min(float(one.min()) for one in found), max(float(one.max()) for one in found)
    if high == low:
        room = abs(low) * 0.5 or 0.5
        return low - room, high + room
    return low - margin * (high - low), high + margin * (high - low)


def _axes(x_low: float, x_high: float, y_low: float, y_high: float, x_name: str) -> list[str]:
    parts = []
    for value in _steps(y_low, y_high):
        y = _BOTTOM - (value - y_low) / (y_high - y_low) * (_BOTTOM - _TOP)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 5, y + 4, _ticked(value), "end"))
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{_BOTTOM}" y2="{_BOTTOM}"/>')
    parts.append(_text(_LEFT, 165, _ticked(x_low)))
    parts.append(_text((_LEFT + _RIGHT) / 2, 165, x_name, "middle"))
    parts.append(_text(_RIGHT, 165, _ticked(x_high), "end"))
    return parts


def _named_point(x: float, y: float, name: str) -> str:
    left = x > (_LEFT + _RIGHT) / 2
    return _text(x - 6 if left else x + 6, y + 12 if y < _TOP + 20 else y - 5, name, "end" if left else "start")


def _steps(low: float, high: float) -> list[float]:
    """Three to six round numbers of the range."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


def _curve_rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Up to twelve steps, evenly chosen among those of the first line, with each line's value there."""
    if not lines:
        return []
    base = lines[0].x
    chosen = base[np.unique(np.linspace(0, len(base) - 1, min(_TABLE_ROWS, len(base))).astype(np.int64))]
    rows = []
    for x in chosen:
        at = [np.flatnonzero(line.x == x) for line in lines]
        rows.append(
            (_ticked(x), *(_ticked(line.y[i[0]]) if len(i) else "–" for line, i in zip(lines, at, strict=True)))
        )
    return rows


def _said(line: Line) -> str:
    return (
        f"from {_ticked(line.y[0])} to {_ticked(line.y[-1])}, "
        f"lowest {_ticked(line.y.min())}, highest {_ticked(line.y.max())}"
    )


def _shape_path(number: int, places_P2: NDArray[np.float64], r: float) -> str:
    """All points of a series as one path: circle, triangle, square, diamond, cross, triangle upside down."""
    d = 2 * r
    shape = (
        f"m{-r:g} 0a{r:g} {r:g} 0 1 0 {d:g} 0a{r:g} {r:g} 0 1 0 {-d:g} 0z",
        f"m0 {-r:g}l{r:g} {d:g}h{-d:g}z",
        f"m{-r:g} {-r:g}h{d:g}v{d:g}h{-d:g}z",
        f"m0 {-1.3 * r:g}l{1.3 * r:g} {1.3 * r:g}l{-1.3 * r:g} {1.3 * r:g}l{-1.3 * r:g} {-1.3 * r:g}z",
        (
            f"m{-0.4 * r:g} {-r:g}h{0.8 * r:g}v{0.6 * r:g}h{0.6 * r:g}v{0.8 * r:g}h{-0.6 * r:g}v{0.6 * r:g}"
            f"h{-0.8 * r:g}v{-0.6 * r:g}h{-0.6 * r:g}v{-0.8 * r:g}h{0.6 * r:g}z"
        ),
        f"m0 {r:g}l{r:g} {-d:g}h{-d:g}z",
    )[number % _SHAPES]
    return "".join(f"M{x:.1f} {y:.1f}{shape}" for x, y in places_P2)


def _svg(parts: Sequence[str], height: int, says: str) -> Markup:
    label = escape(says)
    return Markup(  # noqa: S704 - all that is text goes through escape
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">' + "\n".join(parts) + "</svg>"
    )


def _text(x: float, y: float, words: str, anchor: str = "start", style: str = "") -> str:
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    named = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{where}{named}>{escape(words)}</text>'


def _short(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def _ticked(value: float) -> str:
    return f"{value:.4g}"
