"""Which rows of a gallery are right for a query, without a table of all pairs: `pairs.right_answers`, listed sparsely.

Pairs that put the same question (one query embedding, the same right answers) are one query; gallery rows with the same
embedding are one row that counts for several.

Letters: N pairs, Q queries, n answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cytoclip.pairs import NO_GROUP, Identity

Ids = NDArray[np.int64]
MANY = 32  # answers of one query: to sort its whole row costs about as much as comparing with 80 answers one by one


@dataclass(frozen=True)
class Queries:
    """The different queries of one direction, and where their right answers are.

    Parameters
    ----------
    of_pair
        (N,): the query that each pair puts.
    row
        (Q,): its embedding, as a number of a distinct one.
    pair
        (Q,): a pair that puts it.
    query, column, count
        (n,): right answers of the queries that have at most `MANY`: whose, which distinct gallery row, for how many.
    crowded
        The queries that have more, which are not listed.
    """

    of_pair: Ids
    row: Ids
    pair: Ids
    query: Ids
    column: Ids
    count: Ids
    crowded: Ids


def own(query_row: Ids, gallery_row: Ids) -> Queries:
    """Each pair's one right answer is its own: what `strict` means. Both are (N,), numbers of distinct embeddings."""
    both, pair, of_pair = _unique(np.stack([query_row, gallery_row], axis=1))
    numbers = np.arange(len(both))
    return Queries(of_pair, both[:, 0], pair, numbers, both[:, 1], np.ones_like(numbers), numbers[:0])


def shared(query_row: Ids, gallery_row: Ids, identity: Identity) -> Queries:
    """All that `right_answers` names are right."""
    kinds = _needed(identity)
    keys, pair, of_pair = _unique(np.stack([query_row, *kinds], axis=1))
    classes = keys[:, 1:] >= 0
    alone = classes.sum(axis=1) == 1
    parts: list[tuple[Ids, Ids, Ids]] = []
    crowded = np.zeros(len(keys), bool)
    for kind, ids in enumerate(kinds):
        table = _Table.of(ids, gallery_row)
        asking = np.flatnonzero(alone & classes[:, kind])
        many = table.size(keys[asking, 1 + kind]) > MANY
        crowded[asking[many]] = True
        parts.append(table.listed(asking[~many], keys[asking[~many], 1 + kind]))
    mixed = np.flatnonzero(~alone)
    members = [_Table.of(ids, np.arange(len(ids))) for ids in kinds]
    sizes = sum(table.size(keys[mixed, 1 + kind]) for kind, table in enumerate(members))
    crowded[mixed[sizes > MANY]] = True
    parts.append(_united(mixed[sizes <= MANY], keys, members, gallery_row))
    query, column, count = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Queries(of_pair, keys[:, 0], pair, query, column, count, np.flatnonzero(crowded))


def right_counts(identity: Identity) -> Ids:
    """(N,): how many rows of the gallery are right for each pair, itself included."""
    rows = np.zeros(len(identity), np.int64)
    queries = shared(rows, np.arange(len(identity)), identity)
    counts = np.bincount(queries.query, queries.count, len(queries.row)).astype(np.int64)
    numbers = _arrays(identity)
    for query in queries.crowded.tolist():
        pair = queries.pair[query]
        same = [(ids == ids[pair]) & (ids[pair] != NO_GROUP) for ids in numbers]
        counts[query] = np.logical_or.reduce(same).sum()
    return counts[queries.of_pair]


def _arrays(identity: Identity) -> list[Ids]:
    return [np.asarray(ids, np.int64) for ids in (identity.caption, identity.image, identity.group)]


def _needed(identity: Identity) -> list[Ids]:
    """Captions, pictures and groups, -1 where all that share one share another that stays: it adds no answer.

    So pairs with the same right answers mostly have the same numbers, and most have one number only.
    """
    caption, image, group = _arrays(identity)
    image_stays = ~_inside(image, caption)
    group_stays = (group != NO_GROUP) & ~_inside(group, caption) & ~_inside(group, image)
    caption_stays = ~(_inside(caption, image) & image_stays) & ~(_inside(caption, group) & group_stays)
    image_stays &= ~(_inside(image, group) & group_stays)
    stay = (caption_stays, image_stays, group_stays)
    return [np.where(stays, ids, NO_GROUP) for ids, stays in zip((caption, image, group), stay, strict=True)]


def _inside(ids: Ids, others: Ids) -> NDArray[np.bool_]:
    """(N,): whether all pairs that share this pair's number also have one number of the others, or none of them any."""
    _, of = np.unique(ids, return_inverse=True)
    low, high = np.full(of.max() + 1, np.iinfo(np.int64).max), np.full(of.max() + 1, -1)
    np.minimum.at(low, of, others)
    np.maximum.at(high, of, others)
    whole: NDArray[np.bool_] = (low == high)[of]
    return whole


@dataclass(frozen=True)
class _Table:
    """For each class its different values, how often each comes, one class behind another."""

    start: Ids
    value: Ids
    count: Ids

    @classmethod
    def of(cls, classes: Ids, values: Ids) -> _Table:
        there = classes >= 0
        both, count = np.unique(np.stack([classes[there], values[there]], axis=1), axis=0, return_counts=True)
        start = np.searchsorted(both[:, 0], np.arange(classes.max(initial=0) + 2))
        return cls(start, both[:, 1], count)

    def size(self, classes: Ids) -> Ids:
        """How many different values each class has; none for -1."""
        return np.where(classes >= 0, self.start[classes + 1] - self.start[classes], 0)

    def listed(self, askers: Ids, classes: Ids) -> tuple[Ids, Ids, Ids]:
        """Each asker with each value of its class, and the value's count."""
        sizes = self.size(classes)
        ends = np.cumsum(sizes)
        at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.start[classes] - (ends - sizes), sizes)
        return np.repeat(askers, sizes), self.value[at], self.count[at]


def _united(asking: Ids, keys: Ids, members: list[_Table], gallery_row: Ids) -> tuple[Ids, Ids, Ids]:
    """Answers of queries that several kinds of likeness give: each pair counts once."""
    parts = []
    for kind, table in enumerate(members):
        classes = keys[asking, 1 + kind]
        there = classes >= 0
        query, pair, _ = table.listed(asking[there], classes[there])
        parts.append(np.stack([query, pair], axis=1))
    once = np.unique(np.concatenate(parts), axis=0)
    columns = np.stack([once[:, 0], gallery_row[once[:, 1]]], axis=1)
    both, count = np.unique(columns, axis=0, return_counts=True)
    return both[:, 0], both[:, 1], count


def _unique(rows: Ids) -> tuple[Ids, Ids, Ids]:
    """The different rows, one place of each, and for every row the number of its different one."""
    different, first, of = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return different, first, of.reshape(-1)
