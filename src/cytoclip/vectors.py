"""The nearest of many vectors, exactly; how they lie in memory or in a file.

Letters: N vectors, D dimensions, k nearest.

All vectors are of length 1, and scores are cosines. The candidates' scores are sums in float64 of the float32 vectors,
which come out the same for equal vectors wherever they stand: ties are ties, and are resolved by a number of each.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cytoclip.errors import ExitCode, UserError

BLOCK = 16_384  # rows compared at a time: 32 MB of 512 dimensions
_SPARSE = 8  # rows of which one in so many is wanted are read one by one, not in blocks
_SLACK = 1e-5  # of a float32 cosine: some hundred products, each rounded to 6e-8 of 1

Found = tuple[NDArray[np.int64], NDArray[np.float64]]


class Vectors(Protocol):
    """N vectors, read by row: `Held` or `Flat`."""

    def __len__(self) -> int: ...

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Those at `rows`."""

    def block(self, begin: int, end: int) -> NDArray[np.float32]:
        """Those from `begin` up to and without `end`."""


class Held:
    """Vectors in memory."""

    def __init__(self, rows_ND: NDArray[np.float32]) -> None:
        self._rows_ND = rows_ND

    def __len__(self) -> int:
        return len(self._rows_ND)

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._rows_ND[rows]

    def block(self, begin: int, end: int) -> NDArray[np.float32]:
        return self._rows_ND[begin:end]


class Flat:
    """Vectors in a file of nothing else, float32 row by row. It is read and not mapped, so that memory stays flat.

    Raises
    ------
    UserError
        Where the file is not there, no regular file, or not of N · D · 4 bytes.
    """

    def __init__(self, path: Path, count: int, width: int) -> None:
        self._count, self._width, self._row = count, width, 4 * width
        self._lock = threading.Lock()
        try:
            facts = path.lstat()
            if not stat.S_ISREG(facts.st_mode) or facts.st_size != count * self._row:
                raise damaged(path, f"it is no file of {count} × {width} numbers")
            self._stream = path.open("rb", buffering=0)
        except OSError as error:
            raise damaged(path, error.strerror or str(error)) from None

    def __len__(self) -> int:
        return self._count

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        order = np.argsort(rows, kind="stable")
        wanted = rows[order]
        ends = [*np.flatnonzero(np.diff(wanted) != 1) + 1, len(wanted)] if len(wanted) else []
        sorted_ND, begin = np.empty((len(rows), self._width), np.float32), 0
        for end in ends:  # rows that follow each other in one piece
            self._read(int(wanted[begin]), sorted_ND[begin:end])
            begin = end
        found_ND = np.empty_like(sorted_ND)
        found_ND[order] = sorted_ND
        return found_ND

    def block(self, begin: int, end: int) -> NDArray[np.float32]:
        found_ND = np.empty((min(end, self._count) - begin, self._width), np.float32)
        self._read(begin, found_ND)
        return found_ND

    def _read(self, row: int, into_ND: NDArray[np.float32]) -> None:
        """All of `into_ND` from row `row` on; the system may give less than it is asked for at a time."""
        with self._lock:
            self._stream.seek(row * self._row, os.SEEK_SET)
            left = into_ND.data.cast("B")
            while left:
                got = self._stream.readinto(left)
                if not got:
                    raise damaged(Path(self._stream.name), "it is cut off")
                left = left[got:]


def nearest(
    vectors: Vectors, ties: NDArray[np.int64], query_D: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None
) -> Found:
    """Rows and cosines of the k nearest of all that are allowed, best first: (k,) or fewer.

    Parameters
    ----------
    ties
        int64 (N,): of equal cosines the smaller comes first.
    """
    rows = np.arange(len(vectors)) if allowed is None else np.flatnonzero(allowed)
    scores = np.concatenate([np.empty(0, np.float32), *_scores(vectors, query_D, rows)])
    if k < len(rows):
        least = np.partition(scores, len(rows) - k)[len(rows) - k]
        rows = rows[scores >= least - _SLACK]
    return best(vectors, ties, query_D, rows, k)


def best(
    vectors: Vectors, ties: NDArray[np.int64], query_D: NDArray[np.float32], rows: NDArray[np.int64], k: int
) -> Found:
    """The k best of the candidates `rows`, each once, and their cosines as sums in float64."""
    query = query_D.astype(np.float64)
    cuts = [rows[at : at + BLOCK] for at in range(0, len(rows), BLOCK)]
    scores = np.concatenate([np.empty(0), *((vectors.take(cut) * query).sum(1) for cut in cuts)])
    scores[np.isnan(scores)] = -2.0  # of a damaged file: behind all others
    order = np.lexsort((ties[rows], -scores))[:k]
    return rows[order], scores[order]


def blocks(vectors: Vectors) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """All of them, block by block, each with its first row."""
    for begin in range(0, len(vectors), BLOCK):
        yield begin, vectors.block(begin, min(begin + BLOCK, len(vectors)))


def damaged(path: Path, why: str) -> UserError:
    """The error for a file made from the shards that cannot be used."""
    return UserError(f"{path} cannot be used: {why}", "cytoclip index, run again, makes it anew", ExitCode.DATA)


def _scores(vectors: Vectors, query_D: NDArray[np.float32], rows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    """float32 cosines of `rows`, which are sorted, in pieces."""
    if len(rows) * _SPARSE < len(vectors):
        for at in range(0, len(rows), BLOCK):
            yield vectors.take(rows[at : at + BLOCK]) @ query_D
        return
    cuts = np.searchsorted(rows, np.arange(0, len(vectors) + BLOCK, BLOCK))
    for number, (begin, block_ND) in enumerate(blocks(vectors)):
        own = rows[cuts[number] : cuts[number + 1]] - begin
        scores = block_ND @ query_D
        yield scores if len(own) == len(block_ND) else scores[own]
