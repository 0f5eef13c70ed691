"""How well a query finds its answers in a gallery: every metric, defined once, from embeddings and `right_answers`.

Both directions come from one pass over the scores (`tally`), ties are worth their expectation (`expected`), and who is
right for whom is listed sparsely (`relevance`): memory grows with N and never with N².

Letters: N pairs, D embedding, V different pictures' embeddings, U different captions', b queries sorted at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cytoclip import expected, relevance, tally
from cytoclip.errors import ExitCode, UserError
from cytoclip.expected import Runs, Values
from cytoclip.pairs import Identity, right_answers
from cytoclip.relevance import Queries
from cytoclip.tally import Answers, Side

DIRECTIONS = ("image_to_text", "text_to_image")
_SORTED_AT_ONCE = 1 << 19  # scores; with all that is sorted along, about 100 bytes each


@dataclass(frozen=True)
class Ranked:
    """Every metric of every query of one direction: float64 (N,) by name (`expected.values` says what each is).

    Parameters
    ----------
    strict
        Only a query's own pair is right, which is what the original project counts.
    groups
        Every row that `right_answers` names is right. The same object as `strict` where that is its own pair always.
    """

    strict: Values
    groups: Values

    def flat(self) -> Values:
        """`hit@1` by pair, `hit@1_groups` by the relation, and so on; `rank` and `rank_groups`."""
        return {**self.strict, **{f"{name}_groups": column for name, column in self.groups.items()}}


@torch.no_grad()
def rank(
    image_ND: Tensor,
    text_ND: Tensor,
    identity: Identity,
    ks: Iterable[int],
    advance: Callable[[int], None] | None = None,
) -> dict[str, Ranked]:
    """Rank all captions for each picture and all pictures for each caption, by cosine similarity.

    Parameters
    ----------
    image_ND, text_ND
        Embeddings of the two sides of the same pairs, any float type and scale, on one device. Zeros score 0.
    identity
        Of the same N pairs, as numpy arrays or tensors anywhere.
    ks
        Each at least 1; a k above N gives 1.
    advance
        Called with how many of the different pictures were compared with all captions.

    Returns
    -------
    By `image_to_text` and `text_to_image`.

    Raises
    ------
    UserError
        No pairs, a k below 1, an embedding that is not finite.
    ValueError
        Shapes that do not belong together.
    """
    ks, pairs = _checked_ks(ks), _checked_size(identity)
    if image_ND.ndim != 2 or image_ND.shape != text_ND.shape or len(image_ND) != pairs:
        raise ValueError(f"{tuple(image_ND.shape)} pictures, {tuple(text_ND.shape)} captions, {pairs} pairs")
    identity = identity.map(_on_cpu)
    images, image_N = _distinct(image_ND, "image")
    texts, text_N = _distinct(text_ND, "text")
    one_right = bool((relevance.right_counts(identity) == 1).all())
    asked = [relevance.own(image_N, text_N), relevance.own(text_N, image_N)]
    if not one_right:
        asked += [relevance.shared(image_N, text_N, identity), relevance.shared(text_N, image_N, identity)]
    forward, backward = _answers(asked[0::2], len(texts.rows)), _answers(asked[1::2], len(images.rows))
    counted = tally.count(images, texts, forward, Answers(backward.column, backward.row), advance)
    sides = [(images, texts, text_N, forward, counted[0]), (texts, images, image_N, backward, counted[1])]
    found = {}
    for number, (direction, (query, gallery, gallery_N, answers, counts)) in enumerate(
        zip(DIRECTIONS, sides, strict=True)
    ):
        relations: list[Values] = []
        for queries in asked[number::2]:
            runs = [_runs(queries, answers, counts, len(gallery.rows))]
            runs += _sorted_runs(queries, query, gallery, gallery_N, identity)
            strict = not relations
            each = expected.values(Runs.joined(runs), len(queries.row), ks, one_right=strict)
            relations.append({name: column[queries.of_pair] for name, column in each.items()})
        found[direction] = Ranked(relations[0], relations[-1])
    return found


def chance(identity: Identity, ks: Iterable[int]) -> Ranked:
    """What a model that knows nothing scores, in either direction: `rank` with all scores equal.

    hit@k is k / N by pair, and for g right answers of N 1 − C(N − g, k) / C(N, k).
    """
    ks, pairs = _checked_ks(ks), _checked_size(identity)
    right = relevance.right_counts(identity.map(_on_cpu))
    numbers = np.arange(pairs)
    none, all_ = np.zeros_like(numbers), np.full_like(numbers, pairs)
    strict = expected.values(Runs(numbers, none, all_, np.ones_like(numbers)), pairs, ks, one_right=True)
    if (right == 1).all():
        return Ranked(strict, strict)
    return Ranked(strict, expected.values(Runs(numbers, none, all_, right), pairs, ks, one_right=False))


def _distinct(rows_ND: Tensor, side: str) -> tuple[Side, NDArray[np.int64]]:
    """The distinct rows at length 1 in float32, sorted, and for each row the number of its distinct one.

    Products of different shapes differ in the last bits, and so may two columns of one product: equal rows would rank
    by their position, so they are scored once. Sorted, they do not depend on the order of the pairs. Divided by its
    largest entry first, a row can neither overflow nor vanish, and exact multiples of one row become equal to the last
    bit. Lengths are then at least 1, except for rows of zeros, which stay.
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
    distinct_UD, of, weights = torch.unique(scaled_ND, dim=0, return_inverse=True, return_counts=True)
    unit_UD = distinct_UD / torch.linalg.vector_norm(distinct_UD, dim=1, keepdim=True).clamp(min=1)
    return Side(unit_UD, weights.cpu().numpy()), of.cpu().numpy()


