"""What repeats within a split, and what leaks from one split into another."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from cytoclip import similar
from cytoclip.errors import first_few
from cytoclip.identifiers import masked
from cytoclip.kinds import Case, Finding
from cytoclip.pairs import Pairs, same_caption_key

# Correlation of two thumbs from which they are one picture. Copies of real micrographs that were compressed anew,
# resized or cropped by up to 2 % have 0.965 and more (drawn cells, of sharper edges, 0.84 and more); of different
# micrographs whose hashes are near, 1 in 500 has 0.857 and more.
SAME = 0.85

HELD_OUT = ("val", "test")  # splits whose numbers are worth what is new in them
_Value = TypeVar("_Value", bound=Hashable)


def across(splits: Mapping[str, Pairs]) -> list[Finding]:
    """Pairs of a later split whose picture, source or group is in an earlier one; `contents` are hashes.

    Between two of which one is held out: what is trained on may repeat what else is.
    """
    found = []
    for late, early in _twos(splits):
        if not {late, early} & set(HELD_OUT):
            continue
        for kind, column in (("leak-content", "contents"), ("leak-source", "sources"), ("leak-group", "groups")):
            first = _first_rows(getattr(splits[early], column))
            cases = tuple(
                _case(splits, late, row, "" if kind == "leak-content" else masked(str(value)), (early, first[value]))
                for row, value in enumerate(getattr(splits[late], column))
                if value and value in first
            )
            found.append(Finding(kind, f"{late} and {early}", len(splits[late]), cases))
    return [finding for finding in found if finding.cases]


def warnings(splits: Mapping[str, Pairs]) -> list[str]:
    """What training says of leaks between its splits: a line each, and where to see more."""
    found = [f"{one.text()}: {first_few([case.text() for case in one.cases], 2)}" for one in across(splits)]
    return [f"{line}; `cytoclip check` shows all" for line in found]


def within(name: str, pairs: Pairs) -> list[Finding]:
    """Pairs, pictures and captions that a split has more than once."""
    captions = [same_caption_key(caption) for caption in pairs.captions]
    whole = list(zip(pairs.contents, captions, pairs.more, strict=True))
    seen = set(_repeating(whole))
    columns: dict[str, tuple[Sequence[Hashable], set[int]]] = {
        "repeated-pairs": (whole, set()),
        "repeated-pictures": (pairs.contents, seen),
        "repeated-captions": (captions, seen),
    }
    found = []
    for kind, (column, besides) in columns.items():
        repeating = {row: first for row, first in _repeating(column).items() if row not in besides}
        cases = tuple(_case({name: pairs}, name, row, "", (name, first)) for row, first in repeating.items())
        found.append(Finding(kind, name, len(pairs), cases))
    return [finding for finding in found if finding.cases]


@dataclass(frozen=True, slots=True)
class Face:
    """What a picture looks like: its perceptual hashes, and its grey levels as a small square."""

    hashes: tuple[int, ...]
    thumb: bytes


def alike(splits: Mapping[str, Pairs], faces: Mapping[str, Face]) -> list[Finding]:
    """Pictures of different bytes that look the same, within a split and between two.

    The nearest by hash is taken, and counts when the thumbs agree: in a large set of one kind of picture, some
    hashes are near each other by chance.

    Parameters
    ----------
    faces
        By content; a picture without one, such as one of nearly one colour, is left out.
    """
    names = list(splits)
    items = [
        (s, row, content)
        for s, name in enumerate(names)
        for content, row in _first_rows(splits[name].contents).items()
        if content in faces
    ]
    if not items:
        return []
    hashes_NK = np.array([faces[content].hashes for _, _, content in items], np.uint64)
    other, distance = similar.nearest(hashes_NK, np.array([s for s, _, _ in items]), len(names))
    cases: dict[tuple[int, int], list[Case]] = {}
    for i, (s, row, content) in enumerate(items):
        for to in range(s + 1):
            twin = int(other[i, to])
            # two that are each other's nearest are said once; the same bytes are a leak of another kind
            if twin < 0 or items[twin][2] == content or (to == s and twin > i and other[twin, s] == i):
                continue
            if _correlation(faces[content], faces[items[twin][2]]) < SAME:
                continue
            note = f"{distance[i, to]} of 64 bits differ"
            cases.setdefault((s, to), []).append(_case(splits, names[s], row, note, (names[to], items[twin][1])))
    found = []
    for (s, to), some in cases.items():
        of = sum(item[0] == s for item in items)
        kind, where = ("alike", names[s]) if s == to else ("leak-alike", f"{names[s]} and {names[to]}")
        found.append(Finding(kind, where, of, tuple(some)))
    return found


def _correlation(one: Face, other: Face) -> float:
    a, b = (np.frombuffer(face.thumb, np.uint8).astype(np.float64) for face in (one, other))
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / max(np.sqrt((a @ a) * (b @ b)), 1e-9))


def _twos(splits: Mapping[str, Pairs]) -> Iterator[tuple[str, str]]:
    names = list(splits)
    for i, late in enumerate(names):
        for early in names[:i]:
            yield late, early


def _first_rows(values: Sequence[_Value]) -> dict[_Value, int]:
    first: dict[_Value, int] = {}
    for row, value in enumerate(values):
        first.setdefault(value, row)
    return first


def _repeating(values: Sequence[Hashable]) -> dict[int, int]:
    """Each row whose value stands in an earlier one, and the first of those."""
    first = _first_rows(values)
    return {row: first[value] for row, value in enumerate(values) if first[value] != row}


def _case(splits: Mapping[str, Pairs], split: str, row: int, note: str, twin: tuple[str, int]) -> Case:
    where, other = twin
    return Case(split, splits[split].names[row], row, note, Case(where, splits[where].names[other], other))
