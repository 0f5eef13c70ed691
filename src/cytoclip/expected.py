"""What a ranking is worth on average over the random order of gallery rows that score exactly the same.

A query's gallery falls into runs of equal scores, best first. A run has `above` rows before it, of which `right_above`
are right, and `tied` rows, of which `right` are; runs without a right answer do not matter. So a model that gives one
embedding to everything (one run a query) scores exactly chance, and the order of the gallery never shows.

Letters: Q queries, R runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Values = dict[str, NDArray[np.float64]]  # name of a metric → its value for each query


@dataclass(frozen=True)
class Runs:
    """Runs of equal scores that hold a right answer; every field is int64 (R,), in any order.

    Parameters
    ----------
    query
        Which query's, from 0.
    above
        Gallery rows that score higher.
    tied, right
        Gallery rows of the run, and the right ones among them, at least 1.
    """

    query: NDArray[np.int64]
    above: NDArray[np.int64]
    tied: NDArray[np.int64]
    right: NDArray[np.int64]

    @classmethod
    def joined(cls, parts: Sequence[Runs]) -> Runs:
        columns = zip(*((part.query, part.above, part.tied, part.right) for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))


def values(runs: Runs, queries: int, ks: Sequence[int], one_right: bool) -> Values:
    """Every metric of every query, each float64 (Q,).

    - `hit@k`: the probability of a right answer among the first k: of a run of t rows, r of them right, whose first d
      are in the top k, 1 − C(t − r, d) / C(t, d) (hypergeometric);
    - `recall@k`: the share of right answers among the first k; it may be below `hit@k` only where there are several;
    - `mrr`: 1 / rank of the first right answer; `rank`: that rank, (t + 1) / (r + 1) into its run on average;
    - `map`: the mean over right answers of the share of right ones up to and including it (average precision).

    `recall@k` and `map` are left out where each query has one right answer: they are then `hit@k` and `mrr`.
    """
    order = np.lexsort((runs.above, runs.query))
    query, above, tied, right = (column[order] for column in (runs.query, runs.above, runs.tied, runs.right))
    first = np.r_[True, query[1:] != query[:-1]]
    behind = np.cumsum(right) - right
    right_above = behind - behind[first][np.cumsum(first) - 1]
    if first.sum() != queries:
        raise ValueError(f"{first.sum()} of {queries} queries have a right answer")
    best = above[first], tied[first], right[first]
    total = np.bincount(query, right, queries)
    found: Values = {f"hit@{k}": _hit(k, *best) for k in ks}
    if not one_right:
        for k in ks:
            drawn = np.clip(k - above, 0, tied)
            found[f"recall@{k}"] = np.bincount(query, right * (drawn / tied), queries) / total
    found["mrr"] = _reciprocal(*best)
    if not one_right:
        found["map"] = np.bincount(query, _precisions(above, right_above, tied, right), queries) / total
    found["rank"] = best[0] + (best[1] + 1) / (best[2] + 1)
    return found


def summary(each: Values) -> dict[str, float]:
    """One number a metric: exact means, and of `rank` the mean and the median (of two middle ones, the mean)."""
    found = {name: exact_mean(column) for name, column in each.items() if name != "rank"}
    return found | {"median_rank": float(np.median(each["rank"])), "mean_rank": exact_mean(each["rank"])}


def exact_mean(column: NDArray[np.float64]) -> float:
    """The mean rounded once: the order of the queries cannot show, and N equal terms give that term."""
    mantissas, exponents = np.frexp(column)
    whole = (mantissas * 2.0**53).astype(np.int64)
    high, low = whole >> 26, whole & (1 << 26) - 1  # sums of 2^36 of them do not overflow
    total = Fraction(0)
    for exponent in np.unique(exponents).tolist():
        here = exponents == exponent
        total += Fraction((int(high[here].sum()) << 26) + int(low[here].sum())) * Fraction(2) ** (exponent - 53)
    return float(total / len(column))


def _hit(k: int, above: NDArray[np.int64], tied: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
    return _each(_drawing_a_right_one, (np.clip(k - above, 0, tied), tied, right))


def _drawing_a_right_one(drawn: int, tied: int, right: int) -> float:
    """1 - C(tied - right, drawn) / C(tied, drawn): at least one of `right` in `drawn` of `tied`.

    In whole numbers, rounded once, so that one right row gives exactly drawn / tied. `right` and `drawn` may change
    places in the formula; the smaller one keeps the binomials small.
    """
    fewer, more = sorted((drawn, right))
    ways = math.comb(tied, fewer)
    return (ways - math.comb(tied - more, fewer)) / ways


def _reciprocal(above: NDArray[np.int64], tied: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
    return _each(_reciprocal_of_first, (above, tied, right))


def _reciprocal_of_first(above: int, tied: int, right: int) -> float:
    """E[1 / (above + P)], P the place of the first right one: P(P = p) = C(tied - p, right - 1) / C(tied, right)."""
    if right == tied:
        return 1 / (above + 1)
    places = np.arange(1, tied - right + 2)
    onward = (tied - places - right + 1)[:-1] / (tied - places)[:-1]  # P(P = p + 1) / P(P = p)
    chances = np.cumprod(np.r_[right / tied, onward])
    return float(np.sum(chances / (above + places)))


def _precisions(
    above: NDArray[np.int64], right_above: NDArray[np.int64], tied: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.float64]:
    """For each run the expected sum, over its right answers, of the share of right ones up to and including each.

    Place p of the run holds a right one with probability r / t, and then (p − 1)(r − 1) / (t − 1) of the places before
    it do: the sum over p of r / t · (A + B p) / (above + p), which harmonic numbers give in closed form.
    """
    alone = tied == 1
    slope = np.where(alone, 0.0, (right - 1) / np.maximum(tied - 1, 1))
    start = right_above + 1 - slope
    harmonic = np.r_[0.0, np.cumsum(1 / np.arange(1, int((above + tied).max(initial=0)) + 1))]
    inner = slope * tied + (start - slope * above) * (harmonic[above + tied] - harmonic[above])
    return np.where(alone, (right_above + 1) / (above + 1), right / tied * inner)


def _each(function: object, columns: Iterable[NDArray[np.int64]]) -> NDArray[np.float64]:
    """`function` of each row of the columns, asked once for each different row."""
    cases, which = np.unique(np.stack(list(columns), axis=1), axis=0, return_inverse=True)
    assert callable(function)  # noqa: S101 - for mypy
    return np.array([function(*case) for case in cases.tolist()], np.float64)[which.reshape(-1)]
