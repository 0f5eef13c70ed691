"""The check's result as one page: no script, no request, thumbnails and histograms inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cytoclip import charts, pages, verdict
from cytoclip.charts import Chart
from cytoclip.kinds import KINDS, Case, Finding
from cytoclip.pairs import Pairs, identities
from cytoclip.thumbnails import Thumbnails
from cytoclip.verdict import Report

EXAMPLES = 8  # of a finding
BUDGET = 3_500_000  # bytes of all thumbnails; the worst findings have theirs first


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


def page(report: Report) -> str:
    """The whole page as HTML; every text of the data is escaped, and a policy in it forbids any request."""
    thumbnails = Thumbnails(BUDGET)
    return pages.render(
        "check_page.html",
        report=report,
        worst=report.findings[0].severity if report.findings else "",
        findings=[_shown(finding, report, thumbnails) for finding in report.findings],
        charts=_charts(report),
        yaml=verdict.proposed_yaml(report),
    )


def _shown(finding: Finding, report: Report, thumbnails: Thumbnails) -> Shown:
    def picture(case: Case | None) -> str:
        if case is None or case.row < 0 or report.splits[case.split].looks[case.row].problem:
            return ""
        return thumbnails.of(report.splits[case.split].pairs.images[case.row])

    cases = [case for case in finding.cases if case.name or case.note][:EXAMPLES]
    examples = [(case, picture(case), picture(case.twin)) for case in cases]
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
    return [
        charts.histogram(title, dict(zip(report.facts, series, strict=True)), mark)
        for title, series, mark in columns
        if any(map(len, series))
    ]


def _shared(pairs: Pairs) -> NDArray[np.int64]:
    """How many pairs of the split have each pair's caption."""
    _, inverse, counts = np.unique(identities(pairs).caption, return_inverse=True, return_counts=True)
    shared: NDArray[np.int64] = counts[inverse]
    return shared
