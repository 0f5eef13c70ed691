"""What was measured, in words: one sentence, the table of one model beside another, slices. Pure.

A number's difference is beyond noise where its paired-bootstrap interval leaves out zero; who computed it says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cytoclip.errors import counted
from cytoclip.intervals import RESAMPLES, ROUGH, doubt
from cytoclip.report import DIRECTIONS

MOST_VALUES = 40  # of a slice
_HEADLINE = 10  # the k of the sentence, where it was asked for
_RANKS = ("median_rank", "mean_rank")

Scores = Mapping[str, Any]


@dataclass(frozen=True)
class Judged:
    """A model on one split, and the one that it is held against.

    Parameters
    ----------
    before
        Scores of a run's starting model, or of a base; None where there is none.
    difference
        best − before of each direction and key, as results.json has it; empty where nobody computed it.
    """

    split: str
    before: Scores | None
    best: Scores
    difference: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One metric of one direction, as it is printed: – where nothing is there to hold it against.

    `change` is better, worse, noise, or empty where not known.
    """

    name: str
    chance: str
    before: str
    best: str
    difference: str
    change: str


@dataclass(frozen=True)
class Verdict:
    """The sentence, and how it is coloured: good, warning or error."""

    text: str
    colour: str


@dataclass(frozen=True)
class Slice:
    """How one direction did on the pairs of one value."""

    value: str
    pairs: int
    before: str
    best: str


def judged(results: Mapping[str, Any]) -> list[Judged]:
    """The splits that were scored, the one that the run is judged by first: test, where there is one."""
    found = [
        Judged(split, results[split]["before"], results[split]["best"], results[split].get("difference") or {})
        for split in ("test", "val")
        if results.get(split)
    ]
    flat = results.get("before"), results.get("best")
    if not any(one.split == "val" for one in found) and flat[0] and flat[1]:  # of a run before there were intervals
        found.append(Judged("val", flat[0], flat[1], {}))
    return found


def verdict(one: Judged) -> Verdict:
    """Whether a run got better, in one sentence, on the number that the sentence names and on no other."""
    said = _said(one)
    went = f"from {said.before} (chance {said.chance}) to {said.after}"
    if said.beyond_noise and said.by < 0:
        return Verdict(f"{said.what} fell {went}: the starting model is the better one.", "error")
    if not said.above_chance:
        return Verdict(
            f"{said.what} is {said.after}, not shown to be better than chance ({said.chance}).",
            "error",
        )
    if not said.difference:
        return Verdict(f"{said.what} went {went}; whether that is beyond noise was not measured.", "warning")
    if not said.beyond_noise:
        return Verdict(
            f"{said.what} went {went}, a difference within noise ({said.difference}): no gain is shown.", "warning"
        )
    return Verdict(f"{said.what} rose {went}.", "good")


def standing(one: Judged) -> Verdict:
    """How a model stands that was evaluated: against the base, or else against chance."""
    said = _said(one)
    is_ = f"{said.what} is {said.after}"
    if one.before is None:
        if not said.above_chance:
            return Verdict(f"{is_}, not shown to be better than chance ({said.chance}).", "error")
        if not said.has_interval:
            return Verdict(f"{is_}, chance {said.chance}; whether that is beyond noise was not measured.", "warning")
        return Verdict(f"{is_}, better than chance ({said.chance}).", "good")
    against = f"{is_} against {said.before} of the base (chance {said.chance})"
    if said.beyond_noise and said.by < 0:
        return Verdict(f"{against}, beyond noise ({said.difference}): the base is the better one.", "error")
    if not said.above_chance:
        return Verdict(f"{against}: the model is not shown to be better than chance.", "error")
    if not said.difference:
        return Verdict(f"{against}; whether that is beyond noise was not measured.", "warning")
    if not said.beyond_noise:
        return Verdict(f"{against}, a difference within noise ({said.difference}): neither is shown to be better.",
                       "warning")  # fmt: skip
    return Verdict(f"{against}, beyond noise ({said.difference}): the model is the better one.", "good")


