"""Embeddings of a whole split, each different picture and caption once, shared out over the processes.

Letters: N pairs, U different pictures or captions, n of them in this process, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cytoclip.batches import loader, next_batch
from cytoclip.captions import Tokens
from cytoclip.console import Bar, Console
from cytoclip.decoded import Decoded
from cytoclip.device import World
from cytoclip.model import DualEncoder
from cytoclip.order import Draw
from cytoclip.pairs import Pairs
from cytoclip.pictures import Pictures, Rows
from cytoclip.pixels import PixelSpec


@dataclass(frozen=True)
class Reading:
    """How a split is read for one model: its token table, its pixels, and how many at a time.

    Parameters
    ----------
    tokens
        Of the split's captions, in their order.
    image_rows, text_rows
        Stored features of the split's pictures and captions, where their tower is frozen.
    kept
        Its pictures, decoded on disk.
    """

    tokens: Tokens
    pixels: PixelSpec
    batch_size: int
    workers: int
    image_rows: Rows | None = None
    text_rows: Rows | None = None
    kept: Decoded | None = None


def encode(
    encoder: DualEncoder, pairs: Pairs, reading: Reading, world: World, console: Console
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings of the pictures and of the captions, both float32 (N, D), whole in every process.

    Equal pictures share one embedding and so do equal captions, so ties between them are ties to the last bit.
    """
    image_ND = encode_pictures(encoder, pairs, reading, world, console)
    return image_ND, encode_captions(encoder, pairs.captions, reading, world, console)


@torch.no_grad()  # no inference_mode: what a sharded tower gathers first in it could never train
def encode_pictures(
    encoder: DualEncoder, pairs: Pairs, reading: Reading, world: World, console: Console
) -> torch.Tensor:
    """Unit embeddings of the pictures alone, float32 (N, D)."""
    rows, row_of = different(pairs.contents)
    own = _share(rows, world)
    with _measuring(encoder), console.progress("embedding pictures", len(own)) as bar:
        if reading.image_rows:
            parts = _stored(encoder.images, reading.image_rows, own, reading, world, bar)
        else:
            parts = _images(encoder, _pictures(pairs, own, reading), reading, world, bar)
    return _collected(parts, len(rows), encoder.width, world)[torch.from_numpy(row_of)]


@torch.no_grad()
def encode_captions(
    encoder: DualEncoder, captions: Sequence[str], reading: Reading, world: World, console: Console
) -> torch.Tensor:
    """Unit embeddings of captions, whose tokens are `reading.tokens`, alone: float32 (N, D)."""
    rows, row_of = different(captions)
    own = _share(rows, world)
    with _measuring(encoder), console.progress("embedding captions", len(own)) as bar:
        if reading.text_rows:
            parts = _stored(encoder.texts, reading.text_rows, own, reading, world, bar)
        else:
            parts = _texts(encoder, own, reading, world, bar)
    return _collected(parts, len(rows), encoder.width, world)[torch.from_numpy(row_of)]


@contextmanager
def _measuring(encoder: DualEncoder) -> Iterator[None]:
    was_training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(was_training)


def different(keys: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first row of each different key (U,), and which of those each of all rows equals (N,)."""
    numbers: dict[str, int] = {}
    of = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
    return np.unique(of, return_index=True)[1], of


def _share(rows: NDArray[np.int64], world: World) -> NDArray[np.int64]:
    """As many rows for every process, past the end the last one again: a sharded tower is gathered in each forward
    pass, which all processes must then do equally often.
    """
    each = math.ceil(len(rows) / world.size)
    return rows[np.minimum(np.arange(world.rank * each, (world.rank + 1) * each), len(rows) - 1)]


def _stored(
    embed: Callable[[torch.Tensor], torch.Tensor],
    stored: Rows,
    rows: NDArray[np.int64],
    reading: Reading,
    world: World,
    bar: Bar,
) -> list[torch.Tensor]:
    parts = []
    for some in _cut(len(rows), reading):
        with world.autocast():
            parts.append(embed(stored.batch(rows[some]).to(world.device)))
        bar.advance(len(parts[-1]))
    return parts


def _pictures(pairs: Pairs, rows: NDArray[np.int64], reading: Reading) -> Pictures:
    pictures = Pictures([pairs.images[row] for row in rows], reading.pixels)
    return pictures.kept_in(reading.kept.take(rows)) if reading.kept else pictures


def _images(encoder: DualEncoder, pictures: Pictures, reading: Reading, world: World, bar: Bar) -> list[torch.Tensor]:
    parts = []
    cuts = _cut(len(pictures), reading)
    draws: list[list[Draw]] = [[(row, 0) for row in some] for some in cuts]
    source = iter(loader(pictures, None, draws, reading.workers, world.device))
    for _ in cuts:
        batch = next_batch(source)
        with world.autocast():
            parts.append(encoder.images(batch.images.to(world.device, non_blocking=True)))
        bar.advance(len(parts[-1]))
    return parts


def _texts(
    encoder: DualEncoder, rows: NDArray[np.int64], reading: Reading, world: World, bar: Bar
) -> list[torch.Tensor]:
    by_length = np.argsort(reading.tokens.lengths(rows), kind="stable")  # little padding in each batch
    parts = []
    for some in _cut(len(rows), reading):
        with world.autocast():
            parts.append(encoder.texts(reading.tokens.batch(rows[by_length[some]]).to(world.device)))
        bar.advance(len(parts[-1]))
    return [torch.cat(parts)[torch.from_numpy(np.argsort(by_length))]] if parts else []


def _cut(count: int, reading: Reading) -> list[list[int]]:
    return [list(range(begin, min(begin + reading.batch_size, count))) for begin in range(0, count, reading.batch_size)]


def _collected(parts: list[torch.Tensor], total: int, width: int, world: World) -> torch.Tensor:
    """All processes' rows (total, D) from this one's parts; what stood in past the end falls off."""
    own = torch.cat(parts).float() if parts else torch.zeros(0, width, device=world.device)
    return world.gather(own)[:total]
