"""By which number one model is better than another on a validation split: pure, from its scores."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cytoclip.errors import nearest

DEFAULT = "hits"
_DIRECTIONS = ("image_to_text", "text_to_image")
_HITS = re.compile(r"hit@\d+_groups")


def choices(ks: Sequence[int]) -> list[str]:
    """What `validate.select_by` may be, where hit@k is measured for `ks`."""
    return [DEFAULT, *(f"hit@{k}" for k in sorted(set(ks))), "mrr", "map"]


def problem(by: str, ks: Sequence[int]) -> tuple[str, str] | None:
    """Why nothing is measured by that name, and the nearest that is; None where it is.

    Examples
    --------
    >>> problem("hit@5", [1, 10])
    ('hit@5 is not measured: validate.ks is [1, 10]', 'add 5 to validate.ks, or choose hits, hit@1, hit@10, mrr, map')
    """
    known = choices(ks)
    if by in known:
        return None
    listed = ", ".join(known)
    asked = re.fullmatch(r"hit@([1-9]\d*)", by)
    if asked:
        return f"{by} is not measured: validate.ks is {list(ks)}", f"add {asked[1]} to validate.ks, or choose {listed}"
    near = nearest(by.lower().removesuffix("_groups"), known)
    return f"{by!r} is not measured", f"did you mean {near}? There are {listed}" if near else f"choose {listed}"


def score(scored: Mapping[str, Any], by: str = DEFAULT) -> float:
    """One number of both directions, the higher the better: every right answer counts (`…_groups`).

    Parameters
    ----------
    scored
        As `report.scores` makes them. A metric without a number by group is taken by pair.
    by
        One of `choices`; hits is the mean of all hit@k, over k and directions.
    """
    numbers = [number for name in _DIRECTIONS if name in scored for number in _of(scored[name], by)]
    return float(sum(numbers) / len(numbers))


def chance(scored: Mapping[str, Any], by: str = DEFAULT) -> float:
    """What a model that knows nothing has for `score` on the same pairs."""
    numbers = _of(scored["chance"], by)
    return float(sum(numbers) / len(numbers))


def names(there: Collection[str], by: str) -> list[str]:
    """Of the metrics `there`, those that `score` takes the mean of."""
    if by == DEFAULT:
        return [name for name in there if _HITS.fullmatch(name)]
    return [f"{by}_groups" if f"{by}_groups" in there else by]


def _of(numbers: Mapping[str, float], by: str) -> list[float]:
    return [numbers[name] for name in names(numbers, by)]