def drawn_from(scores: Scores) -> str:
    """What the intervals of some scores were drawn from, and whether that is too little; empty of those without."""
    found = scores.get("clusters")
    if not found:
        return ""
    said = f"{counted(found['count'], found['by'])}, drawn {RESAMPLES:,} times"
    if found["count"] < 2:
        return f"none: {counted(found['count'], found['by'])} says nothing of others"
    return f"{said}: with so few they are too narrow" if found["count"] < ROUGH else said


def doubts(judged: Sequence[Judged]) -> list[str]:
    """What `cytoclip evaluate` warns of, a sentence a split: it stands where the first interval is read."""
    found = [(one.split, one.best["clusters"]) for one in judged if one.best.get("clusters")]
    said = [(split, doubt(each["by"], each["count"])) for split, each in found]
    return [f"On {split}, {text}." for split, text in said if text]


def headline(one: Judged) -> tuple[str, str]:
    """The direction and key of the sentence, by group where that differs.

    hit@10, else the k in the middle, of those below the number of pairs: from there on hit@k is 1 for any model. Where
    there is none of them, the mean reciprocal rank.
    """
    direction = next(name for name in DIRECTIONS if name in one.best)
    ks = sorted(int(key.removeprefix("hit@")) for key in one.best["chance"] if _is_strict_hit(key))
    ks = [k for k in ks if k < one.best["pairs"]]
    key = "hit@10" if _HEADLINE in ks else f"hit@{ks[len(ks) // 2]}" if ks else "mrr"
    return direction, f"{key}_groups" if differs_by_group(one) and f"{key}_groups" in one.best[direction] else key


def differs_by_group(one: Judged) -> bool:
    """Whether captions, pictures or groups repeat, so that a query has more right answers than its own pair."""
    return any(
        scores[side].get(f"{key}_groups", scores[side][key]) != scores[side][key]
        for scores in (one.before, one.best)
        if scores
        for side in (*_sides(scores), "chance")
        for key in scores[side]
        if _is_strict_hit(key)
    )


def rows(one: Judged, direction: str) -> list[Row]:
    """The table of one direction: each metric by pair, and by group where that differs."""
    keys = [key for key in one.best[direction] if differs_by_group(one) or not key.endswith("_groups")]
    return [_row(one, direction, key) for key in sorted(keys, key=_place)]


def slices(one: Judged) -> Iterator[tuple[str, str, list[Slice], int]]:
    """Of each key: its name, what was counted, its values by number of pairs, and how many are left out."""
    direction, key = headline(one)
    for name, values in (one.best.get("slices") or {}).items():
        earlier = ((one.before or {}).get("slices") or {}).get(name, {})
        found = [_slice(text, scores, earlier.get(text), direction, key) for text, scores in values.items()]
        if name != "caption length":  # which has an order of its own
            found.sort(key=lambda each: -each.pairs)
        yield name, f"{named(key)}, {DIRECTIONS[direction]}", found[:MOST_VALUES], max(0, len(found) - MOST_VALUES)


def named(key: str) -> str:
    """`hit@10 by group` for `hit@10_groups`."""
    words = {"mrr": "MRR", "map": "mAP", "median_rank": "median rank", "mean_rank": "mean rank"}
    bare = key.removesuffix("_groups")
    return words.get(bare, bare) + (" by group" if key.endswith("_groups") else "")


def value(key: str, number: float) -> str:
    """A rate in percent, a rank as it is.

    Examples
    --------
    >>> value("hit@10", 0.312), value("median_rank_groups", 12.5)
    ('31.2 %', '12.5')
    """
    return f"{number:,.1f}" if is_rank(key) else f"{100 * number:.1f} %"


def difference(key: str, by: float, interval: Sequence[float]) -> str:
    """In percentage points, or ranks, with a sign, which rounding does not take from an end beside 0.

    Examples
    --------
    >>> difference("hit@10", 0.032, [0.011, 0.05])
    '+3.2 [+1.1, +5.0]'
    >>> difference("mrr", 0.008, [0.0004, 0.02])
    '+0.8 [+0.04, +2.0]'
    """
    scale = 1 if is_rank(key) else 100
    written, low, high = (_signed(scale * number) for number in (by, *interval))
    return f"{written} [{low}, {high}]"


