"""The nearest vectors are those of a full sort, in memory and in a file, whatever ties, filters and k ask for."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cytoclip import vectors
from cytoclip.errors import UserError
from cytoclip.vectors import Flat, Held

WIDTH = 16


def drawn(count: int, seed: int = 0, different: int | None = None) -> NDArray[np.float32]:
    """Vectors of length 1, (count, 16), of which only so many are different."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((different or count, WIDTH)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows if different is None else rows[rng.integers(0, different, count)]


def sorted_all(
    rows: NDArray[np.float32], ties: NDArray[np.int64], query: NDArray[np.float32], allowed: NDArray[np.bool_]
) -> list[tuple[int, float]]:
    """The slow twin: every score by a plain sum, all of them sorted."""
    scored = [
        (-float((row.astype(np.float64) * query.astype(np.float64)).sum()), int(tie), number)
        for number, (row, tie) in enumerate(zip(rows, ties, strict=True))
        if allowed[number]
    ]
    return [(number, -score) for score, _, number in sorted(scored)]


def in_a_file(folder: Path, rows: NDArray[np.float32]) -> Flat:
    path = folder / "rows.f32"
    path.write_bytes(rows.tobytes())
    return Flat(path, len(rows), WIDTH)


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(1, 90),
    different=st.integers(1, 90),
    k=st.sampled_from([1, 2, 3, 5, 10, 30, 100]),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_the_nearest_are_those_of_a_full_sort(
    tmp_path_factory: pytest.TempPathFactory, count: int, different: int, k: int, share: float, seed: int
) -> None:
    rows, rng = drawn(count, seed, different), np.random.default_rng(seed + 1)
    ties, allowed = rng.permutation(count), rng.random(count) < share
    query = drawn(1, seed + 2)[0] if seed % 2 else rows[rng.integers(count)]
    expected = sorted_all(rows, ties, query, allowed)[:k]
    before, vectors.BLOCK = vectors.BLOCK, 7  # several blocks, the last one ragged
    try:
        for held in (Held(rows), in_a_file(tmp_path_factory.mktemp("rows"), rows)):
            found, scores = vectors.nearest(held, ties, query, k, None if share == 1 else allowed)
            assert list(zip(found.tolist(), scores.tolist(), strict=True)) == expected
    finally:
        vectors.BLOCK = before


def test_equal_vectors_tie_wherever_they_stand() -> None:
    """A product in blocks differs in its last bits by where a row stands; a sum of its own products does not."""
    rows = np.concatenate([drawn(1000, 1), drawn(1, 9), drawn(1000, 2), drawn(1, 9), drawn(501, 3), drawn(1, 9)])
    ties = np.arange(len(rows))[::-1].copy()
    found, scores = vectors.nearest(Held(rows), ties, drawn(1, 9)[0], 3, None)
    assert found.tolist() == [2503, 2001, 1000]
    assert len(set(scores.tolist())) == 1


def test_a_file_gives_the_rows_asked_for_in_that_order(tmp_path: Path) -> None:
    rows = drawn(50)
    flat = in_a_file(tmp_path, rows)
    for asked in ([3], [49, 0, 7, 7, 8, 9, 1], [], list(range(50))):
        assert np.array_equal(flat.take(np.array(asked, np.int64)), rows[asked])
    assert np.array_equal(flat.block(40, 60), rows[40:])
    assert len(flat) == 50


def test_threads_may_read_one_file(tmp_path: Path) -> None:
    rows = drawn(3000)
    flat, wrong = in_a_file(tmp_path, rows), []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            asked = rng.integers(0, 3000, 40)
            if not np.array_equal(flat.take(asked), rows[asked]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.f32"
    with pytest.raises(UserError, match="No such file"):
        Flat(path, 3, WIDTH)
    path.write_bytes(drawn(3).tobytes()[:-1])
    with pytest.raises(UserError, match="no file of 3 × 16 numbers"):
        Flat(path, 3, WIDTH)
    path.write_bytes(drawn(3).tobytes())
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(UserError, match="no file of 3 × 16"):
        Flat(tmp_path / "link", 3, WIDTH)
    flat = Flat(path, 3, WIDTH)
    with path.open("r+b") as stream:
        stream.truncate(5)
    with pytest.raises(UserError, match="cut off"):
        flat.block(0, 3)


def test_what_is_no_number_comes_last() -> None:
    rows = drawn(5)
    rows[2] = np.nan
    found, scores = vectors.best(Held(rows), np.arange(5), rows[0], np.arange(5), 5)
    assert found[-1] == 2
    assert np.isfinite(scores).all()
