"""The nearest of many vectors: exactly, or by faiss with exact scores for the best.

Letters: N vectors, D dimensions, Q queries, k nearest.

All vectors are of length 1, and scores are cosines. Whatever finds the candidates, their scores are sums in float64 of
the float32 vectors, which come out the same for equal vectors wherever they stand, so ties are ties; they are resolved
by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EXACT = 50_000  # vectors up to which all are compared
_BLOCK = 16_384  # rows compared at a time: 32 MB of 512 dimensions
_SLACK = 1e-5  # of a float32 cosine: 512 products, each rounded to 6e-8 of 1

Found = tuple[NDArray[np.int64], NDArray[np.float64]]


@dataclass(frozen=True)
class Exact:
    """Vectors in memory, all of which are compared with each query.

    Parameters
    ----------
    rows_ND
        float32.
    """

    rows_ND: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows_ND)

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors at `rows`."""
        return self.rows_ND[rows]

    def nearest(self, query_D: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None) -> Found:
        """Rows and cosines of the k nearest, best first, of those that are allowed: (k,) or fewer."""
        scores_N = np.concatenate(
            [np.empty(0, np.float32), *(self.rows_ND[at : at + _BLOCK] @ query_D for at in range(0, len(self), _BLOCK))]
        )
        rows = np.arange(len(self)) if allowed is None else np.flatnonzero(allowed)
        return best(self, query_D, near_best(rows, scores_N[rows], k), k)


def near_best(rows: NDArray[np.int64], scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Those of `rows` that may be among the k best, whatever the rounding of their scores."""
    if k < len(rows):
        least = np.partition(scores, len(scores) - k)[len(scores) - k]
        rows = rows[scores >= least - _SLACK]
    return rows


def best(vectors: Exact, query_D: NDArray[np.float32], rows: NDArray[np.int64], k: int) -> Found:
    """The k best of the candidates `rows` by their scores in float64, and those scores."""
    rows = np.sort(rows)
    query = query_D.astype(np.float64)
    scores = np.concatenate(
        [
            np.empty(0),
            *((vectors.take(rows[at : at + _BLOCK]) * query).sum(1) for at in range(0, len(rows), _BLOCK)),
        ]
    )
    order = np.argsort(-scores, kind="stable")[:k]
    return rows[order], scores[order]