def is_rank(key: str) -> bool:
    """Whether lower is better."""
    return key.removesuffix("_groups") in _RANKS


@dataclass(frozen=True)
class _Said:
    """What the sentence is made of; `difference` is empty where it was not measured."""

    what: str
    chance: str
    before: str
    after: str
    difference: str
    by: float
    beyond_noise: bool
    above_chance: bool
    has_interval: bool


def _said(one: Judged) -> _Said:
    direction, key = headline(one)
    best, chance = one.best[direction][key], one.best["chance"][key]
    told = _told(one, direction, key)
    low = (one.best.get("intervals") or {}).get(direction, {}).get(key)
    return _Said(
        what=f"{named(key)} ({DIRECTIONS[direction]}, {one.best['pairs']:,} pairs of {one.split})",
        chance=value(key, chance),
        before=value(key, one.before[direction][key]) if one.before else "–",
        after=f"{value(key, best)}{_interval(one.best, direction, key)}",
        difference=_difference(key, told) if told else "",
        by=told["by"] if told else 0.0,
        beyond_noise=bool(told and told["beyond_noise"]),
        above_chance=(low[0] if low else best) > chance,
        has_interval=bool(low),
    )


def _told(one: Judged, direction: str, key: str) -> Mapping[str, Any] | None:
    """The difference with its interval; None where there is none: of one cluster nothing can be drawn."""
    found: Mapping[str, Any] | None = one.difference.get(direction, {}).get(key)
    return found if found and found["interval"] else None


def _row(one: Judged, direction: str, key: str) -> Row:
    told = _told(one, direction, key)
    chance = one.best["chance"].get(key)
    change = ""
    if told:
        better = (told["by"] < 0) == is_rank(key)
        change = ("better" if better else "worse") if told["beyond_noise"] else "noise"
    return Row(
        name=named(key),
        chance="–" if chance is None else value(key, chance),
        before=_cell(one.before, direction, key) if one.before else "–",
        best=_cell(one.best, direction, key),
        difference=_difference(key, told) if told else "–",
        change=change,
    )


def _slice(text: str, scores: Scores, before: Scores | None, direction: str, key: str) -> Slice:
    return Slice(
        text,
        int(scores["pairs"]),
        value(key, before[direction][key]) if before and direction in before else "–",
        _cell(scores, direction, key),
    )


def _cell(scores: Scores, direction: str, key: str) -> str:
    return value(key, scores[direction][key]) + _interval(scores, direction, key)


def _interval(scores: Scores, direction: str, key: str) -> str:
    found: Sequence[float] | None = (scores.get("intervals") or {}).get(direction, {}).get(key)
    if not found:
        return ""
    low, high = (value(key, end).removesuffix(" %") for end in found)
    return f" [{low}, {high}]"


def _difference(key: str, told: Mapping[str, Any]) -> str:
    return difference(key, told["by"], told["interval"])


_LEAST = 1e-4  # percentage points or ranks: below it is what floats leave of 0


def _signed(number: float) -> str:
    written = f"{number:+,.1f}"
    if written in ("+0.0", "-0.0"):
        written = f"{number:+.1g}" if abs(number) >= _LEAST else "0.0"
    return written.replace("-", "−")


def _sides(scores: Scores) -> list[str]:
    return [name for name in DIRECTIONS if name in scores]


def _is_strict_hit(key: str) -> bool:
    return key.startswith("hit@") and not key.endswith("_groups")


def _place(key: str) -> tuple[bool, int, int]:
    """By pair before by group; hits by k, recalls by k, then the rest."""
    bare = key.removesuffix("_groups")
    kind, _, k = bare.partition("@")
    order = ("hit", "recall", "mrr", "map", "median_rank", "mean_rank")
    return key.endswith("_groups"), order.index(kind) if kind in order else len(order), int(k or 0)
