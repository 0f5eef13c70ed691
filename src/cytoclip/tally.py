"""How many rows score above given answers, for both directions in one pass over the scores.

The table of scores, V rows by U columns, is made tile by tile, each score once. An answer is a place (row, column) in
it; what is counted are the scores of its row (forward) or of its column (backward) that are higher, and those that are
equal. Its own score must be known before the first tile is counted, so tiles that hold answers are made twice; rows and
columns are ordered so that answers lie near the diagonal, in few tiles.

Letters: V rows, U columns, D embedding, E answers, R rows and C columns of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]
# On a CPU a tile of 2 MB stays in a core's cache between the product and the comparisons, and flags are added up eight
# at a time, as the bytes of one integer: a byte must hold the flags of a column (R) and every eighth of a row (C / 8),
# at most 255. A GPU needs larger tiles to be busy, and adds flags fast as they are.
TILES = {"cpu": (240, 2032)}
LARGE_TILE = (4096, 8192)  # elsewhere
PACKED = {"cpu"}  # where eight flags are added at a time


@dataclass(frozen=True)
class Side:
    """The distinct unit embeddings of one side, float32 (V, D), and how many rows of the gallery each stands for."""

    rows: Tensor
    weights: Ids

    def take(self, order: Ids) -> Side:
        return Side(self.rows[torch.from_numpy(order).to(self.rows.device)], self.weights[order])


@dataclass(frozen=True)
class Answers:
    """Places in the table of scores, each once: int64 (E,), and what is counted for each."""

    row: Ids
    column: Ids


@dataclass(frozen=True)
class Counts:
    """Gallery rows that score above each answer, and exactly as it, itself included: int64 (E,)."""

    above: Ids
    tied: Ids


def count(
    images: Side, texts: Side, forward: Answers, backward: Answers, advance: Callable[[int], None] | None = None
) -> tuple[Counts, Counts]:
    """Where each forward answer stands in its row of texts, and each backward answer in its column of images.

    Parameters
    ----------
    advance
        Called with how many rows of the table were done.
    """
    by_row, by_column = _near_the_diagonal(forward, backward, len(images.rows), len(texts.rows))
    images, texts = images.take(by_row), texts.take(by_column)
    places = _inverse(by_row), _inverse(by_column)
    tile = TILES.get(images.rows.device.type, LARGE_TILE)
    ahead = _Counted(forward, places, texts, tile, along=1)
    back = _Counted(backward, places, images, tile, along=0)
    with ieee_products(), torch.autocast(images.rows.device.type, enabled=False):
        for top, left in sorted(ahead.tiles() | back.tiles()):
            scores = _product(images, texts, top, left, tile)
            ahead.read(scores, top, left)
            back.read(scores, top, left)
        for top in range(0, len(images.rows), tile[0]):
            for left in range(0, len(texts.rows), tile[1]):
                scores = _product(images, texts, top, left, tile)
                ahead.write(scores, top, left)
                back.write(scores, top, left)
                ahead.add(scores, top, left)
                back.add(scores, top, left)
            if advance:
                advance(min(tile[0], len(images.rows) - top))
    return ahead.counts(), back.counts()


@contextmanager
def ieee_products() -> Iterator[None]:
    """Products in float32, also where training chose TF32: fewer bits make ties of their own."""
    if not hasattr(torch.backends, "fp32_precision"):
        before = torch.get_float32_matmul_precision()  # before torch 2.9; later it raises once any code has set
        torch.set_float32_matmul_precision("highest")  # one backend alone
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    matmuls = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    chosen = [(matmul, matmul.fp32_precision) for matmul in matmuls if matmul.fp32_precision in ("tf32", "bf16")]
    try:
        for matmul, _ in chosen:
            matmul.fp32_precision = "ieee"
        yield
    finally:
        for matmul, precision in chosen:
            matmul.fp32_precision = precision


class _Counted:
    """The answers of one direction, sorted along it, and their counts so far.

    Parameters
    ----------
    places
        Where each row and each column of the table now stands.
    gallery
        What is ranked: its weights are those of the counted scores.
    tile
        R and C.
    along
        1: an answer's row is counted over (forward); 0: its column.
    """

    def __init__(
        self, answers: Answers, places: tuple[Ids, Ids], gallery: Side, tile: tuple[int, int], along: int
    ) -> None:
        row, column = places[0][answers.row], places[1][answers.column]
        self._order = np.lexsort((column, row) if along else (row, column))
        self._row, self._column, self._along, self._tile = row[self._order], column[self._order], along, tile
        device = gallery.rows.device
        self._score = torch.zeros(len(row), device=device)
        self._above = torch.zeros(len(row), dtype=torch.int64, device=device)
        self._tied = torch.zeros_like(self._above)
        self._weights = torch.from_numpy(gallery.weights).to(device, torch.float32)
        self._alike, self._packed = bool((gallery.weights == 1).all()), device.type in PACKED
        self._flags = torch.zeros(tile, dtype=torch.bool, device=device)
        tiles = np.stack([self._row // tile[0], self._column // tile[1]], axis=1)
        found, of = np.unique(tiles, axis=0, return_inverse=True)
        by_tile, ends = np.argsort(of.reshape(-1), kind="stable"), np.cumsum(np.bincount(of.reshape(-1)))
        self._in_tile = {
            (int(top) * tile[0], int(left) * tile[1]): some
            for (top, left), some in zip(found, np.split(by_tile, ends[:-1]), strict=True)
        }

    def tiles(self) -> set[tuple[int, int]]:
        return set(self._in_tile)

    def read(self, scores: Tensor, top: int, left: int) -> None:
        """Learn the scores of the answers in a tile."""
        some = self._in_tile.get((top, left))
        if some is not None:
            self._score[some] = scores[self._row[some] - top, self._column[some] - left]

    def write(self, scores: Tensor, top: int, left: int) -> None:
        """A tile made again might differ in the last bit; an answer must tie with itself."""
        some = self._in_tile.get((top, left))
        if some is not None:
            scores[self._row[some] - top, self._column[some] - left] = self._score[some]

    def add(self, scores: Tensor, top: int, left: int) -> None:
        """Compare the answers that a tile counts for with its scores."""
        along, size = self._along, scores.shape[1 - self._along]
        lines, begin = (self._row, top) if along else (self._column, left)
        weights = self._weights[left : left + scores.shape[1]] if along else self._weights[top : top + len(scores)]
        first, end = np.searchsorted(lines, [begin, begin + size]).tolist()
        step = self._tile[1 - along]
        for start in range(first, end, step):
            some = slice(start, min(start + step, end))
            line = lines[some] - begin
            plain = len(line) == size and line[0] == 0 and line[-1] == size - 1 and bool((np.diff(line) == 1).all())
            picked = scores if plain else scores.index_select(1 - along, torch.from_numpy(line).to(scores.device))
            own = self._score[some].unsqueeze(along)
            self._above[some] += self._total(torch.gt, picked, own, weights)
            self._tied[some] += self._total(torch.eq, picked, own, weights)

    def counts(self) -> Counts:
        back = _inverse(self._order)
        return Counts(self._above.cpu().numpy()[back], self._tied.cpu().numpy()[back])

    def _total(self, compare: Callable[..., Tensor], scores: Tensor, own: Tensor, weights: Tensor) -> Tensor:
        flags_RC = self._flags[: len(scores), : scores.shape[1]]
        compare(scores, own, out=flags_RC)
        if not self._alike:
            lines = flags_RC.float()
            return (lines @ weights if self._along else weights @ lines).long()  # whole numbers below 2^24: exact
        if not self._packed:
            return flags_RC.sum(dim=self._along)
        eight = self._flags[: len(scores)].view(torch.int64)
        rest = -scores.shape[1] % 8
        if rest:
            self._flags[: len(scores), scores.shape[1] : scores.shape[1] + rest] = False
        sums = eight[:, : (scores.shape[1] + 7) // 8].sum(dim=self._along)
        bytes_ = sums.view(torch.uint8)
        return bytes_.view(len(scores), 8).sum(dim=1) if self._along else bytes_[: scores.shape[1]].long()


def _near_the_diagonal(forward: Answers, backward: Answers, rows: int, columns: int) -> tuple[Ids, Ids]:
    """An order of rows and one of columns in which answers that hang together lie together.

    Each row follows the first column that it answers, and each column the first of its rows. The numbers of distinct
    embeddings do not depend on the order of the pairs, so neither does this.
    """
    row, column = (np.concatenate(each) for each in ((forward.row, backward.row), (forward.column, backward.column)))
    row_key = np.full(rows, columns)
    np.minimum.at(row_key, row, column)
    column_key = np.full(columns, columns)
    np.minimum.at(column_key, column, row_key[row])
    return np.argsort(row_key, kind="stable"), np.argsort(column_key, kind="stable")


def _inverse(order: Ids) -> Ids:
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return places


def _product(images: Side, texts: Side, top: int, left: int, tile: tuple[int, int]) -> Tensor:
    return images.rows[top : top + tile[0]] @ texts.rows[left : left + tile[1]].T
