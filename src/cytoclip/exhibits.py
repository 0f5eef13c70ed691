"""A split laid out for the eye: what a query retrieved, with pictures and captions; similarities and maps as charts.

Letters: N pairs, D embedding, P points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from cytoclip import charts, evidence
from cytoclip.charts import Chart, Points
from cytoclip.evidence import Case, Map
from cytoclip.pairs import Identity, Pairs, identities
from cytoclip.record import Embedded
from cytoclip.report import DIRECTIONS
from cytoclip.thumbnails import Thumbnails

LONGEST = 240  # characters of a caption
_COLOURS = 8
_SIDES = {"image_to_text": "image", "text_to_image": "text"}


@dataclass(frozen=True)
class Shown:
    """A picture or a caption, or both, of a pair; `mark` says whether it is right where it was retrieved."""

    picture: str
    caption: str
    name: str
    score: str = ""
    right: bool = False
    copies: int = 1


@dataclass(frozen=True)
class ShownCase:
    """A query, where its right answer stood, and the first of what it retrieved."""

    query: Shown
    rank: str
    before: str
    score: str
    top: Sequence[Shown]


@dataclass(frozen=True)
class ShownGallery:
    """The cases of one direction, by kind."""

    title: str
    looked_at: str
    kinds: Sequence[tuple[str, Sequence[ShownCase]]]


@dataclass(frozen=True)
class Split:
    """A split that can be shown: its pairs, its embeddings by two models, and what those are called.

    Parameters
    ----------
    before
        Of the model that a run began with, or of a base; None where there is none.
    """

    pairs: Pairs
    before: Embedded | None
    best: Embedded
    names: tuple[str, str] = ("before", "after")

    def sides(self) -> list[tuple[str, Embedded]]:
        """Each model that is there, by what it is called."""
        both = zip(self.names, (self.before, self.best), strict=True)
        return [(name, embedded) for name, embedded in both if embedded]

    def identity(self) -> Identity:
        return identities(self.pairs)


def galleries(split: Split, thumbnails: Thumbnails) -> list[ShownGallery]:
    """Both directions."""
    identity, found = split.identity(), []
    for direction, title in DIRECTIONS.items():
        side = _SIDES[direction]
        query_ND, gallery_ND = _queries(split.best, side)
        ranked = evidence.gallery(query_ND, gallery_ND, identity, side)
        cases = [case for kind in ranked.cases.values() for case in kind]
        before = _ranks_before(split, side, identity, cases)
        kinds = [
            (kind, [_case(case, before.get(case.row), side, split.pairs, thumbnails) for case in some])
            for kind, some in ranked.cases.items()
            if some
        ]
        pairs = len(split.pairs)
        looked_at = f"of all {pairs:,} queries" if ranked.looked_at == pairs else (
            f"of {ranked.looked_at:,} queries drawn from {pairs:,}, each ranked among all"
        )  # fmt: skip
        found.append(ShownGallery(title, looked_at, kinds))
    return found


def similarity_charts(split: Split) -> list[Chart]:
    """Right against wrong pairs, a chart a model."""
    found = []
    identity = split.identity()
    for name, embedded in split.sides():
        counted = evidence.similarities(embedded.image_ND, embedded.text_ND, identity)
        if counted:
            of = "all wrong pairs" if counted.drawn is None else f"{counted.drawn:,} wrong pairs, drawn"
            found.append(
                charts.binned(
                    f"cosine, {name}: mean {counted.right_mean:.2f} of right, {counted.wrong_mean:.2f} of wrong pairs",
                    counted.edges,
                    {"right pairs": counted.right, of: counted.wrong},
                )
            )
    return found


def maps(split: Split, private: bool) -> tuple[list[Chart], str]:
    """PCA, a chart a model, coloured by label, or else source or group; and in words what the colours are.

    With `private`, names of sources and groups become numbers.
    """
    by, values = _coloured_by(split.pairs)
    found = []
    for name, embedded in split.sides():
        placed = evidence.mapped(embedded.image_ND, embedded.text_ND)
        if placed:
            series = _series(placed, values, by in ("source", "group") and private)
            title = f"embeddings, {name}"
            gap = f"{title}: {placed.explained:.0%} of the variance, gap between the sides {placed.gap:.2f}"
            found.append(charts.points(gap, series, f"{gap}. {len(placed.rows)} pairs, pictures filled, captions open"))
    return found, by


def _case(case: Case, before: float | None, side: str, pairs: Pairs, thumbnails: Thumbnails) -> ShownCase:
    of_image = side == "image"
    query = Shown(thumbnails.of(pairs.images[case.row]), _cut(pairs.captions[case.row]), _cut(pairs.names[case.row]))
    top = [
        Shown(
            "" if of_image else thumbnails.of(pairs.images[one.row]),
            _cut(pairs.captions[one.row]),
            _cut(pairs.names[one.row]),
            f"{one.score:.3f}",
            one.right,
            one.copies,
        )
        for one in case.top
    ]
    return ShownCase(query, _rank(case.rank), "" if before is None else _rank(before), f"{case.score:.3f}", top)


def _ranks_before(split: Split, side: str, identity: Identity, cases: Sequence[Case]) -> dict[int, float]:
    if split.before is None or not cases:
        return {}
    rows = [case.row for case in cases]
    return dict(zip(rows, evidence.ranks(*_queries(split.before, side), identity, rows), strict=True))


def _queries(embedded: Embedded, side: str) -> tuple[Tensor, Tensor]:
    both = embedded.image_ND, embedded.text_ND
    return both if side == "image" else (both[1], both[0])


def _coloured_by(pairs: Pairs) -> tuple[str, list[str]]:
    """The first of label, source and group that tells pairs apart without being different for each."""
    for by, column in (("label", pairs.labels), ("source", pairs.sources), ("group", pairs.groups)):
        different = {value for value in column if value}
        if 2 <= len(different) <= max(_COLOURS, len(pairs) // 4):
            return by, [value or "none" for value in column]
    return "", ["pairs"] * len(pairs)


def _series(placed: Map, values: Sequence[str], private: bool) -> list[Points]:
    of = [values[row] for row in placed.rows]
    often = [value for value, _ in Counter(of).most_common(_COLOURS if len(set(of)) <= _COLOURS else _COLOURS - 1)]
    numbers = np.array([often.index(value) if value in often else len(often) for value in of])
    names = [f"number {i + 1}" for i in range(len(often))] if private else often
    names = [*names, "others"]
    found = []
    for open_, places in ((False, placed.image_P2), (True, placed.text_P2)):
        found += [
            Points(_cut(names[i], 40), places[numbers == i], open_) for i in range(len(names)) if (numbers == i).any()
        ]
    return found


def _rank(rank: float) -> str:
    return f"{rank:,.0f}" if rank == round(rank) else f"{rank:,.1f}"


def _cut(text: str, most: int = LONGEST) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
