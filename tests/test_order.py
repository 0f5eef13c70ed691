"""The order of the pairs: every pair once an epoch, the same for any share of it, and who stands in for whom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cytoclip import order
from cytoclip.order import STANDBYS, Order, Share, Wording
from cytoclip.pairs import Pairs, spread

ORDER = Order(pairs=23, batch_size=4, seed=7)  # 5 steps an epoch, 3 pairs over


def epoch_rows(order: Order, epoch: int) -> list[int]:
    per = order.steps_per_epoch
    return np.concatenate([order.rows(step) for step in range(epoch * per, (epoch + 1) * per)]).tolist()


def test_each_pair_comes_once_an_epoch() -> None:
    order = Order(pairs=24, batch_size=4, seed=7)
    assert order.steps_per_epoch == 6
    for epoch in range(3):
        assert sorted(epoch_rows(order, epoch)) == list(range(24))


def test_two_epochs_differ_and_are_reproducible() -> None:
    """Trap 25: the same batches every epoch train on the same negatives, and nothing shows it."""
    one, two = epoch_rows(ORDER, 0), epoch_rows(ORDER, 1)
    assert one != two
    assert [epoch_rows(Order(23, 4, 7), epoch) for epoch in (0, 1)] == [one, two]
    assert epoch_rows(Order(23, 4, 8), 0) != one
    assert one != sorted(one)


def test_the_remainder_is_dropped_and_is_another_one_each_epoch() -> None:
    """A pair that is dropped always would never be trained on."""
    assert ORDER.steps_per_epoch == 5
    dropped = [frozenset(range(23)) - frozenset(epoch_rows(ORDER, epoch)) for epoch in range(20)]
    assert {len(some) for some in dropped} == {3}
    assert len(set(dropped)) > 10
    assert frozenset.union(*dropped) == frozenset(range(23))


def test_a_batch_never_holds_a_pair_twice() -> None:
    assert all(len(set(ORDER.rows(step).tolist())) == 4 for step in range(50))


def test_steps_are_rows_one_after_another_from_anywhere() -> None:
    """Resuming in the middle of an epoch, and across its end, is the same as skipping."""
    expected = [ORDER.rows(step).tolist() for step in range(17)]
    for first in (0, 3, 5, 11, 17):
        assert [rows.tolist() for rows, _ in ORDER.draws(first, 17)] == expected[first:]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 7])
def test_the_shares_of_all_processes_are_the_global_batch_in_order(size: int, first: int) -> None:
    """The loss takes its own rows from that place of the global identity; another order would pair others."""
    shares = [Share(ORDER, first, 13, rank, size) for rank in range(size)]
    assert {len(share) for share in shares} == {13 - first}
    together = [[draw for part in parts for draw in part] for parts in zip(*shares, strict=True)]
    assert [[row for row, _ in draws] for draws in together] == [ORDER.rows(step).tolist() for step in range(first, 13)]
    assert [{epoch for _, epoch in draws} for draws in together] == [{step // 5} for step in range(first, 13)]


MIXED = Order(pairs=23, batch_size=10, seed=7, replay=((9, 3), (40, 2)))  # 5 + 3 + 2 a batch


def test_a_replayed_root_has_its_share_of_every_batch_and_epochs_of_its_own() -> None:
    assert (MIXED.own, MIXED.steps_per_epoch) == (5, 4)
    seen: dict[int, list[int]] = {}
    for rows, epochs in MIXED.draws(0, 12):
        assert [sum(low <= row < high for row in rows) for low, high in ((0, 23), (23, 32), (32, 72))] == [5, 3, 2]
        assert len(set(rows.tolist())) == 10
        for row, epoch in zip(rows[5:8].tolist(), epochs[5:8].tolist(), strict=True):
            seen.setdefault(epoch, []).append(row)
    assert {epoch: sorted(rows) for epoch, rows in seen.items()} == {key: list(range(23, 32)) for key in range(4)}
    assert len({tuple(rows) for rows in seen.values()}) == 4, "each epoch in another order"
    assert [rows.tolist() for rows, _ in MIXED.draws(7, 9)] == [MIXED.rows(step).tolist() for step in (7, 8)]


def test_the_training_split_comes_in_the_same_order_with_and_without_a_replay() -> None:
    alone = Order(pairs=23, batch_size=5, seed=7)
    assert [MIXED.rows(step)[:5].tolist() for step in range(9)] == [alone.rows(step).tolist() for step in range(9)]


def test_weights_are_pairs_for_one_of_the_training_split() -> None:
    assert order.replayed(100, [1.0]) == [50]
    assert order.replayed(100, [0.25]) == [20]
    assert order.replayed(100, [0.5, 0.5]) == [25, 25]
    assert order.replayed(8, [0.001]) == [1], "never none at all"
    assert order.replayed(8, []) == []


@pytest.mark.parametrize("given", [ORDER, MIXED], ids=["one root", "replayed roots"])
def test_standbys_are_the_same_place_in_the_next_batches_of_the_epoch(given: Order) -> None:
    """Twin: by the rows themselves, each root going round in its own epoch."""
    roots = [(given.pairs, given.own), *given.replay]
    ahead = min(STANDBYS, *(pairs // each - 1 for pairs, each in roots))
    steps = list(range(2, 9))
    tables = list(given.standbys(2, 9))
    assert [table.shape for table in tables] == [(ahead, given.batch_size)] * len(steps)
    for step, table in zip(steps, tables, strict=True):
        begin = 0
        for pairs, each in roots:
            whole = pairs // each
            for i in range(ahead):
                other = step - step % whole + (step + 1 + i) % whole
                assert table[i, begin : begin + each].tolist() == given.rows(other)[begin : begin + each].tolist()
            begin += each
        everyone = [*given.rows(step).tolist(), *table.flatten().tolist()]
        assert len(set(everyone)) == len(everyone), "nobody stands in for two, or is there already"


def test_one_batch_an_epoch_has_no_standbys() -> None:
    assert [table.shape for table in Order(5, 4, 0).standbys(0, 2)] == [(0, 4)] * 2


def test_a_share_names_its_standbys_behind_its_draws() -> None:
    plain, skipping = (list(Share(ORDER, 3, 6, 1, 2, skips)) for skips in (False, True))
    assert [[draw[:2] for draw in draws] for draws in skipping] == plain
    expected = [table[:, 2:].T.tolist() for table in ORDER.standbys(3, 6)]
    assert [[list(draw[2:]) for draw in draws] for draws in skipping] == expected


def test_every_caption_of_a_pair_is_drawn_as_often_as_the_others() -> None:
    more = (("b", "c"), (), ("e",), *[("x", "y", "z")] * 40)
    blank = (None,) * len(more)
    pairs = Pairs((Path("p"),) * 43, tuple(map(str, range(43))), ("a",) * 43, blank, blank, blank, more=more)
    wording = Wording.of(pairs, seed=5)
    rows = np.arange(43)
    drawn = np.stack([wording.rows(rows, np.full(43, epoch)) for epoch in range(12)])
    begins = np.cumsum([0, *(1 + len(texts) for texts in more)])
    for row, texts in enumerate(more):
        assert sorted(drawn[:, row]) == sorted([*range(begins[row], begins[row + 1])] * (12 // (1 + len(texts))))
    assert len(spread(pairs)) == begins[-1]
    assert len({tuple(drawn[:4, row] - begins[row]) for row in range(3, 43)}) == 4, "not all begin with the first"
    assert np.array_equal(wording.rows(rows[7:9], np.array([3, 5])), drawn[[3, 5], [7, 8]]), "of pair and epoch alone"
    assert not np.array_equal(Wording.of(pairs, seed=6).rows(rows, rows * 0), drawn[0])


def test_with_one_caption_each_the_number_is_the_pairs() -> None:
    wording = Wording(np.arange(5), np.ones(5, np.int64), seed=1)
    assert wording.rows(np.array([4, 0, 2]), np.array([9, 1, 0])).tolist() == [4, 0, 2]
