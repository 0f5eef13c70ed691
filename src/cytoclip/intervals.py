"""How far a number would move with other data of the same kind: a bootstrap that draws clusters, not pairs.

Pairs of one patient, slide or figure are not independent, so whole clusters are drawn with replacement (Field and
Welsh, "Bootstrapping clustered data", JRSS-B 69(3), 2007), and the middle 95 % of the resampled numbers is the
interval. Two models on the same pairs are resampled together: what is hard for both cancels out of their difference.

Letters: N pairs, G clusters, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cytoclip.errors import counted
from cytoclip.pairs import Pairs

RESAMPLES = 1000
ROUGH = 20  # clusters, under which such an interval is too narrow: said beside it
_AT_ONCE = 1 << 25  # bytes of weights as floats
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


def clusters(pairs: Pairs) -> Clusters:
    by = "source" if any(pairs.sources) else "group" if any(pairs.groups) else "picture"
    tags = {"source": pairs.sources, "group": pairs.groups, "picture": (None,) * len(pairs)}[by]
    keys = [(by, tag) if tag else ("picture", content) for tag, content in zip(tags, pairs.contents, strict=True)]
    numbers: dict[tuple[str, str], int] = {}
    of = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
    return Clusters(by, of, len(numbers))


def doubt(by: str, count: int) -> str:
    """Why intervals from so many clusters promise too much, wherever they are shown; empty where they do not."""
    if count >= ROUGH:
        return ""
    why = "one says nothing of others" if count < 2 else "with so few they are too narrow"
    return f"intervals are drawn from {counted(count, by)}: {why}"


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


@lru_cache(maxsize=1)  # each slice and each model asks for the same
def weights(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """How often each of `count` clusters is drawn in each resample, (R, G): the same for the same seed.

    One byte each is enough: that one of many is drawn 256 times does not happen (about 1 / 256! of the time).
    """
    draw = np.random.default_rng([seed, count])
    found = np.empty((RESAMPLES, count), np.uint8)
    for row in found:
        row[:] = np.bincount(draw.integers(0, count, count), minlength=count)
    return found


def _resampled_means(
    each: Mapping[str, NDArray[np.float64]], drawn: Clusters, among: NDArray[np.bool_] | None, seed: int
) -> dict[str, NDArray[np.float64]]:
    """(R,) for each column; resamples in which no pair of the slice was drawn are left out."""
    some = slice(None) if among is None else among
    of = drawn.of[some]
    sizes = np.bincount(of, minlength=drawn.count)
    sums = np.stack([sizes, *(np.bincount(of, column[some], drawn.count) for column in each.values())], axis=1)
    there = np.flatnonzero(sizes)
    blocks = np.array_split(weights(drawn.count, seed), max(1, RESAMPLES * 8 * len(there) // _AT_ONCE))
    totals = np.concatenate([block[:, there].astype(np.float64) @ sums[there] for block in blocks])
    totals = totals[totals[:, 0] > 0]
    return dict(zip(each, (totals[:, 1:] / totals[:, :1]).T, strict=True))


def _resampled_medians(
    column: NDArray[np.float64], drawn: Clusters, among: NDArray[np.bool_] | None, seed: int
) -> NDArray[np.float64]:
    """(R,): the median of the values as often as their clusters were drawn; of two middle ones their mean."""
    some = np.arange(len(column)) if among is None else np.flatnonzero(among)
    order = some[np.argsort(column[some], kind="stable")]
    values, of = column[order], drawn.of[order]
    found = []
    for row in weights(drawn.count, seed):
        upto = np.cumsum(row[of], dtype=np.int64)
        if upto[-1]:
            low, high = np.searchsorted(upto, (upto[-1] / 2, upto[-1] / 2 + 0.5))
            found.append((values[low] + values[high]) / 2)
    return np.array(found)


def _middle(column: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(column, _TAILS)
    return float(low), float(high)


def _is_rank(name: str) -> bool:
    return name.split("_")[0] == "rank"
