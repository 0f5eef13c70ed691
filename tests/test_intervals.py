"""Intervals equal a bootstrap written out pair by pair, and cover what they promise to cover."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cytoclip import intervals
from cytoclip.intervals import RESAMPLES, Clusters, clusters, differences, weights
from cytoclip.pairs import Pairs


def pairs_of(sources: list[str | None], groups: list[str | None], contents: list[str]) -> Pairs:
    count = len(sources)
    return Pairs(
        images=tuple(Path(f"{i}.png") for i in range(count)),
        names=tuple(f"{i}.png" for i in range(count)),
        captions=tuple(map(str, range(count))),
        groups=tuple(groups),
        sources=tuple(sources),
        labels=(None,) * count,
        contents=tuple(contents),
    )


def some(seed: int, count: int = 60, of: int = 12) -> tuple[dict[str, np.ndarray], Clusters]:
    draw = np.random.default_rng(seed)
    each = {"hit@1": draw.integers(0, 2, count) * 1.0, "rank": draw.integers(1, 30, count) * 1.0}
    return each, Clusters("source", draw.integers(0, of, count), of)


def test_clusters_are_sources_else_groups_else_pictures() -> None:
    by_source = clusters(pairs_of(["a", "b", "a", None], ["g", None, "h", "h"], ["1", "2", "3", "4"]))
    assert (by_source.by, by_source.of.tolist(), by_source.count) == ("source", [0, 1, 0, 2], 3)
    by_group = clusters(pairs_of([None] * 4, ["g", None, "g", None], ["1", "2", "3", "2"]))
    assert (by_group.by, by_group.of.tolist(), by_group.count) == ("group", [0, 1, 0, 1], 2)
    by_picture = clusters(pairs_of([None] * 3, [None] * 3, ["1", "2", "1"]))
    assert (by_picture.by, by_picture.of.tolist(), by_picture.count) == ("picture", [0, 1, 0], 2)


def written_out(column: np.ndarray, drawn: Clusters, statistic: str) -> np.ndarray:
    """The statistic of each resample, by repeating pairs as often as their cluster was drawn."""
    found = []
    for row in weights(drawn.count):
        again = np.repeat(column, row[drawn.of])
        if len(again):
            found.append(getattr(np, statistic)(again))
    return np.array(found)


@pytest.mark.parametrize("seed", range(3))
def test_intervals_equal_a_bootstrap_written_out(seed: int) -> None:
    each, drawn = some(seed)
    got = intervals.intervals(each, drawn)
    assert set(got) == {"hit@1", "mean_rank", "median_rank"}
    for name, column, statistic in (
        ("hit@1", "hit@1", "mean"),
        ("mean_rank", "rank", "mean"),
        ("median_rank", "rank", "median"),
    ):
        wanted = np.percentile(written_out(each[column], drawn, statistic), (2.5, 97.5))
        assert got[name] == pytest.approx(wanted.tolist(), abs=1e-12), name


def test_a_slice_counts_its_own_pairs_alone() -> None:
    each, drawn = some(5)
    among = np.arange(60) % 4 == 0
    got = intervals.intervals(each, drawn, among)
    part = Clusters("source", drawn.of[among], drawn.count)
    for name, column, statistic in (("hit@1", "hit@1", "mean"), ("median_rank", "rank", "median")):
        wanted = np.percentile(written_out(each[column][among], part, statistic), (2.5, 97.5))
        assert got[name] == pytest.approx(wanted.tolist(), abs=1e-12)


def test_resamples_without_a_pair_of_the_slice_are_left_out() -> None:
    hits, drawn = {"hit@1": np.array([1.0, 0.0, 1.0, 1.0])}, Clusters("source", np.arange(4), 4)
    assert intervals.intervals(hits, drawn, np.array([True, False, True, False])) == {"hit@1": (1.0, 1.0)}


def test_differences_are_paired() -> None:
    one, drawn = some(7)
    other = {name: column + 0.25 for name, column in one.items()}
    got = differences(other, one, drawn)
    assert set(got) == {"hit@1", "mean_rank", "median_rank"}
    for limits in got.values():
        assert limits == pytest.approx((0.25, 0.25))  # what varies is the same in both
    draw = np.random.default_rng(1)
    noisy = {name: column + draw.normal(size=60) for name, column in one.items()}
    got = differences(noisy, one, drawn)
    wanted = written_out(noisy["hit@1"], drawn, "mean") - written_out(one["hit@1"], drawn, "mean")
    assert got["hit@1"] == pytest.approx(np.percentile(wanted, (2.5, 97.5)).tolist(), abs=1e-12)
    wanted = written_out(noisy["rank"], drawn, "median") - written_out(one["rank"], drawn, "median")
    assert got["median_rank"] == pytest.approx(np.percentile(wanted, (2.5, 97.5)).tolist(), abs=1e-12)


def test_equal_pairs_of_one_cluster_tell_no_more_than_one() -> None:
    column = np.random.default_rng(0).normal(size=30)
    nothing, numbers = np.zeros(30), np.arange(30)
    alone = differences({"a": column}, {"a": nothing}, Clusters("source", numbers, 30))["a"]
    many = {"a": np.repeat(column, 20)}, {"a": np.zeros(600)}
    assert differences(*many, Clusters("source", np.repeat(numbers, 20), 30))["a"] == pytest.approx(alone)
    naive = differences(*many, Clusters("picture", np.arange(600), 600))["a"]
    assert naive[1] - naive[0] < (alone[1] - alone[0]) / 3
    error = column.std() / np.sqrt(30)
    assert alone == pytest.approx((column.mean() - 1.96 * error, column.mean() + 1.96 * error), abs=0.08)


def test_weights_come_again_and_draw_every_cluster_as_often_on_average() -> None:
    whole = weights(50)
    assert whole.shape == (RESAMPLES, 50)
    assert (whole.sum(axis=1) == 50).all()
    assert abs(whole.mean(axis=0) - 1).max() < 0.15
    assert (weights(50, seed=1) != whole).any()
    assert (weights(50) == whole).all()


def test_blocks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    each, drawn = some(3)
    whole = intervals.intervals(each, drawn)
    monkeypatch.setattr(intervals, "_AT_ONCE", 3 * 8 * drawn.count)
    again = intervals.intervals(each, drawn)
    assert all(again[name] == pytest.approx(limits) for name, limits in whole.items())


def test_one_cluster_says_nothing_of_others() -> None:
    each, _ = some(0)
    alone = Clusters("source", np.zeros(60, np.int64), 1)
    assert intervals.intervals(each, alone) == {}
    assert differences(each, each, alone) == {}


def test_a_slice_within_one_cluster_says_nothing_of_others() -> None:
    """Every resample that has it has the same share of it: an interval of no width, which looks certain."""
    each, drawn = some(1)
    among = (drawn.of == 3) & (np.arange(60) % 2 == 0)
    assert intervals.intervals(each, drawn, among) == {}
    both = among | (drawn.of == 4)
    assert intervals.intervals(each, drawn, both).keys() == {"hit@1", "mean_rank", "median_rank"}


def test_intervals_cover_and_those_of_pairs_alone_do_not() -> None:
    """40 sources of 10 pairs that share their source's chance of a hit, 150 data sets."""
    covered = {"source": 0, "pair": 0}
    for seed in range(150):
        draw = np.random.default_rng(seed)
        of = np.repeat(np.arange(40), 10)
        hits = (draw.random(400) < draw.beta(1, 1, 40)[of]) * 1.0
        for by, numbers, count in (("source", of, 40), ("pair", np.arange(400), 400)):
            low, high = intervals.intervals({"hit@1": hits}, Clusters(by, numbers, count), seed=seed)["hit@1"]
            covered[by] += low <= 0.5 <= high
    assert covered["source"] >= 132  # 95 % of 150 is 142; a binomial below 132 is rarer than 1 in 10,000
    assert covered["pair"] < 110
