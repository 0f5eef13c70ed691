"""What a model's embeddings of a split are worth: at once while it trains, and in full for a report.

Letters: N pairs, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cytoclip import intervals, report, retrieval
from cytoclip.errors import counted
from cytoclip.intervals import Clusters
from cytoclip.pairs import Pairs, identities
from cytoclip.report import Scores
from cytoclip.retrieval import Ranked

MOST_VALUES = 20  # of a key whose values are slices: more are not read by people, and each has few pairs
_LENGTHS = 4  # slices by length of the caption
CAPTION_LENGTH = "caption length"


@dataclass(frozen=True)
class Measured:
    """One model on one split.

    Parameters
    ----------
    scores
        As JSON: every number with its interval, chance, and slices.
    ranked
        What each query found, for comparisons with another model on the same pairs.
    drawn
        The clusters that intervals come from.
    """

    scores: Scores
    ranked: Mapping[str, Ranked]
    drawn: Clusters


def quick(
    image_ND: torch.Tensor,
    text_ND: torch.Tensor,
    pairs: Pairs,
    ks: Sequence[int],
    directions: Sequence[str] = retrieval.DIRECTIONS,
) -> Scores:
    """Scores without intervals and slices: what each validation of a run has."""
    identity = identities(pairs)
    ranked = retrieval.rank(image_ND, text_ND, identity, ks)
    return report.scores({name: ranked[name] for name in directions}, retrieval.chance(identity, ks))


def full(
    image_ND: torch.Tensor,
    text_ND: torch.Tensor,
    pairs: Pairs,
    ks: Sequence[int],
    directions: Sequence[str] = retrieval.DIRECTIONS,
    advance: Callable[[int], None] | None = None,
) -> Measured:
    """Scores with intervals and slices; `advance` hears how many different pictures were ranked."""
    identity = identities(pairs)
    ranked = retrieval.rank(image_ND, text_ND, identity, ks, advance)
    ranked = {name: ranked[name] for name in directions}
    drawn = intervals.clusters(pairs)
    scored = report.scores(ranked, retrieval.chance(identity, ks))
    scored = report.with_intervals(scored, ranked, drawn)
    found = {
        key: {value: report.slice_of(ranked, among, drawn) for value, among in some.items()}
        for key, some in slices(pairs).items()
    }
    return Measured({**scored, "slices": found} if found else scored, ranked, drawn)


def difference(one: Measured, other: Measured) -> Scores:
    """By how much `one` is above `other`, of the same pairs."""
    return report.difference((one.scores, one.ranked), (other.scores, other.ranked), one.drawn)


def slices(pairs: Pairs) -> dict[str, dict[str, NDArray[np.bool_]]]:
    """Which pairs have which value of a key, (N,) booleans: `label`, further keys of the entries, words of the caption.

    A key of one value, or of more than `MOST_VALUES`, makes no slices.
    """
    found = {}
    for key, column in {"label": pairs.labels, **pairs.further()}.items():
        named = sorted({value for value in column if value})
        if 1 < len(named) <= MOST_VALUES:
            found[key] = {value: np.array([one == value for one in column]) for value in named}
    by_length = _by_length(pairs.captions)
    if len(by_length) < 2:
        return found
    if CAPTION_LENGTH in found:  # a key of the entries; theirs stays
        found[f"{CAPTION_LENGTH} (entries)"] = found.pop(CAPTION_LENGTH)
    return {**found, CAPTION_LENGTH: by_length}


def _by_length(captions: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Four slices of about as many pairs, by words."""
    words = np.array([len(caption.split()) for caption in captions])
    ends = np.unique(np.quantile(words, np.arange(1, _LENGTHS + 1) / _LENGTHS, method="inverted_cdf"))
    found, above = {}, 0
    for end in ends.tolist():
        low = int(words[words > above].min())
        name = counted(low, "word") if low == end else f"{low}–{end} words"
        found[name] = (words > above) & (words <= end)
        above = end
    return found
