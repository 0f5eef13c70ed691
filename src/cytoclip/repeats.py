"""How much of a batch repeats, and the lowest loss that the repeats allow.

Letters: B pairs of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cytoclip.kinds import KINDS
from cytoclip.objectives import Objective, binary_entropy
from cytoclip.pairs import NO_GROUP, Identity

TYPICAL = 8  # batches whose mean is called typical
LITTLE = 0.5  # of ln(batch) out of reach: √B right answers a pair, so a batch tells no more than √B things apart
NOTHING = 0.95  # what is left is a twentieth: 0.2 nats of a batch of 64


@dataclass(frozen=True)
class Repeats:
    """Of a typical batch.

    Parameters
    ----------
    pairs
        How many of its pairs have a right answer beside their own.
    floor
        Of the loss.
    untold
        The share of ln(batch) that no model learns, because the pairs do not tell it.
    """

    pairs: float
    floor: float
    untold: float

    @property
    def kind(self) -> str | None:
        """What the check calls it, where too little is left to learn."""
        return "nothing-to-learn" if self.untold >= NOTHING else "little-to-learn" if self.untold >= LITTLE else None


def typical(batches: Iterable[Identity], objective: Objective) -> Repeats:
    """The mean over `batches`, whose fields are numpy arrays (B,)."""
    found = [
        (int((right_counts(batch) > 1).sum()), floor(batch, objective), untold(batch, objective)) for batch in batches
    ]
    return Repeats(*(sum(column) / len(found) for column in zip(*found, strict=True)))


def untold(batch: Identity, objective: Objective) -> float:
    """The floor of InfoNCE without smoothing, as a share of ln B, whatever is minimised.

    The sigmoid's own floor is 0 though all captions be the same, and smoothing puts one under pairs that all differ.
    """
    size = len(batch.caption)
    plain = Objective("infonce", "pairs" if objective.positives == "pairs" else "groups")
    return floor(batch, plain) / math.log(size) if size > 1 else 0.0


def right_counts(batch: Identity) -> NDArray[np.int64]:
    """How many right answers each pair has, its own included: the row sums of `pairs.right_answers`, int64 (B,).

    By counting equal captions, pictures and groups and what they have in common (inclusion and exclusion), so in
    B log B time and without a B×B matrix.
    """
    caption, image, group = batch.caption, batch.image, batch.group
    grouped = _same(group) - _same(group, caption) - _same(group, image) + _same(group, caption, image)
    counts: NDArray[np.int64] = _same(caption) + _same(image) - _same(caption, image)
    return counts + np.where(group == NO_GROUP, 0, grouped)


def floor(batch: Identity, objective: Objective) -> float:
    """A bound that no model goes below, in nats; the anchor's part is not in it.

    InfoNCE is at least the mean entropy of its targets, ln n_i without smoothing. With `pairs`, equal captions and
    equal pictures get equal scores, so the best is to guess among them: mean ln(m_i c_i / k_i), where m pairs share
    pair i's picture, c its caption and k both. Sigmoid reaches 0 but with `pairs`: k of the m·c equal scores are right
    there, which costs m·c times the entropy of k / (m·c).
    """
    size = len(batch.caption)
    if objective.positives != "pairs":
        if objective.kind == "sigmoid":
            return 0.0
        counts = right_counts(batch)
        right, candidates = (
            (counts, np.full(size, size)) if objective.positives == "groups" else (np.ones(size), size - counts + 1)
        )
        return float(_entropy(right, candidates, objective.smoothing).mean())
    both, cells = _same(batch.caption, batch.image), _same(batch.image) * _same(batch.caption)
    if objective.kind == "infonce":
        smoothed = _entropy(np.ones(size), np.full(size, size), objective.smoothing).mean()
        return max(float(np.log(cells / both).mean()) * (1 - objective.smoothing), float(smoothed))
    # each kind of cell is met once by each of its k pairs
    return float(sum(c * binary_entropy(k / c) / k for k, c in zip(both.tolist(), cells.tolist(), strict=True)) / size)


def _same(*columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many pairs equal each one in all `columns`: int64 (B,)."""
    codes = columns[0]
    for column in columns[1:]:
        codes = np.unique(codes, return_inverse=True)[1] * (len(codes) + 1) + np.unique(column, return_inverse=True)[1]
    _, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    found: NDArray[np.int64] = counts[inverse]
    return found


def _entropy(right: NDArray[np.generic], candidates: NDArray[np.generic], smoothing: float) -> NDArray[np.float64]:
    """Of targets that are (1 − ε)/n + ε/m on n right answers and ε/m on the other m − n."""
    n, m = right.astype(np.float64), candidates.astype(np.float64)
    high, low = (1 - smoothing) / n + smoothing / m, smoothing / m
    rest = (m - n) * low * np.log(low) if smoothing > 0 else 0.0
    entropy: NDArray[np.float64] = -(n * high * np.log(high)) - rest
    return entropy


def line(repeats: Repeats, batch_size: int, objective: Objective) -> str:
    """What the log says of them, beside the loss of a model that knows nothing."""
    ways = f"{objective.positives}; {objective.chance_name}: {objective.chance_loss(batch_size):.3f}"
    return (
        f"about {repeats.pairs:.1f} of the {batch_size} pairs of a batch share a caption, picture or group: "
        f"the loss cannot fall below {abs(repeats.floor):.4f} ({ways})"
    )


def lost(repeats: Repeats, batch_size: int) -> str:
    """How much is out of reach, for whoever does not think in nats."""
    return f"repeats take {repeats.untold:.0%} of what a batch of {batch_size} could teach"


def warning(repeats: Repeats, batch_size: int) -> str | None:
    """What the check finds, as one line; None where there is enough to learn."""
    if repeats.kind is None:
        return None
    kind = KINDS[repeats.kind]
    return f"{kind.title}: {lost(repeats, batch_size)}; {kind.fix}"
