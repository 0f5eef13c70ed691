"""The sparse lists of right answers name exactly what `pairs.right_answers` names."""

from __future__ import annotations

import numpy as np
import pytest

from cytoclip import relevance
from cytoclip.pairs import Identity, right_answers
from cytoclip.relevance import MANY, Queries


def identity_of(kind: str, count: int, seed: int) -> Identity:
    draw, own, none = np.random.default_rng(seed), np.arange(count), np.full(count, -1)
    made = {
        "all different": (own, own, none),
        "five captions a picture": (own, own // 5, none),
        "few captions": (own % 3, own, none),
        "nested": (own // 2, own, own // 6),
        "groups of some": (own, own, np.where(own % 3 == 0, own // 9, -1)),
        "overlapping": (*draw.integers(0, count // 2, (2, count)), draw.integers(-1, count // 3, count)),
        "captions across groups": (own % (count // 2), own, own // 4),
        "one group": (own, own, np.zeros(count, np.int64)),
        "all alike": (np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.int64)),
    }[kind]
    order = draw.permutation(count)
    return Identity(*(np.asarray(column)[order] for column in made))


KINDS = ("all different", "five captions a picture", "few captions", "nested", "groups of some", "overlapping",
    "captions across groups", "one group", "all alike")  # fmt: skip


def table(queries: Queries, columns: int) -> np.ndarray:
    """How many right rows each query has at each distinct gallery row, (Q, U)."""
    found = np.zeros((len(queries.row), columns), np.int64)
    np.add.at(found, (queries.query, queries.column), queries.count)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [7, 150])
@pytest.mark.parametrize("rows", ["distinct", "some equal", "one"])
def test_shared_lists_every_right_answer(kind: str, count: int, rows: str) -> None:
    identity = identity_of(kind, count, seed=count)
    draw = np.random.default_rng(1)
    distinct = {"distinct": count, "some equal": count // 2, "one": 1}[rows]
    query_row, gallery_row = draw.permutation(count) % distinct, draw.permutation(count) % distinct
    queries = relevance.shared(query_row, gallery_row, identity)
    right = right_answers(identity, identity).astype(np.int64)
    expected = np.zeros((count, distinct), np.int64)
    np.add.at(expected.T, gallery_row, right.T)
    got = table(queries, distinct)[queries.of_pair]
    crowded = np.isin(queries.of_pair, queries.crowded)
    assert (got[~crowded] == expected[~crowded]).all()
    assert not got[crowded].any()
    assert (queries.row[queries.of_pair] == query_row).all()
    assert (queries.row == query_row[queries.pair]).all()
    assert (expected[queries.pair][queries.of_pair] == expected).all()  # one query's pairs have the same answers
    assert ((expected > 0).sum(axis=1)[crowded] > MANY / 3).all()  # of three kinds that may overlap
    assert (relevance.right_counts(identity) == right.sum(axis=1)).all()


def test_what_is_crowded() -> None:
    count, own = 4 * MANY, np.arange(4 * MANY)
    many = relevance.shared(own, own, identity_of("one group", count, 0))
    assert len(many.crowded) == count
    captions = Identity(own % 4, own, np.full(count, -1))
    assert len(relevance.shared(own, own % 4, captions).crowded) == 0  # each picture has one different right text
    assert len(relevance.shared(own % 4, own, captions).crowded) == 0  # and each text its 32 pictures
    more = Identity(own % 3, own, np.full(count, -1))
    asked = relevance.shared(own % 3, own, more)
    assert asked.crowded.tolist() == [0, 1, 2]
    assert len(asked.row) == 3


def test_own_is_one_answer_each() -> None:
    query_row, gallery_row = np.array([0, 0, 1, 0]), np.array([2, 2, 0, 1])
    queries = relevance.own(query_row, gallery_row)
    assert len(queries.row) == 3  # the first two pairs put the same question
    assert queries.of_pair[0] == queries.of_pair[1]
    got = table(queries, 3)[queries.of_pair]
    assert (got == np.eye(3, dtype=np.int64)[gallery_row]).all()
    assert not len(queries.crowded)
