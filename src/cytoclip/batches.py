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
from cytoclip.images import PixelSpec
from cytoclip.pairs import Pairs


@dataclass(frozen=True)
class Batch:
    """Pairs `indices`: uint8 pixels (b, 3, H, W), padded token ids (b, L) and their lengths, or pictures alone."""

    indices: NDArray[np.int64]
    pixels: torch.Tensor
    tokens: torch.Tensor | None = None
    lengths: NDArray[np.int64] | None = None

    def pin_memory(self) -> Batch:
        """Called by the loader where the device copies faster from pinned memory."""
        tokens = None if self.tokens is None else self.tokens.pin_memory()
        return replace(self, pixels=self.pixels.pin_memory(), tokens=tokens)

    def chunks(self, each: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views of `each` pairs' pixels and tokens, the last maybe fewer; tokens cut to the longest of the chunk."""
        assert self.tokens is not None and self.lengths is not None  # noqa: S101, PT018 - of the training loader
        cuts = [slice(begin, begin + each) for begin in range(0, len(self.indices), each)]
        return [(self.pixels[cut], self.tokens[cut, : self.lengths[cut].max()]) for cut in cuts]


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
    """Which pairs are in the global batch of which step.

    Each epoch is a fresh permutation, drawn from (seed, epoch) alone, and drops the pairs that do not fill a last
    batch: a batch never mixes epochs, so no pair meets itself.
    """

    pairs: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return self.pairs // self.batch_size

    def rows(self, step: int) -> NDArray[np.int64]:
        """Indices of the pairs of step `step`, counted from 0: int64 (B,)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.pairs)

    def steps(self, first: int, last: int) -> Iterator[NDArray[np.int64]]:
        """The rows of steps `first` up to and without `last`; each epoch is drawn once."""
        permutation, drawn = np.empty(0, np.int64), -1
        for step in range(first, last):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != drawn:
                permutation, drawn = self.epoch(epoch), epoch
            yield permutation[place * self.batch_size : (place + 1) * self.batch_size]


@dataclass(frozen=True)
class Share:
    """The rows of one process out of each global batch: process r has the r-th of equal slices."""

    order: Order
    first: int
    last: int
    rank: int
    size: int

    def __iter__(self) -> Iterator[list[int]]:
        each = self.order.batch_size // self.size
        for rows in self.order.steps(self.first, self.last):
            yield rows[self.rank * each : (self.rank + 1) * each].tolist()

    def __len__(self) -> int:
        return self.last - self.first


class Pictures(Dataset[tuple[int, "NDArray[np.uint8] | UserError"]]):
    """Decoded pictures at the size of the model; a picture that fails becomes its error, raised by `next_batch`."""

    def __init__(self, files: Sequence[Path], spec: PixelSpec) -> None:
        self._files, self._spec = files, spec

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[int, NDArray[np.uint8] | UserError]:
        try:
            return index, images.prepare(images.decode(self._files[index]), self._spec)
        except UserError as error:  # the loader would rebuild it from its text alone
            return index, error


def loader(
    pictures: Pictures, tokens: Tokens | None, batches: Share | list[list[int]], workers: int, device: torch.device
) -> DataLoader[Any]:
    """Batches in the order of `batches`, decoded ahead by `workers` processes (0: in this one)."""
    return DataLoader(
        pictures,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(_collate, tokens),
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


def _collate(tokens: Tokens | None, rows: list[tuple[int, NDArray[np.uint8] | UserError]]) -> Batch | UserError:
    pixels = []
    for _, picture in rows:
        if isinstance(picture, UserError):
            return picture
        pixels.append(torch.from_numpy(picture))
    indices = np.array([index for index, _ in rows])
    if tokens is None:
        return Batch(indices, torch.stack(pixels))
    return Batch(indices, torch.stack(pixels), tokens.batch(indices), tokens.lengths(indices))
