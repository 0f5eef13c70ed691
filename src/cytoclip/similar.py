"""Which pictures look alike: pairs of perceptual hashes that differ in few bits, found without comparing all with all.

Letters: N items, K hashes of each, S sets, U different hashes, M matches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# Bits of 64. Measured on real micrographs (632,000 pairs of different pictures): by six hashes each, the nearest two
# are 8 apart, while copies that were compressed anew, resized or cropped by up to 2 % stay within 6.
RADIUS = 6

_WORDS = 4  # of 16 bits: hashes within 7 bits of each other have a word that differs in at most one, by pigeonhole
_FLIPS = (0, *(1 << bit for bit in range(16)))
_BLOCK = 1 << 18  # candidates, or matches, handled at once: bounds the memory whatever the hashes are
_ITEM = (1 << 40) - 1  # a key is a distance above 40 bits of an item: the smallest is the nearest, the first of several


def nearest(hashes_NK: NDArray[np.uint64], sets_N: Ints, count: int, radius: int = RADIUS) -> tuple[Ints, Ints]:
    """For each item the other item of each set that looks most alike, if any two of their hashes are within `radius`.

    Exact: the same as comparing every hash with every other one. Equal hashes are one, so thousands of equal pictures
    cost no more than two, and memory does not grow with the number of matches.

    Parameters
    ----------
    sets_N
        The set, 0..count-1, that each item is in.
    radius
        In bits, at most 7.

    Returns
    -------
    int64 (N, S) twice: the other item, the first of several equally near ones, and its distance; else -1.
    """
    if not 0 <= radius < 2 * _WORDS:
        raise ValueError(f"a radius of {radius} is not in 0..{2 * _WORDS - 1}")
    items, each = hashes_NK.shape
    values_U, which = np.unique(hashes_NK.reshape(-1), return_inverse=True)
    owner = np.repeat(np.arange(items), each)
    rows, keys = _two_best(which * count + sets_N[owner], owner)  # the members of each hash, by set
    begins = np.searchsorted(rows, np.arange(len(values_U) + 1) * count)
    own_rows, own_keys = rows, keys
    for near, far, distance in _gathered(_within(values_U, radius)):
        sizes = begins[far + 1] - begins[far]
        member = np.repeat(begins[far], sizes) + _counting(sizes)
        new_rows = np.repeat(near, sizes) * count + own_rows[member] % count
        new_keys = (np.repeat(distance, sizes) << 40) + own_keys[member]
        rows, keys = _two_best(np.concatenate([rows, new_rows]), np.concatenate([keys, new_keys]))
    return _others(rows, keys, which.reshape(items, each), count)


def _others(rows: Ints, keys: Ints, which_NK: Ints, count: int) -> tuple[Ints, Ints]:
    """For each item the best of its hashes' two that is not the item itself."""
    none = np.iinfo(np.int64).max
    itself = np.arange(len(which_NK))
    best_NS = np.full((len(which_NK), count), none)
    for which in which_NK.T:
        for s in range(count):
            wanted = which * count + s
            at = np.searchsorted(rows, wanted)
            for place in (at, at + 1):
                inside = np.minimum(place, len(rows) - 1)
                fits = (place < len(rows)) & (rows[inside] == wanted) & (keys[inside] & _ITEM != itself)
                best_NS[:, s] = np.minimum(best_NS[:, s], np.where(fits, keys[inside], none))
    found = best_NS < none
    return np.where(found, best_NS & _ITEM, -1), np.where(found, best_NS >> 40, -1)


def _two_best(rows: Ints, keys: Ints) -> tuple[Ints, Ints]:
    """Of each row the smallest key, and the smallest with another item: sorted by row, then key."""
    order = np.lexsort((keys, rows))
    rows, keys = rows[order], keys[order]
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    first = np.repeat(starts, np.diff(starts, append=len(rows)))
    others = np.flatnonzero(keys & _ITEM != keys[first] & _ITEM)
    _, at = np.unique(rows[others], return_index=True)
    kept = np.sort(np.concatenate([starts, others[at]]))
    return rows[kept], keys[kept]


def _gathered(found: Iterator[tuple[Ints, Ints, Ints]]) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Matches in both directions, in few large blocks: each is merged into what was found before by a sort."""
    waiting: list[tuple[Ints, Ints, Ints]] = []
    size = 0
    for left, right, distance in found:
        waiting += [(left, right, distance), (right, left, distance)]
        size += 2 * len(left)
        if size >= _BLOCK:
            yield _joined(waiting)
            waiting, size = [], 0
    if size:
        yield _joined(waiting)


def _joined(blocks: list[tuple[Ints, Ints, Ints]]) -> tuple[Ints, Ints, Ints]:
    near, far, distance = (np.concatenate(column) for column in zip(*blocks, strict=True))
    return near, far, distance


def _within(values_U: NDArray[np.uint64], radius: int) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Pairs of different hashes within `radius` bits and their distance, in blocks; a pair may come several times."""
    for shift in range(0, 64, 64 // _WORDS):
        word_U = ((values_U >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
        order = np.argsort(word_U, kind="stable")
        begins = np.searchsorted(word_U[order], np.arange(1 << 16))
        ends = np.append(begins[1:], len(order))
        for flip in _FLIPS:
            left = order if flip == 0 else order[word_U[order] & flip == 0]  # the other half meets it from there
            bucket = word_U[left] ^ flip
            begin = np.arange(1, len(left) + 1) if flip == 0 else begins[bucket]
            yield from _compared(values_U, left, order, begin, ends[bucket] - begin, radius)


def _compared(
    values_U: NDArray[np.uint64], left: Ints, order: Ints, begin: Ints, sizes: Ints, radius: int
) -> Iterator[tuple[Ints, Ints, Ints]]:
    """`left[i]` with `order[begin[i] : begin[i] + sizes[i]]`, for as many i at once as fit into a block."""
    total = np.cumsum(sizes)
    start = 0
    while start < len(left):
        done = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, done + _BLOCK, side="right")))
        some = sizes[start:stop]
        one = np.repeat(left[start:stop], some)
        other = order[np.repeat(begin[start:stop], some) + _counting(some)]
        distance = np.bitwise_count(values_U[one] ^ values_U[other]).astype(np.int64)
        near = distance <= radius
        if near.any():
            yield one[near], other[near], distance[near]
        start = stop


def _counting(sizes: Ints) -> Ints:
    """0..n-1 for each n of `sizes`, behind one another."""
    return np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
