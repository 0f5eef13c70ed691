"""Which pair, with which of its captions, is in which batch: a pure function of (seed, epoch, position).

Letters: N pairs, B pairs of the global batch, K pairs that may stand in for one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cytoclip.pairs import Pairs

# A pair, and the epoch in which it is drawn: what its randomness is a function of. Where bad pictures are skipped,
# the pairs that may stand in for it follow.
Draw = tuple[int, ...]
STANDBYS = 8  # tried one after another for a bad picture


@dataclass(frozen=True)
class Order:
    """Which pairs are in the global batch of which step, and in which of their epochs.

    Each epoch is a fresh permutation, drawn from (seed, epoch) alone, and drops the pairs that do not fill a last
    batch: a batch never mixes epochs, so no pair meets itself. Replayed roots have permutations and epochs of their
    own, and stand behind the training split in the numbering of the pairs and in every batch.

    Parameters
    ----------
    pairs
        Of the training split.
    replay
        (pairs, pairs in each batch) of each replayed root.
    """

    pairs: int
    batch_size: int
    seed: int
    replay: tuple[tuple[int, int], ...] = ()

    @property
    def own(self) -> int:
        """Pairs of the training split in each batch."""
        return self.batch_size - sum(each for _, each in self.replay)

    @property
    def steps_per_epoch(self) -> int:
        return self.pairs // self.own

    def rows(self, step: int) -> NDArray[np.int64]:
        """Indices of the pairs of step `step`, counted from 0: int64 (B,)."""
        return next(self.draws(step, step + 1))[0]

    def draws(self, first: int, last: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Indices (B,) and epochs (B,) of the pairs of steps `first` up to and without `last`."""
        for table, epochs in self._tables(first, last, 0):
            yield table[0], epochs

    def standbys(self, first: int, last: int) -> Iterator[NDArray[np.int64]]:
        """Of the same steps, the pairs (K, B) that may stand in for each: those of its place in the next batches.

        So no two pairs of a batch have the same one, and none is in the batch already. K is less than `STANDBYS` where
        an epoch has few batches.
        """
        for table, _ in self._tables(first, last, STANDBYS):
            yield table[1:]

    def _tables(self, first: int, last: int, ahead: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """The rows (1 + K, B) of each step and of the `ahead` batches after it in its epoch, and the epochs (B,)."""
        roots = ((self.pairs, self.own), *self.replay)
        ahead = min(ahead, *(pairs // each - 1 for pairs, each in roots))
        begins = np.cumsum([0, *(pairs for pairs, _ in roots)])
        parts = [
            self._part(stream, begins[stream], pairs, each, range(first, last), ahead)
            for stream, (pairs, each) in enumerate(roots)
        ]
        for drawn in zip(*parts, strict=True):
            tables, epochs = zip(*drawn, strict=True)
            sizes = [table.shape[1] for table in tables]
            yield np.concatenate(tables, axis=1), np.repeat(np.array(epochs, np.int64), sizes)

    def _part(
        self, stream: int, begin: int, pairs: int, each: int, steps: range, ahead: int
    ) -> Iterator[tuple[NDArray[np.int64], int]]:
        """Rows (1 + ahead, each) and epoch of one root, step by step; each epoch is drawn once."""
        batches = pairs // each
        permutation, drawn = np.empty((0, 0), np.int64), -1
        for step in steps:
            epoch, place = divmod(step, batches)
            if epoch != drawn:
                key = [self.seed, epoch, stream] if stream else [self.seed, epoch]
                whole = np.random.default_rng(key).permutation(pairs) + begin
                permutation, drawn = whole[: batches * each].reshape(batches, each), epoch
            yield permutation[(place + np.arange(1 + ahead)) % batches], epoch


def replayed(batch_size: int, weights: Sequence[float]) -> list[int]:
    """Pairs of each replayed root in a batch: `weight` of it for each one of the training split, at least one."""
    whole = 1 + sum(weights)
    return [max(1, round(batch_size * weight / whole)) for weight in weights]


@dataclass(frozen=True)
class Share:
    """The draws of one process out of each global batch: process r has the r-th of equal slices.

    With `skips`, each draw names its standbys too.
    """

    order: Order
    first: int
    last: int
    rank: int
    size: int
    skips: bool = False

    def __iter__(self) -> Iterator[list[Draw]]:
        each = self.order.batch_size // self.size
        own = slice(self.rank * each, (self.rank + 1) * each)
        steps = self.first, self.last
        standbys = self.order.standbys(*steps) if self.skips else itertools.repeat(np.empty((0, self.order.batch_size)))
        for (rows, epochs), others in zip(self.order.draws(*steps), standbys, strict=False):
            table = np.stack([rows[own], epochs[own], *others[:, own]], axis=1)
            yield [tuple(draw) for draw in table.tolist()]

    def __len__(self) -> int:
        return self.last - self.first

    def epochs(self) -> Iterator[Share]:
        """The same draws in parts that end where an epoch of the training split does."""
        begin, each = self.first, self.order.steps_per_epoch
        while begin < self.last:
            end = min(self.last, (begin // each + 1) * each)
            yield replace(self, first=begin, last=end)
            begin = end


@dataclass(frozen=True)
class Wording:
    """Which of its captions a pair has in which epoch, as a function of (seed, epoch, pair).

    Each pair begins at a random one and goes on to the next each epoch, so all are seen equally often. Captions are
    numbered as in `pairs.spread`; where every pair has one, the number is the pair's.

    Parameters
    ----------
    first, count
        int64 (N,): the number of each pair's first caption, and how many it has.
    """

    first: NDArray[np.int64]
    count: NDArray[np.int64]
    seed: int

    @classmethod
    def of(cls, pairs: Pairs, seed: int) -> Wording:
        count = np.array([1 + len(more) for more in pairs.more], np.int64)
        return cls(np.cumsum(count) - count, count, seed)

    def rows(self, pairs: NDArray[np.int64], epochs: NDArray[np.int64]) -> NDArray[np.int64]:
        """The captions (B,) of the pairs (B,), each in its epoch (B,)."""
        found: NDArray[np.int64] = self.first[pairs] + (self._begin[pairs] + epochs) % self.count[pairs]
        return found

    @cached_property
    def _begin(self) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, 3]).integers(0, 2**32, len(self.first))
