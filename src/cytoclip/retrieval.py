"""How well a query finds its answer in a gallery: hit@k, defined once, from embeddings and `pairs.right_answers`.

Every number is an expectation over the random order of gallery rows that score exactly the same, so a model that gives
one embedding to everything scores exactly chance, and the order of the gallery never matters.

Letters: N pairs, D embedding, V distinct queries, U distinct gallery rows, B block of queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from cytoclip.errors import ExitCode, UserError
from cytoclip.pairs import Identity, right_answers


@dataclass(frozen=True)
class HitRates:
    """The share of queries with a right answer among the first k of the gallery, in one direction.

    Parameters
    ----------
    ks
        As asked for; a k above the size of the gallery gives 1.
    strict
        hit@k for each k where only a query's own pair is right (what the original project counts).
    groups
        The same where every row that `right_answers` names is right.
    queries, gallery
        How many of each: without them hit@k means nothing.
    """

    ks: tuple[int, ...]
    strict: dict[int, float]
    groups: dict[int, float]
    queries: int
    gallery: int


@dataclass(frozen=True)
class Counts:
    """Where the best-scoring right answer of each query stands; each field is int64 (N,), on the CPU.

    Parameters
    ----------
    above
        Gallery rows that score higher: all wrong.
    tied
        Gallery rows with exactly its score, itself included.
    right_tied
        The right ones among the tied, at least 1.
    right
        The right ones in the whole gallery, at least 1.
    """

    above: Tensor
    tied: Tensor
    right_tied: Tensor
    right: Tensor


def hit_rates(
    query_ND: Tensor, gallery_ND: Tensor, identity: Identity, ks: Iterable[int], block: int = 256
) -> HitRates:
    """Rank the whole gallery for every query by cosine similarity.

    Parameters
    ----------
    query_ND, gallery_ND
        Embeddings of the two sides of the same pairs, any float type and scale, on one device. Zeros score 0.
    identity
        Of the same N pairs, as numpy arrays or tensors anywhere.
    ks
        Each at least 1.
    block
        Queries scored at once: memory grows with block × N. On a CPU 1024 took twice the time of 256.

    Raises
    ------
    UserError
        No pairs, a k below 1, an embedding that is not finite.
    ValueError
        Shapes that do not belong together.
    """
    ks = _checked_ks(ks)
    strict, groups = count_ranks(query_ND, gallery_ND, identity, block)
    return _rates(strict, groups, ks)


def chance(identity: Identity, ks: Iterable[int], block: int = 256) -> HitRates:
    """What a model that knows nothing scores: `hit_rates` with all scores equal.

    That is k / N for strict, and for groups the mean of 1 - C(N - g, k) / C(N, k) over queries with g right answers.
    """
    ks = _checked_ks(ks)
    pairs = _checked_size(identity)
    ids = identity.map(torch.as_tensor)
    blocks = torch.split(torch.arange(pairs), block)
    right = torch.cat([_count(right_answers(ids.take(rows_B), ids)) for rows_B in blocks]).cpu()
    none, one = torch.zeros_like(right), torch.ones_like(right)
    return _rates(Counts(none, one * pairs, one, one), Counts(none, one * pairs, right, right), ks)


@torch.no_grad()
def count_ranks(query_ND: Tensor, gallery_ND: Tensor, identity: Identity, block: int = 256) -> tuple[Counts, Counts]:
    """`hit_rates`' counts, for every metric: with only the own pair right, and with all of `right_answers` right."""
    pairs = _checked_size(identity)
    if query_ND.ndim != 2 or query_ND.shape != gallery_ND.shape or len(query_ND) != pairs:
        raise ValueError(f"{tuple(query_ND.shape)} queries, {tuple(gallery_ND.shape)} gallery rows, {pairs} pairs")
    ids = identity.map(lambda column: torch.as_tensor(column, device=query_ND.device))
    own_N = torch.arange(pairs, device=query_ND.device)
    strict_N4 = torch.empty((pairs, 4), dtype=torch.int64, device=query_ND.device)
    groups_N4 = torch.empty_like(strict_N4)
    for rows_B, scores_BN in _score_blocks(query_ND, gallery_ND, block):
        strict_N4[rows_B] = _stand(scores_BN, rows_B[:, None] == own_N)
        groups_N4[rows_B] = _stand(scores_BN, right_answers(ids.take(rows_B), ids))
    return Counts(*strict_N4.cpu().unbind(1)), Counts(*groups_N4.cpu().unbind(1))


def hit_rate(counts: Counts, k: int) -> float:
    """The mean over queries of the probability of a right answer among the first k rows.

    Summed as fractions and rounded once: the order of the queries cannot show, and N equal terms give that term.
    """
    drawn_N = (k - counts.above).clamp(min=0).minimum(counts.tied)
    each_N3 = torch.stack([drawn_N, counts.tied, counts.right_tied], dim=1)
    cases, repeats = torch.unique(each_N3, dim=0, return_counts=True)
    hits = Fraction(0)
    for case, repeat in zip(cases.tolist(), repeats.tolist(), strict=True):
        hits += repeat * Fraction(_drawing_a_right_one(*case))
    return float(hits / len(counts.above))


