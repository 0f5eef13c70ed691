"""What a model's embeddings show of a split: similarities, cases to look at, a map. Pure, and the same each time.

Everything is drawn from a sample beyond a number of pairs that is said with it, so that neither time nor memory grows
with N × N.

Letters: N pairs, D embedding, Q queries looked at, B block of queries, S sampled pairs, P points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cytoclip.pairs import Identity, right_answers

BINS = 40
MOST_WRONG = 200_000  # wrong pairs whose similarity is looked at; below as many, all of them
MOST_SCORES = 400_000_000  # of each direction: of 20,000 pairs all are ranked to find the cases, of 200,000 some 2,000
MOST_POINTS = 1_000  # pairs on the map: as many pictures and as many captions
EACH = 3  # cases of a kind
TOP = 5  # of what a query retrieved
KINDS = ("hardest misses", "median cases", "best hits")
_BLOCK, _SCORES = 256, 2**25  # queries at once, and scores: 134 MB, and a few times that while they are counted


@dataclass(frozen=True)
class Similarities:
    """Cosines of right and of wrong pairs, counted in bins.

    Parameters
    ----------
    edges
        Of the bins, (BINS + 1,).
    right, wrong
        Counts, int64 (BINS,): each pair's own picture and caption; and those of pairs that are not right for another.
    right_mean, wrong_mean
        Of what was counted.
    drawn
        Wrong pairs looked at, where they are a sample; None where they are all.
    """

    edges: NDArray[np.float64]
    right: NDArray[np.int64]
    wrong: NDArray[np.int64]
    right_mean: float
    wrong_mean: float
    drawn: int | None


@dataclass(frozen=True)
class Retrieved:
    """One gallery row, `copies` of which are equal captions or equal pictures."""

    row: int
    score: float
    right: bool
    copies: int


@dataclass(frozen=True)
class Case:
    """One query, the rank of its best right answer (from 1, ties in the middle), its score, and what came first."""

    row: int
    rank: float
    score: float
    top: tuple[Retrieved, ...]


@dataclass(frozen=True)
class Gallery:
    """Cases of one direction by kind; `looked_at` queries were ranked among all."""

    cases: dict[str, tuple[Case, ...]]
    looked_at: int


@dataclass(frozen=True)
class Map:
    """The two leading principal components, (P, 2) float64, of each side about its own mean.

    Parameters
    ----------
    rows
        Which pairs, int64 (P,).
    explained
        Share of the variance that the two axes hold.
    gap
        Distance of the means of the two sides, which the map leaves out: pictures and captions lie in cones of their
        own (Liang 2022, arXiv 2203.02053).
    """

    rows: NDArray[np.int64]
    image_P2: NDArray[np.float64]
    text_P2: NDArray[np.float64]
    explained: float
    gap: float


def similarities(image_ND: Tensor, text_ND: Tensor, identity: Identity, seed: int = 0) -> Similarities | None:
    """Right against wrong; None where no pair is wrong for another."""
    pairs = len(image_ND)
    right = (image_ND * text_ND).sum(dim=1).double().numpy()
    if pairs * (pairs - 1) <= MOST_WRONG:
        rows, others = np.divmod(np.arange(pairs * pairs), pairs)
        drawn = False
    else:
        rows, others = np.random.default_rng(seed).integers(0, pairs, (2, MOST_WRONG))
        drawn = True
    wrong_S = ~_right(identity, rows, others)
    rows, others = rows[wrong_S], others[wrong_S]
    if not len(rows):
        return None
    blocks = zip(np.array_split(rows, len(rows) // 50_000 + 1), np.array_split(others, len(rows) // 50_000 + 1),
                 strict=True)  # fmt: skip
    wrong = np.concatenate([(image_ND[a] * text_ND[b]).sum(dim=1).double().numpy() for a, b in blocks])
    low, high = min(right.min(), wrong.min()), max(right.max(), wrong.max())
    edges = np.linspace(low, max(high, low + 1e-6), BINS + 1)
    counts = [np.histogram(np.clip(each, edges[0], edges[-1]), edges)[0] for each in (right, wrong)]
    return Similarities(
        edges, counts[0], counts[1], float(right.mean()), float(wrong.mean()), len(rows) if drawn else None
    )


@torch.no_grad()
def gallery(query_ND: Tensor, gallery_ND: Tensor, identity: Identity, side: str, seed: int = 0) -> Gallery:
    """The hardest misses, median cases and best hits of one direction, by the rank of the best right answer.

    Best hits are those that lead by most. A case is shown once, however many pairs share its picture or caption.

    Parameters
    ----------
    identity
        Of the N pairs, as numpy arrays.
    side
        What is asked with: `image` or `text`.
    """
    pairs = len(query_ND)
    rows_Q = np.arange(pairs)
    asked = max(1, MOST_SCORES // pairs)
    if pairs > asked:
        rows_Q = np.sort(np.random.default_rng(seed).choice(pairs, asked, replace=False))
    parts = [_standing(scores, right) for _, scores, right in _blocks(query_ND, gallery_ND, identity, rows_Q)]
    rank_Q, lead_Q = (np.concatenate(column) for column in zip(*parts, strict=True))
    same = identity.image if side == "image" else identity.caption
    found = identity.caption if side == "image" else identity.image
    middle = np.abs(rank_Q - np.median(rank_Q))
    orders = (np.lexsort((rows_Q, lead_Q, -rank_Q)), np.lexsort((rows_Q, middle)), np.lexsort((rows_Q, -lead_Q)))
    wanted = (rank_Q > 1, np.full(len(rows_Q), True), rank_Q == 1)
    cases, taken = {}, set[int]()
    for kind, order, fits in zip(KINDS, orders, wanted, strict=True):
        chosen: list[int] = []
        for i in order:
            if len(chosen) < EACH and fits[i] and int(same[rows_Q[i]]) not in taken:
                taken.add(int(same[rows_Q[i]]))
                chosen.append(i)
        cases[kind] = tuple(
            _case(query_ND, gallery_ND, identity, int(rows_Q[i]), float(rank_Q[i]), found) for i in chosen
        )
    return Gallery(cases, len(rows_Q))


@torch.no_grad()
def ranks(query_ND: Tensor, gallery_ND: Tensor, identity: Identity, rows: Sequence[int]) -> list[float]:
    """The rank of the best right answer of some queries, from 1: its mean over random order within ties."""
    blocks = _blocks(query_ND, gallery_ND, identity, np.asarray(rows, np.int64))
    return [float(rank) for _, scores, right in blocks for rank in _standing(scores, right)[0]]


def mapped(image_ND: Tensor, text_ND: Tensor, seed: int = 0) -> Map | None:
    """PCA of a sample; None of fewer than three pairs, which have no shape."""
    pairs = len(image_ND)
    if pairs < 3:
        return None
    rows = np.arange(pairs)
    if pairs > MOST_POINTS:
        rows = np.sort(np.random.default_rng(seed).choice(pairs, MOST_POINTS, replace=False))
    sides = [side_ND[rows].double() for side_ND in (image_ND, text_ND)]
    means = [side.mean(dim=0) for side in sides]
    both = torch.cat([side - mean for side, mean in zip(sides, means, strict=True)])
    variances, vectors = torch.linalg.eigh(both.T @ both)  # ascending
    variances, axes = variances.flip(0).clamp(min=0), vectors.T.flip(0)[:2]
    axes = axes * torch.sign(axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)))  # or the sign is the library's
    placed = (both @ axes.T).numpy()
    if placed.shape[1] < 2:
        placed = np.pad(placed, ((0, 0), (0, 1)))
    total = float(variances.sum())
    explained = float(variances[:2].sum()) / total if total else 1.0
    gap = float(torch.linalg.vector_norm(means[0] - means[1]))
    return Map(rows, placed[: len(rows)], placed[len(rows) :], explained, gap)


def _blocks(
    query_ND: Tensor, gallery_ND: Tensor, identity: Identity, rows_Q: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
    """Rows, their scores with the whole gallery (B, N), and which are right, a block at a time."""
    ids = identity.map(torch.as_tensor)
    block = max(1, min(_BLOCK, _SCORES // len(gallery_ND)))
    for begin in range(0, len(rows_Q), block):
        rows_B = rows_Q[begin : begin + block]
        asked = torch.as_tensor(rows_B)
        yield rows_B, query_ND[asked] @ gallery_ND.T, right_answers(ids.take(asked), ids)


def _standing(scores_BN: Tensor, right_BN: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The expected rank of the first right answer, from 1, and by how much it leads the best wrong one.

    Of t rows that tie, r of them right, the first right one stands at (t + 1) / (r + 1) on average.
    """
    best_B1 = scores_BN.masked_fill(~right_BN, -torch.inf).amax(dim=1, keepdim=True)
    tied_BN = (scores_BN - best_B1).abs() <= 1e-6  # products of equal rows may differ in their last bits
    above = ((scores_BN > best_B1) & ~tied_BN).sum(dim=1).double()
    tied, right_tied = tied_BN.sum(dim=1).double(), (tied_BN & right_BN).sum(dim=1).double()
    wrong_B = scores_BN.masked_fill(right_BN, -torch.inf).amax(dim=1)
    lead = (best_B1[:, 0] - wrong_B).double()
    return (above + (tied + 1) / (right_tied + 1)).numpy(), lead.nan_to_num(posinf=2.0).numpy()


def _case(
    query_ND: Tensor, gallery_ND: Tensor, identity: Identity, row: int, rank: float, found: NDArray[np.int64]
) -> Case:
    """With what came first: equal captions or pictures stand there once."""
    ((_, scores_1N, right_1N),) = _blocks(query_ND, gallery_ND, identity, np.array([row]))
    scores, right = scores_1N[0], right_1N[0]
    top: list[Retrieved] = []
    seen = set[int]()
    for other in torch.sort(scores, descending=True, stable=True).indices.tolist():
        number = int(found[other])
        if number not in seen:
            seen.add(number)
            copies = int((found == number).sum())
            top.append(Retrieved(other, float(scores[other]), bool(right[other]), copies))
        if len(top) == TOP:
            break
    best = float(scores[right].max())
    return Case(row, rank, best, tuple(top))


def _right(identity: Identity, rows: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
    """`pairs.right_answers` of pairs of rows, one by one: a leading axis of length 1 makes it elementwise."""
    one, other = (identity.take(each).map(lambda column: column[None]) for each in (rows, others))
    found: NDArray[np.bool_] = right_answers(one, other)[0, 0]
    return found
