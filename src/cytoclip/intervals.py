"""How far a number would move with other data of the same kind: a bootstrap that draws clusters, not pairs.

Pairs of one patient, slide or figure are not independent, so whole clusters are drawn with replacement (Field and
Welsh, "Bootstrapping clustered data", JRSS-B 69(3), 2007), and the middle 95 % of the resampled numbers is the
interval. Two models on the same pairs are resampled together: what is hard for both cancels out of their difference.

Letters: N pairs, G clusters, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cytoclip.pairs import Pairs

RESAMPLES = 1000
ROUGH = 20  # clusters, under which such an interval is too narrow: said beside it
_AT_ONCE = 1 << 23  # bytes of drawn weights
_TAILS = (2.5, 97.5)  # per cent

Interval = tuple[float, float]


@dataclass(frozen=True)
class Clusters:
    """Which pairs belong together.

    Parameters
    ----------
    by
        `source` where the data name any, else `group`, else `picture`; a pair that has none is its own.
    of
        (N,): the number of each pair's cluster.
    count
        G.
    """

    by: str
    of: NDArray[np.int64]
    count: int

    @property
    def rough(self) -> bool:
        return self.count < ROUGH


def clusters(pairs: Pairs) -> Clusters:
    by = "source" if any(pairs.sources) else "group" if any(pairs.groups) else "picture"
    tags = {"source": pairs.sources, "group": pairs.groups, "picture": (None,) * len(pairs)}[by]
    keys = [(by, tag) if tag else ("picture", content) for tag, content in zip(tags, pairs.contents, strict=True)]
    numbers: dict[tuple[str, str], int] = {}
    of = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
    return Clusters(by, of, len(numbers))


def intervals(
    each: Mapping[str, NDArray[np.float64]], drawn: Clusters, among: NDArray[np.bool_] | None = None, seed: int = 0
) -> dict[str, Interval]:
    """The interval of each column's mean; of a column called `rank` those of `mean_rank` and `median_rank`.

    Parameters
    ----------
    each
        Values of the pairs, (N,) each.
    among
        (N,): the pairs of a slice; means are taken over these alone.

    Returns
    -------
    Nothing where there is one cluster, or one that has pairs of the slice: what one patient says of others cannot be
    known, and each resample would say the same.
    """
    if drawn.count < 2 or (among is not None and len(np.unique(drawn.of[among])) < 2):
        return {}
    found = {name: _middle(column) for name, column in _resampled_means(each, drawn, among, seed).items()}
    for name in [name for name in each if _is_rank(name)]:
        found[f"mean_{name}"] = found.pop(name)
        found[f"median_{name}"] = _middle(_resampled_medians(each[name], drawn, among, seed))
    return found


def of_slices(
    each: Mapping[str, NDArray[np.float64]],
    drawn: Clusters,
    among: Mapping[str, NDArray[np.bool_]],
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """By slice what `intervals` gives of columns that are no ranks; every resample is drawn once for all of them.

    Parameters
    ----------
    among
        (N,) each, by name of the slice.
    """
    told = {name: some for name, some in among.items() if len(np.unique(drawn.of[some])) > 1}
    if not told:
        return {name: {} for name in among}
    sums = np.concatenate([_sums(each, drawn, some) for some in told.values()], axis=1)
    totals = np.concatenate([block @ sums for block in weights(drawn.count, seed)])
    found: dict[str, dict[str, Interval]] = {name: {} for name in among}
    for name, part in zip(told, np.split(totals, len(told), axis=1), strict=True):
        found[name] = {key: _middle(column) for key, column in zip(each, _means(part).T, strict=True)}
    return found


def differences(
    one: Mapping[str, NDArray[np.float64]],
    other: Mapping[str, NDArray[np.float64]],
    drawn: Clusters,
    seed: int = 0,
) -> dict[str, Interval]:
    """The interval of the mean of `one` less that of `other`, both on the same pairs; ranks as in `intervals`."""
    if drawn.count < 2:
        return {}
    left = {name: one[name] - other[name] for name in one if name in other}
    found = {name: _middle(column) for name, column in _resampled_means(left, drawn, None, seed).items()}
    for name in [name for name in left if _is_rank(name)]:
        found[f"mean_{name}"] = found.pop(name)
        found[f"median_{name}"] = _middle(
            _resampled_medians(one[name], drawn, None, seed) - _resampled_medians(other[name], drawn, None, seed)
        )
    return found


def weights(count: int, seed: int = 0, resamples: int = RESAMPLES) -> Iterator[NDArray[np.float64]]:
    """How often each of `count` clusters is drawn: blocks of rows (some resamples, G), the same for the same seed."""
    draw = np.random.default_rng([seed, count])
    step = max(1, _AT_ONCE // (8 * count))
    for begin in range(0, resamples, step):
        rows = min(step, resamples - begin)
        block = np.empty((rows, count))
        for row in block:
            row[:] = np.bincount(draw.integers(0, count, count), minlength=count)
        yield block


def _resampled_means(
    each: Mapping[str, NDArray[np.float64]], drawn: Clusters, among: NDArray[np.bool_] | None, seed: int
) -> dict[str, NDArray[np.float64]]:
    """(R,) for each column; resamples in which no pair of the slice was drawn are left out."""
    sums = _sums(each, drawn, np.full(len(drawn.of), True) if among is None else among)
    totals = np.concatenate([block @ sums for block in weights(drawn.count, seed)])
    return dict(zip(each, _means(totals).T, strict=True))


def _sums(each: Mapping[str, NDArray[np.float64]], drawn: Clusters, among: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(G, 1 + columns): how many pairs of a cluster are in the slice, and the sums of their values."""
    of = drawn.of[among]
    sizes = np.bincount(of, minlength=drawn.count)
    return np.stack([sizes, *(np.bincount(of, column[among], drawn.count) for column in each.values())], axis=1)


def _means(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """(R, columns) of the resamples in which a pair of the slice was drawn."""
    there = totals[totals[:, 0] > 0]
    means: NDArray[np.float64] = there[:, 1:] / there[:, :1]
    return means


def _resampled_medians(
    column: NDArray[np.float64], drawn: Clusters, among: NDArray[np.bool_] | None, seed: int
) -> NDArray[np.float64]:
    """(R,): the median of the values as often as their clusters were drawn; of two middle ones their mean."""
    some = np.arange(len(column)) if among is None else np.flatnonzero(among)
    order = some[np.argsort(column[some], kind="stable")]
    values, of = column[order], drawn.of[order]
    found = []
    for block in weights(drawn.count, seed):
        for row in block:
            upto = np.cumsum(row[of])
            if upto[-1]:
                low, high = np.searchsorted(upto, (upto[-1] / 2, upto[-1] / 2 + 0.5))
                found.append((values[low] + values[high]) / 2)
    return np.array(found)


def _middle(column: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(column, _TAILS)
    return float(low), float(high)


def _is_rank(name: str) -> bool:
    return name.split("_")[0] == "rank"
