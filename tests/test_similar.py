"""Near hashes: the fast search finds exactly what comparing all with all finds."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from cytoclip import similar


def all_with_all(
    hashes_NK: NDArray[np.uint64], sets_N: NDArray[np.int64], count: int, radius: int
) -> tuple[list[list[int]], list[list[int]]]:
    others, distances = [], []
    for i, mine in enumerate(hashes_NK.tolist()):
        row = [(-1, -1)] * count
        for s in range(count):
            found = [
                (min((a ^ b).bit_count() for a in mine for b in theirs), j)
                for j, theirs in enumerate(hashes_NK.tolist())
                if j != i and sets_N[j] == s
            ]
            distance, other = min(found, default=(99, -1))
            row[s] = (other, distance) if distance <= radius else (-1, -1)
        others.append([other for other, _ in row])
        distances.append([distance for _, distance in row])
    return others, distances


def drawn(count: int, each: int, seed: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Families of hashes around few centres, 0 to 9 bits away from them: many at the edge of the radius, some equal."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, max(count // 6, 1), dtype=np.uint64)
    hashes_NK = centres[rng.integers(0, len(centres), (count, 1))].repeat(each, axis=1)
    for row in hashes_NK:
        for k in range(each):
            for bit in rng.choice(64, rng.integers(0, 10), replace=False).tolist():
                row[k] ^= np.uint64(1 << bit)
    return hashes_NK, rng.integers(0, 3, count)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("each", "radius"), [(1, 6), (2, 6), (2, 7), (1, 0)])
def test_it_finds_what_comparing_all_with_all_finds(each: int, radius: int, seed: int) -> None:
    hashes_NK, sets_N = drawn(120, each, seed)
    others, distances = similar.nearest(hashes_NK, sets_N, 3, radius)
    slow = all_with_all(hashes_NK, sets_N, 3, radius)
    assert others.tolist() == slow[0]
    assert distances.tolist() == slow[1]
    assert 0 < (others >= 0).sum() < others.size or radius == 0


def test_small_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes_NK, sets_N = drawn(150, 2, 7)
    whole = similar.nearest(hashes_NK, sets_N, 3)
    monkeypatch.setattr(similar, "_BLOCK", 5)
    small = similar.nearest(hashes_NK, sets_N, 3)
    assert [part.tolist() for part in small] == [part.tolist() for part in whole]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_hardly_any_items(count: int) -> None:
    hashes_NK = np.full((count, 2), 5, np.uint64)
    others, distances = similar.nearest(hashes_NK, np.zeros(count, np.int64), 1)
    assert others.tolist() == [[], [[-1]], [[1], [0]]][count]
    assert distances.tolist() == [[], [[-1]], [[0], [0]]][count]


def test_thousands_of_equal_and_nearly_equal_hashes_take_bounded_memory() -> None:
    """2,000 of one hash and 2,000 of 66 ones within 2 bits of it: 8 million pairs, none of which is kept."""
    near = np.array([0] * 2000 + [1 << (i % 64) | 1 << (i % 63) for i in range(2000)], np.uint64)[:, None]
    sets_N = np.arange(len(near)) % 2
    tracemalloc.start()
    others, distances = similar.nearest(near, sets_N, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert (others >= 0).all()
    assert distances[:2000].max() == 0


def test_random_hashes_are_found_in_a_moment() -> None:
    """100,000 of them would be five billion comparisons; the copies, six bits off, are all found."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 100_000, dtype=np.uint64)
    flips = [sum(1 << bit for bit in rng.choice(64, 6, replace=False).tolist()) for _ in range(500)]
    hashes[-500:] = hashes[:500] ^ np.array(flips, np.uint64)
    began = time.perf_counter()
    others, distances = similar.nearest(hashes[:, None], np.zeros(len(hashes), np.int64), 1)
    assert time.perf_counter() - began < 30
    assert others[:500, 0].tolist() == list(range(99_500, 100_000))
    assert (distances[:500, 0] == 6).all()


def test_a_radius_beyond_what_the_words_find_is_refused() -> None:
    with pytest.raises(ValueError, match="radius"):
        similar.nearest(np.zeros((1, 1), np.uint64), np.zeros(1, np.int64), 1, radius=8)
