"""Every metric equals its definition, by enumeration of all orders within ties."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from cytoclip.expected import Runs, exact_mean, summary, values

KS = (1, 2, 3, 5, 9)


def ranked(order: list[bool]) -> dict[str, float]:
    """All metrics of one query whose gallery is in this order (True: right), by their textbook definitions."""
    places = [place for place, right in enumerate(order, 1) if right]
    found = {f"hit@{k}": float(any(order[:k])) for k in KS}
    found |= {f"recall@{k}": sum(order[:k]) / len(places) for k in KS}
    found |= {"mrr": 1 / places[0], "rank": float(places[0])}
    return found | {"map": sum(sum(order[:place]) / place for place in places) / len(places)}


def enumerated(runs: list[list[bool]]) -> dict[str, float]:
    """Their mean over every order in which the rows of each run can come."""
    orders = [
        list(itertools.chain(*some)) for some in itertools.product(*(itertools.permutations(run) for run in runs))
    ]
    each = [ranked(order) for order in orders]
    return {name: sum(one[name] for one in each) / len(each) for name in each[0]}


def runs_of(queries: list[list[list[bool]]]) -> Runs:
    rows = []
    for number, query in enumerate(queries):
        above = 0
        for run in query:
            if any(run):
                rows.append((number, above, len(run), sum(run)))
            above += len(run)
    order = np.random.default_rng(0).permutation(len(rows))  # in any order
    return Runs(*np.array(rows)[order].T)


def some_queries(seed: int, count: int = 12) -> list[list[list[bool]]]:
    draw = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        sizes = draw.choice([1, 1, 2, 3, 4], size=draw.integers(1, 4))
        query = [draw.random(size).__lt__(0.4).tolist() for size in sizes]
        if any(map(any, query)):
            found.append(query)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_values_equal_enumeration(seed: int) -> None:
    queries = some_queries(seed)
    got = values(runs_of(queries), len(queries), KS, one_right=False)
    assert set(got) == {*(f"hit@{k}" for k in KS), *(f"recall@{k}" for k in KS), "mrr", "map", "rank"}
    for number, query in enumerate(queries):
        for name, expected in enumerated(query).items():
            assert got[name][number] == pytest.approx(expected, abs=1e-12), (query, name)


def test_one_right_answer_makes_recall_the_hit_and_map_the_mrr() -> None:
    queries = [[[False, True, False]], [[False], [True]], [[True, False], [False]]]
    one = values(runs_of(queries), 3, KS, one_right=True)
    several = values(runs_of(queries), 3, KS, one_right=False)
    assert set(one) == {*(f"hit@{k}" for k in KS), "mrr", "rank"}
    for name, same in [*((f"recall@{k}", f"hit@{k}") for k in KS), ("map", "mrr")]:
        assert several[name] == pytest.approx(one[same], abs=1e-15)


def test_worked_example() -> None:
    """Two tied rows, one right, then a right one: by hand."""
    got = values(runs_of([[[True, False], [True]]]), 1, (1, 2), one_right=False)
    assert {name: column[0] for name, column in got.items()} == {
        "hit@1": 0.5,
        "hit@2": 1.0,
        "recall@1": 0.25,
        "recall@2": 0.5,
        "mrr": 0.75,
        "rank": 1.5,
        "map": pytest.approx((0.5 * (1 + 0.5) + 2 / 3) / 2),
    }


def test_a_query_without_an_answer_is_a_bug() -> None:
    with pytest.raises(ValueError, match="1 of 2 queries"):
        values(runs_of([[[True]]]), 2, KS, one_right=True)


def test_large_ties_stay_exact_and_quick() -> None:
    def of(*run: int, k: int) -> dict[str, float]:
        got = values(Runs(*(np.array([column]) for column in (0, *run))), 1, (k,), one_right=False)
        return {name: column[0] for name, column in got.items()}

    assert of(0, 40_000, 1, k=12_345)["hit@12345"] == 12_345 / 40_000
    assert of(0, 40_000, 20_000, k=20_001)["hit@20001"] == 1
    assert of(7, 40_000, 3, k=7)["hit@7"] == 0
    missed = Fraction(math.comb(39_700, 20_000), math.comb(40_000, 20_000))
    assert of(0, 40_000, 300, k=20_000)["hit@20000"] == float(1 - missed)
    harmonic = math.fsum(1 / n for n in range(1, 40_001))
    assert of(0, 40_000, 1, k=1)["mrr"] == pytest.approx(harmonic / 40_000, rel=1e-12)
    assert of(0, 40_000, 40_000, k=1)["map"] == 1
    # Right ones evenly strewn: the precision at each place is about their share.
    assert of(0, 40_000, 20_000, k=1)["map"] == pytest.approx(0.5 + 0.5 * harmonic / 40_000, rel=1e-4)


def test_exact_mean_rounds_once() -> None:
    draw = np.random.default_rng(0)
    for column in (np.full(49, 1 / 49), draw.random(1000), draw.random(500) * 10.0 ** draw.integers(-9, 9, 500)):
        expected = float(sum(map(Fraction, column.tolist())) / len(column))
        assert exact_mean(column) == exact_mean(draw.permutation(column)) == expected
    assert exact_mean(np.full(49, 1 / 49)) == 1 / 49
    assert exact_mean(np.zeros(3)) == 0


def test_summary_has_both_ranks() -> None:
    got = summary({"hit@1": np.array([1.0, 0.0, 0.5]), "rank": np.array([1.0, 9.0, 2.0, 4.0])})
    assert got == {"hit@1": 0.5, "median_rank": 3.0, "mean_rank": 4.0}
