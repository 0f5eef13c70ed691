"""From pairs on disk to batches on the device, in an order that is a pure function of (seed, epoch, position).

Letters: N pairs, B pairs of the global batch, b of this process, H×W pixels, L tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from cytoclip import images, signals, sources
from cytoclip.captions import Tokens
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError, first_few
from cytoclip.files import Piece
from cytoclip.pairs import Pairs
from cytoclip.pixels import PixelSpec, prepare

Draw = tuple[int, int]  # a pair, and the epoch in which it is drawn: what its randomness is a function of


@dataclass(frozen=True)
class Batch:
    """Pairs `indices` of a process: what its image tower and its text tower read, or pictures alone.

    Parameters
    ----------
    images
        uint8 pixels (b, 3, H, W), or stored features (b, width) of a frozen tower.
    texts, lengths
        Padded token ids (b, L) and how many of them a row needs; or stored features (b, width), without lengths.
    keep
        int64 (b, K): the patches that the image tower sees, where some are dropped.
    """

    indices: NDArray[np.int64]
    images: torch.Tensor
    texts: torch.Tensor | None = None
    lengths: NDArray[np.int64] | None = None
    keep: torch.Tensor | None = None

    def pin_memory(self) -> Batch:
        """Called by the loader where the device copies faster from pinned memory."""
        texts = None if self.texts is None else self.texts.pin_memory()
        return replace(self, images=self.images.pin_memory(), texts=texts)

    def chunks(self, each: int) -> list[tuple[torch.Tensor, ...]]:
        """Views of `each` pairs as the encoder's arguments, the last maybe fewer; tokens cut to the chunk's longest."""
        assert self.texts is not None  # noqa: S101 - of the training loader
        found = []
        for begin in range(0, len(self.indices), each):
            cut = slice(begin, begin + each)
            texts = self.texts[cut] if self.lengths is None else self.texts[cut, : self.lengths[cut].max()]
            found.append((self.images[cut], texts, *(() if self.keep is None else (self.keep[cut],))))
        return found


def open_split(folder: Path, console: Console) -> Pairs:
    """`sources.read` and `scanned` in one."""
    return scanned(sources.read(folder), folder, console)


def scanned(pairs: Pairs, folder: Path, console: Console) -> Pairs:
    """Read every picture's bytes once: its content hash, and whether it is there and whole.

    Raises
    ------
    UserError
        For missing or unreadable pictures, all of them counted.
    """
    files = list(dict.fromkeys(pairs.images))
    with console.progress(f"reading {folder}", len(files)) as bar:
        scans = dict(
            zip(files, images.scan(files, threads=os.cpu_count() or 1, progress=lambda _: bar.advance()), strict=True)
        )
    names = dict(zip(pairs.images, pairs.names, strict=True))
    bad = [f"{names[file]} ({scan.problem})" for file, scan in scans.items() if scan.problem]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(files)} pictures in {folder / 'imgs'} cannot be used: {first_few(bad)}",
            f"mend these files, or take their entries out of {folder / sources.LIST_NAME}",
            ExitCode.DATA,
        )
    return replace(pairs, contents=tuple(scans[image].content for image in pairs.images))


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
        parts, begin = [], 0
        for stream, (pairs, each) in enumerate(((self.pairs, self.own), *self.replay)):
            parts.append(self._part(stream, begin, pairs, each, range(first, last)))
            begin += pairs
        for drawn in zip(*parts, strict=True):
            rows, epochs = zip(*drawn, strict=True)
            sizes = [len(some) for some in rows]
            yield np.concatenate(rows), np.repeat(np.array(epochs, np.int64), sizes)

    def _part(
        self, stream: int, begin: int, pairs: int, each: int, steps: range
    ) -> Iterator[tuple[NDArray[np.int64], int]]:
        """Rows and epoch of one root, step by step; each epoch is drawn once."""
        permutation, drawn = np.empty(0, np.int64), -1
        for step in steps:
            epoch, place = divmod(step, pairs // each)
            if epoch != drawn:
                key = [self.seed, epoch, stream] if stream else [self.seed, epoch]
                permutation, drawn = np.random.default_rng(key).permutation(pairs) + begin, epoch
            yield permutation[place * each : (place + 1) * each], epoch


def replayed(batch_size: int, weights: Sequence[float]) -> list[int]:
    """Pairs of each replayed root in a batch: `weight` of it for each one of the training split, at least one."""
    whole = 1 + sum(weights)
    return [max(1, round(batch_size * weight / whole)) for weight in weights]


@dataclass(frozen=True)
class Share:
    """The (pair, epoch) of one process out of each global batch: process r has the r-th of equal slices."""

    order: Order
    first: int
    last: int
    rank: int
    size: int

    def __iter__(self) -> Iterator[list[Draw]]:
        each = self.order.batch_size // self.size
        own = slice(self.rank * each, (self.rank + 1) * each)
        for rows, epochs in self.order.draws(self.first, self.last):
            yield list(zip(rows[own].tolist(), epochs[own].tolist(), strict=True))

    def __len__(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class PatchDropout:
    """Which patches the image tower sees, as a function of (seed, epoch, pair).

    Parameters
    ----------
    patches
        P, of a whole picture.
    share
        Of them, that are dropped (FLIP, arXiv 2212.00794).
    """

    patches: int
    share: float
    seed: int

    def keep(self, pair: int, epoch: int) -> torch.Tensor:
        """Indices of the patches kept, in their order: int64 (K,), K the same for every pair."""
        kept = max(1, round(self.patches * (1 - self.share)))
        drawn = np.random.default_rng([self.seed, epoch, pair, 1]).permutation(self.patches)[:kept]
        return torch.from_numpy(np.sort(drawn))


class Pictures(Dataset[tuple[int, "NDArray[np.uint8] | UserError", "torch.Tensor | None"]]):
    """Decoded pictures at the size of the model; a picture that fails becomes its error, raised by `next_batch`."""

    def __init__(self, files: Sequence[Path | Piece], spec: PixelSpec, dropout: PatchDropout | None = None) -> None:
        self._files, self._spec, self._dropout = files, spec, dropout

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, draw: Draw) -> tuple[int, NDArray[np.uint8] | UserError, torch.Tensor | None]:
        index, epoch = draw
        keep = self._dropout.keep(index, epoch) if self._dropout else None
        try:
            return index, prepare(images.decode(self._files[index]), self._spec), keep
        except UserError as error:  # the loader would rebuild it from its text alone
            return index, error, None


class Rows(Dataset[tuple[int, "NDArray[np.float32]", None]]):
    """Stored features of a frozen tower, one row a pair, in the place of pictures or captions.

    Parameters
    ----------
    table
        float32 (U, width): a row for each different picture or caption; may be memory-mapped.
    of
        int64 (N,): the row of each pair.
    """

    def __init__(self, table: NDArray[np.float32], of: NDArray[np.int64]) -> None:
        self.table, self.of = table, of

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, draw: Draw) -> tuple[int, NDArray[np.float32], None]:
        return draw[0], np.array(self.table[self.of[draw[0]]]), None  # a copy: the table may be mapped read-only

    def batch(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """The rows of the pairs at `indices`: float32 (B, width)."""
        return torch.from_numpy(np.array(self.table[self.of[indices]]))


def loader(
    pictures: Pictures | Rows,
    texts: Tokens | Rows | None,
    batches: Share | list[list[Draw]],
    workers: int,
    device: torch.device,
) -> DataLoader[Any]:
    """Batches in the order of `batches`, decoded ahead by `workers` processes (0: in this one)."""
    return DataLoader(
        pictures,
        batch_sampler=batches,
        num_workers=0 if isinstance(pictures, Rows) else workers,  # nothing is decoded
        collate_fn=partial(_collate, texts),
        worker_init_fn=signals.in_loader,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: the loader must not draw from the global random state
    )


def next_batch(source: Iterator[Batch | UserError]) -> Batch:
    """The next batch, or the error of a picture that was whole when the run began and no longer is."""
    batch = next(source)
    if isinstance(batch, UserError):
        batch.everywhere = False  # the other processes read other pictures
        try:
            raise batch
        finally:
            del batch  # or error and frame hold each other, and with them the loader, whose workers end slowly then
    return batch


def _collate(texts: Tokens | Rows | None, rows: list[tuple[int, Any, torch.Tensor | None]]) -> Batch | UserError:
    pictures = []
    for _, picture, _ in rows:
        if isinstance(picture, UserError):
            return picture
        pictures.append(torch.from_numpy(picture))
    keep = torch.stack([kept for *_, kept in rows if kept is not None]) if rows[0][2] is not None else None
    batch = Batch(np.array([index for index, *_ in rows]), torch.stack(pictures), keep=keep)
    if texts is None:
        return batch
    lengths = texts.lengths(batch.indices) if isinstance(texts, Tokens) else None
    return replace(batch, texts=texts.batch(batch.indices), lengths=lengths)