def _rates(strict: Counts, groups: Counts, ks: tuple[int, ...]) -> HitRates:
    strict_hits, groups_hits = ({k: hit_rate(counts, k) for k in ks} for counts in (strict, groups))
    return HitRates(ks, strict_hits, groups_hits, queries=len(strict.above), gallery=len(strict.above))


def _drawing_a_right_one(drawn: int, tied: int, right: int) -> float:
    """1 - C(tied - right, drawn) / C(tied, drawn): at least one of `right` in `drawn` of `tied` (hypergeometric).

    In whole numbers, rounded once, so that one right row gives exactly drawn / tied. `right` and `drawn` may change
    places in the formula; the smaller one keeps the binomials small.
    """
    fewer, more = sorted((drawn, right))
    ways = math.comb(tied, fewer)
    return (ways - math.comb(tied - more, fewer)) / ways


def _score_blocks(query_ND: Tensor, gallery_ND: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs of a block of queries and their scores with the whole gallery, until each pair came once.

    Products of different shapes differ in the last bits, and so may two columns of one product: equal gallery rows
    then rank by their position. So equal rows are scored once and their score is copied, for queries too; and the
    gallery is never cut. Rows come sorted, so the very same products are made whatever the order of the pairs.
    """
    query_VD, query_N = _distinct_directions(query_ND, "query")
    gallery_UD, gallery_N = _distinct_directions(gallery_ND, "gallery")
    pairs_N = query_N.argsort()  # pairs with one query lie side by side
    pairs_per_query_V = query_N.bincount(minlength=len(query_VD))
    start = 0
    for block_BD, sizes_B in zip(torch.split(query_VD, block), torch.split(pairs_per_query_V, block), strict=True):
        scores_BU = _float32_product(block_BD, gallery_UD.T)
        end = start + int(sizes_B.sum())
        first = query_N[pairs_N[start]]
        for rows_B in torch.split(pairs_N[start:end], block):  # one query may be that of all pairs
            yield rows_B, scores_BU[query_N[rows_B] - first].index_select(1, gallery_N)
        start = end


def _distinct_directions(rows_ND: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """The distinct rows at length 1 in float32, sorted, and for each row the number of its distinct one.

    Divided by its largest entry first, a row can neither overflow nor vanish, and exact multiples of one row become
    equal to the last bit. Lengths are then at least 1, except for rows of zeros, which stay.
    """
    rows_ND = rows_ND if rows_ND.dtype == torch.float64 else rows_ND.float()
    broken = len(rows_ND) - int(rows_ND.isfinite().all(dim=1).sum())
    if broken:
        raise UserError(
            f"{broken:,} of {len(rows_ND):,} {side} embeddings are not finite",
            "the model diverged or overflowed: use an earlier checkpoint, or evaluate in float32",
            ExitCode.MODEL,
        )
    largest_N1 = rows_ND.abs().amax(dim=1, keepdim=True)
    scaled_ND = (rows_ND / largest_N1.where(largest_N1 > 0, 1)).float()
    distinct_UD, distinct_N = torch.unique(scaled_ND, dim=0, return_inverse=True)
    return distinct_UD / torch.linalg.vector_norm(distinct_UD, dim=1, keepdim=True).clamp(min=1), distinct_N


def _stand(scores_BN: Tensor, right_BN: Tensor) -> Tensor:
    """The four `Counts` of each row, (B, 4)."""
    # The best right score comes from the same product as its competitors: computed apart it differs in the last bits.
    best_B1 = scores_BN.masked_fill(~right_BN, -math.inf).amax(dim=1, keepdim=True)
    tied_BN = scores_BN == best_B1
    counted = (scores_BN > best_B1, tied_BN, tied_BN & right_BN, right_BN)
    return torch.stack([_count(each_BN) for each_BN in counted], dim=1)


def _count(flags_BN: Tensor) -> Tensor:
    return flags_BN.sum(dim=1, dtype=torch.int32).long()  # int32: five times as fast as int64 on a CPU


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` in float32, also where training chose TF32 or autocast: fewer bits make ties of their own."""
    with _ieee_matmul(), torch.autocast(left.device.type, enabled=False):
        return left @ right


@contextmanager
def _ieee_matmul() -> Iterator[None]:
    if not hasattr(torch.backends, "fp32_precision"):
        before = torch.get_float32_matmul_precision()  # before torch 2.9; later it raises once any code has set
        torch.set_float32_matmul_precision("highest")  # one backend alone
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    matmuls = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    chosen = [(matmul, matmul.fp32_precision) for matmul in matmuls if matmul.fp32_precision in ("tf32", "bf16")]
    try:
        for matmul, _ in chosen:
            matmul.fp32_precision = "ieee"
        yield
    finally:
        for matmul, precision in chosen:
            matmul.fp32_precision = precision


def _checked_ks(ks: Iterable[int]) -> tuple[int, ...]:
    ks = tuple(ks)
    if any(k < 1 for k in ks):
        raise UserError(f"hit@k for k = {min(ks)}", "every k is a whole number of at least 1")
    return ks


def _checked_size(identity: Identity) -> int:
    if not len(identity):
        raise UserError("there are no pairs to rank", "give at least one image-caption pair", ExitCode.DATA)
    return len(identity)
