"""The check's result as one page: no script, no request, thumbnails and histograms inside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cytoclip import images, verdict
from cytoclip.errors import UserError
from cytoclip.kinds import KINDS, Case, Finding
from cytoclip.pairs import Pairs, identities
from cytoclip.verdict import Report

EXAMPLES = 8  # of a finding
BUDGET = 3_500_000  # bytes of all thumbnails; the worst findings have theirs first
_SIDE = 160  # pixels of a thumbnail's longer side, shown at 128 high
_BINS = 24
_WIDTH, _HEIGHT = 320, 116  # of a histogram, in its own units


@dataclass(frozen=True)
class Shown:
    """A finding with its first cases, each with the thumbnails of its two sides."""

    finding: Finding
    fix: str
    examples: Sequence[tuple[Case, str, str]]
    more: int

    @property
    def wide(self) -> bool:
        """Whether a case needs more room than one picture: two, or only words."""
        return any(other or not picture for _, picture, other in self.examples)


@dataclass(frozen=True)
class Bar:
    series: int
    x: float
    y: float
    width: float
    height: float
    says: str


@dataclass(frozen=True)
class Chart:
    """A histogram; `mark` is where a limit lies, None where it is not in sight."""

    title: str
    bars: Sequence[Bar]
    low: str
    high: str
    mark: float | None = None
    marked: str = ""


def page(report: Report) -> str:
    """The whole page as HTML; every text of the data is escaped, and a policy in it forbids any request."""
    text = resources.files("cytoclip").joinpath("check_page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    thumbnails = _Thumbnails(report)
    return environment.from_string(text).render(
        report=report,
        worst=report.findings[0].severity if report.findings else "",
        findings=[_shown(finding, thumbnails) for finding in report.findings],
        charts=_charts(report),
        yaml=verdict.proposed_yaml(report),
    )


class _Thumbnails:
    """Small pictures as data URIs, each made once, until the budget is spent."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._made: dict[tuple[str, int], str] = {}
        self._left = BUDGET

    def of(self, case: Case | None) -> str:
        if case is None or case.row < 0:
            return ""
        key = case.split, case.row
        if key not in self._made:
            self._made[key] = self._make(*key)
        self._left -= len(self._made[key])  # each mention is a copy
        return self._made[key] if self._left > 0 else ""

    def _make(self, name: str, row: int) -> str:
        split = self._report.splits[name]
        if split.looks[row].problem or self._left <= 0:
            return ""
        try:
            picture = images.decode(split.pairs.images[row])
        except UserError:  # changed since it was looked at
            return ""
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
        written = io.BytesIO()
        bare = Image.fromarray(np.asarray(picture))  # nothing of the file's metadata comes along
        bare.save(written, "JPEG", quality=75)
        return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()


def _shown(finding: Finding, thumbnails: _Thumbnails) -> Shown:
    cases = [case for case in finding.cases if case.name or case.note][:EXAMPLES]
    examples = [(case, thumbnails.of(case), thumbnails.of(case.twin)) for case in cases]
    return Shown(finding, KINDS[finding.kind].fix, examples, max(0, finding.count - len(cases)))


def _charts(report: Report) -> list[Chart]:
    facts = list(report.facts.values())
    reader = report.reader
    columns: list[tuple[str, list[NDArray[Any]], tuple[float, str] | None]] = [
        (
            f"{facts[0].unit} of a caption",
            [one.lengths for one in facts],
            (reader.context, f"read: {reader.context}") if reader else None,
        ),
        (
            "shorter side of a picture, pixels",
            [np.minimum(one.widths, one.heights) for one in facts],
            (min(reader.pixels.size), f"read: {min(reader.pixels.size)}") if reader else None,
        ),
        ("width ÷ height", [one.widths / np.maximum(one.heights, 1) for one in facts], None),
        ("pictures that share a caption", [_shared(split.pairs) for split in report.splits.values()], None),
    ]
    return [_chart(title, series, mark) for title, series, mark in columns if any(map(len, series))]


def _shared(pairs: Pairs) -> NDArray[np.int64]:
    """How many pairs of the split have each pair's caption."""
    _, inverse, counts = np.unique(identities(pairs).caption, return_inverse=True, return_counts=True)
    shared: NDArray[np.int64] = counts[inverse]
    return shared


def _chart(title: str, series: Sequence[NDArray[Any]], mark: tuple[float, str] | None) -> Chart:
    everything = np.concatenate(series)
    low, high = float(everything.min()), float(everything.max())
    bins = _BINS
    if everything.dtype.kind == "i":
        bins = int(min(_BINS, high - low + 1))
        edges = np.linspace(low - 0.5, high + 0.5, bins + 1)
    else:  # ratios: so wide that equal ones stand in the middle
        low, high = min(low, (low + high) / 2 - 0.25), max(high, (low + high) / 2 + 0.25)
        edges = np.linspace(low, high, bins + 1)
    shares = [np.histogram(values, edges)[0] / max(len(values), 1) for values in series]
    top, each = max(float(share.max()) for share in shares), _WIDTH / bins
    bars = [
        Bar(
            s,
            round(i * each + s * each * 0.9 / len(series), 2),
            round(120 - share[i] / top * _HEIGHT, 2),
            round(each * 0.9 / len(series), 2),
            round(share[i] / top * _HEIGHT, 2),
            f"{_tick(edges[i])} to {_tick(edges[i + 1])}: {share[i]:.1%}",
        )
        for s, share in enumerate(shares)
        for i in range(bins)
        if share[i] > 0
    ]
    at = None if mark is None else round((mark[0] - edges[0]) / (edges[-1] - edges[0]) * _WIDTH, 2)
    inside = at is not None and 0 <= at <= _WIDTH
    return Chart(title, bars, _tick(low), _tick(high), at if inside else None, mark[1] if mark and inside else "")


def _tick(value: float) -> str:
    return f"{value:.4g}"
