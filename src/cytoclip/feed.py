"""What arrives at a step: this process's batch, and who is right for whom in the whole one.

Letters: B pairs of the global batch, b of this process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from cytoclip import batches, streams
from cytoclip.batches import Batch, Texts
from cytoclip.device import World
from cytoclip.errors import ExitCode, UserError
from cytoclip.order import Order, Share
from cytoclip.pairs import Identity
from cytoclip.pictures import Pictures, Rows
from cytoclip.streams import Arrived, Position, Stream


class Arrival(NamedTuple):
    """One step's pairs.

    Parameters
    ----------
    batch, names
        This process's b pairs.
    identity
        Of all B, on the device.
    """

    batch: Batch
    names: list[str]
    identity: Identity


@dataclass
class Read:
    """How far this process has read, and what it could not.

    Parameters
    ----------
    skipped
        Names of pictures that could not be used, and how often another pair came instead.
    positions
        Of its readers, where pairs come from afar.
    """

    skipped: Counter[str] = field(default_factory=Counter)
    positions: list[Position] = field(default_factory=list)


@dataclass(frozen=True)
class FromDisk:
    """Pairs that are read by random access, in the order of `order`.

    Parameters
    ----------
    identity
        Of every caption, on the device.
    names
        Of every pair.
    """

    pictures: Pictures | Rows
    texts: Texts
    order: Order
    identity: Identity
    names: Sequence[str]
    workers: int
    skips: bool

    def arrivals(self, first: int, last: int, world: World, read: Read) -> Iterator[Arrival]:
        """Those of steps `first` up to and without `last`."""
        share = Share(self.order, first, last, world.rank, world.size, self.skips)
        source = iter(batches.loader(self.pictures, self.texts, share, self.workers, world.device))
        for rows, epochs in self.order.draws(first, last):
            batch = batches.next_batch(source)
            came = self._who_came(rows, batch, world, read) if self.skips else rows
            captions = torch.from_numpy(self.texts.wording.rows(came, epochs)).to(world.device)
            yield Arrival(batch, [self.names[row] for row in batch.indices], self.identity.take(captions))

    def _who_came(self, rows: NDArray[np.int64], batch: Batch, world: World, read: Read) -> NDArray[np.int64]:
        """The pairs (B,) that are in the batch of all processes instead of `rows`, and a note of those that are not."""
        came: NDArray[np.int64] = world.gather(torch.from_numpy(batch.indices).to(world.device)).cpu().numpy()
        if world.first:  # all know it
            read.skipped.update(self.names[row] for row in rows[came != rows])
        return came


@dataclass(frozen=True)
class FromAfar:
    """Pairs that come as their shards have them."""

    plan: streams.Plan
    workers: int

    @property
    def readers(self) -> int:
        return max(self.workers, 1)

    def arrivals(self, first: int, last: int, world: World, read: Read) -> Iterator[Arrival]:
        """Those of steps `first` up to and without `last`; `read` says where each reader goes on."""
        read.positions = read.positions or [Position()] * self.readers
        source = iter(
            DataLoader(
                Stream(self.plan, list(read.positions), first % self.readers),
                batch_size=None,
                pin_memory=world.device.type == "cuda",
                **batches.processes(self.workers),
            )
        )
        for _ in range(first, last):
            arrived = _arrived(source)
            read.positions[arrived.reader] = arrived.position
            read.skipped.update(arrived.skipped)
            whole = arrived.identity.map(lambda ids: world.gather(torch.from_numpy(ids).to(world.device)))
            yield Arrival(arrived.batch, arrived.names, whole)

    def refuse_other_readers(self, positions: Sequence[Sequence[Sequence[int]]], world: World) -> None:
        """Raise `UserError` for a run that was begun with other numbers of processes or of their readers.

        Each reads shards of its own, so others would read some pairs twice and others never.
        """
        begun, now = [len(of_rank) for of_rank in positions], [self.readers] * world.size
        if begun and begun != now:
            raise UserError(
                f"the run was begun with {len(begun)} × {begun[0]} readers, and there are {len(now)} × {now[0]} now",
                f"start {len(begun)} processes with data.workers={begun[0]}, as before",
                ExitCode.RUN,
            )


def _arrived(source: Iterator[Arrived | UserError]) -> Arrived:
    arrived = next(source)
    if isinstance(arrived, UserError):
        arrived.everywhere = False  # the other processes read other shards
        raise arrived
    return arrived