def _answers(relations: Sequence[Queries], columns: int) -> Answers:
    """All listed answers of one direction, each place once, sorted."""
    places = np.unique(np.concatenate([each.row[each.query] * columns + each.column for each in relations]))
    return Answers(places // columns, places % columns)


def _runs(queries: Queries, answers: Answers, counts: tally.Counts, columns: int) -> Runs:
    """Where the listed answers stand; those of one query with one score are one run."""
    wanted = queries.row[queries.query] * columns + queries.column
    at = np.searchsorted(answers.row * columns + answers.column, wanted)
    above, tied = counts.above[at], counts.tied[at]
    both, of = np.unique(np.stack([queries.query, above], axis=1), axis=0, return_inverse=True)
    of = of.reshape(-1)
    right = np.bincount(of, queries.count, len(both)).astype(np.int64)
    tied_of_run = np.zeros(len(both), np.int64)
    tied_of_run[of] = tied
    return Runs(both[:, 0], both[:, 1], tied_of_run, right)


def _sorted_runs(
    queries: Queries, asking: Side, gallery: Side, gallery_N: NDArray[np.int64], identity: Identity
) -> list[Runs]:
    """Where the answers of crowded queries stand: their whole rows are sorted, some at a time."""
    device, width = asking.rows.device, len(gallery.rows)
    gallery_of, weights = torch.from_numpy(gallery_N), torch.from_numpy(gallery.weights)
    found = []
    for some in np.array_split(queries.crowded, max(1, -(-len(queries.crowded) * len(gallery_N) // _SORTED_AT_ONCE))):
        if not len(some):
            continue
        right_bN = torch.from_numpy(right_answers(identity.take(queries.pair[some]), identity))
        right_bU = torch.zeros(len(some), width, dtype=torch.int64).index_add_(1, gallery_of, right_bN.long())
        with tally.ieee_products(), torch.autocast(device.type, enabled=False):
            scores_bU = asking.rows[torch.from_numpy(queries.row[some]).to(device)] @ gallery.rows.T
        sorted_bU, order_bU = scores_bU.sort(dim=1, descending=True)
        order_bU = order_bU.cpu()
        starts_bU = torch.ones(len(some), width, dtype=torch.bool)
        starts_bU[:, 1:] = (sorted_bU[:, 1:] != sorted_bU[:, :-1]).cpu()
        run_bU = starts_bU.flatten().cumsum(0) - 1
        tied = torch.bincount(run_bU, weights[order_bU].flatten().double()).long()
        right = torch.bincount(run_bU, right_bU.gather(1, order_bU).flatten().double()).long()
        query = torch.arange(len(some))[:, None].expand_as(starts_bU)[starts_bU]
        above = tied.cumsum(0) - tied - query * len(gallery_N)
        kept = right > 0
        found.append(Runs(some[query[kept].numpy()], *(each[kept].numpy() for each in (above, tied, right))))
    return found


def _on_cpu(column: object) -> NDArray[np.int64]:
    return column.cpu().numpy() if isinstance(column, Tensor) else np.asarray(column)


def _checked_ks(ks: Iterable[int]) -> tuple[int, ...]:
    ks = tuple(ks)
    if any(k < 1 for k in ks):
        raise UserError(f"hit@k for k = {min(ks)}", "every k is a whole number of at least 1")
    return ks


def _checked_size(identity: Identity) -> int:
    if not len(identity):
        raise UserError("there are no pairs to rank", "give at least one image-caption pair", ExitCode.DATA)
    return len(identity)
