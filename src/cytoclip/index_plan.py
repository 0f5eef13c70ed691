"""What an index holds already, and which pictures' rows are to be written."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cytoclip import manifest, vector_shards
from cytoclip.entries import Entry
from cytoclip.files import Piece
from cytoclip.manifest import Manifest, Shard
from cytoclip.vector_shards import ROWS, Header

FEW = 64  # small shards, which many additions leave, before they are put together
_HELD = 8  # shards whose embeddings are held while rows are carried over


class Place(NamedTuple):
    """A row of a shard, by their numbers."""

    shard: int
    row: int


class Work(NamedTuple):
    """A picture whose row is to be written: `known` is the one it has where its file is as it was.

    Parameters
    ----------
    about
        What that row says of itself.
    """

    entry: Entry
    root: int | None
    file: str
    known: Place | None = None
    about: int = 0


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Parameters
    ----------
    kept
        Shards that stay as they are.
    removed
        Pictures that the index has and the source has no more.
    """

    kept: list[Shard]
    work: list[Work]
    removed: int


class Standing:
    """Rows that are there already: those of the index, and of a run that was cut off.

    Embeddings are read back a shard at a time; only one thread may ask for them.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], width: int) -> None:
        self.shards, self._folder, self._width = shards, folder, width
        self._held: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._at: dict[int, tuple[Place, int]] = {}
        self._of_content: dict[bytes, Place] = {}
        for number, shard in enumerate(shards):
            table = self._read(shard, ["id", "about", "content"])
            columns = (table[name].to_pylist() for name in ("id", "about", "content"))
            for row, (own, about, content) in enumerate(zip(*columns, strict=True)):
                place = Place(number, row)
                self._at[own] = place, about
                self._of_content[_short(content)] = place

    def __len__(self) -> int:
        return len(self._at)

    def row(self, own: int) -> tuple[Place, int] | None:
        """Of a picture's id its row and what that says of itself."""
        return self._at.get(own)

    def of_content(self, content: str) -> Place | None:
        """A row of the same bytes."""
        return self._of_content.get(_short(content))

    def image(self, place: Place) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._of("images", place)[place.row]
        return found

    def captions(self, place: Place) -> tuple[list[str], NDArray[np.float32]]:
        """The captions of a row, and their embeddings (C, D)."""
        found: tuple[list[str], NDArray[np.float32]] = self._of("captions", place)[place.row]
        return found

    def content(self, place: Place) -> str:
        return str(self._of("content", place)[place.row])

    def _of(self, what: str, place: Place) -> Any:
        key = (what, place.shard)
        if key not in self._held:
            shard = self.shards[place.shard]
            if what == "content":
                self._held[key] = self._read(shard, ["content"])["content"].to_pylist()
            else:
                reader = vector_shards.images if what == "images" else vector_shards.captions
                self._held[key] = reader(manifest.shard_path(self._folder, shard.name), shard.rows, self._width)
            while len(self._held) > _HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]

    def _read(self, shard: Shard, columns: list[str]) -> Any:
        return vector_shards.read(manifest.shard_path(self._folder, shard.name), shard.rows, self._width, columns)


def usable(folder: Path, header: Header, width: int, there: Manifest | None, rebuild: bool) -> list[Shard]:
    """Shards whose embeddings are this model's: of the index, unless it is rebuilt, and of a run that was cut off.

    Where a damaged manifest does not tell which is which, an index that is rebuilt has none.
    """
    if rebuild and there is None and (folder / manifest.NAME).exists():
        return []
    listed = {shard.name for shard in there.shards} if there else set()
    found = []
    for path in sorted((folder / "shards").glob("*.parquet"), key=lambda path: (len(path.name), path.name)):
        said = vector_shards.describe(path)
        if said is None or said[0].model != header.model or said[2] != width:
            continue
        if said[0].roots != header.roots[: len(said[0].roots)]:
            continue  # its numbers mean other folders
        # Nobody counts on one that is not listed: where it is damaged, it is as good as none.
        if not rebuild if path.name in listed else vector_shards.is_whole(path, said[1], width):
            found.append(Shard(path.name, said[1]))
    return found


def planned(listed: Sequence[Entry], roots: Sequence[str], standing: Standing) -> Plan:
    """Which shards stay as they are, and of which pictures rows are to be written."""
    todo: list[Work] = []
    same: dict[Place, Work] = {}
    removed = len(standing)
    for entry in listed:
        root, file = _where(entry, roots)
        found = standing.row(vector_shards.identity(root, file, offset(entry)))
        removed -= found is not None
        if found is not None and found[1] and found[1] == about(entry, root, file, stamp(entry)):
            same[found[0]] = Work(entry, root, file, *found)
        else:
            todo.append(Work(entry, root, file))
    whole = _whole(same, standing.shards)
    carried = [work for place, work in sorted(same.items()) if not whole[place.shard]]
    kept = [shard for number, shard in enumerate(standing.shards) if whole[number]]
    return Plan(kept, [*carried, *todo], max(0, removed))


def stamp(entry: Entry) -> tuple[int, int] | None:
    """Size and time of change of the file; None where it is not there, or came from an address."""
    if isinstance(entry.place, bytes):
        return None
    path = entry.place.path if isinstance(entry.place, Piece) else entry.place
    try:
        facts = os.stat(path)  # noqa: PTH116 - a million of them
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns


def about(entry: Entry, root: int | None, file: str, stamp: tuple[int, int] | None) -> int:
    """A digest of all that is said of a picture; 0, which counts as another each time, where its file tells nothing."""
    if stamp is None:
        return 0
    piece = (entry.place.offset, entry.place.size) if isinstance(entry.place, Piece) else None
    return vector_shards.digest(root, file, piece, tuple(entry[1:]), stamp)


def offset(entry: Entry) -> int | None:
    return entry.place.offset if isinstance(entry.place, Piece) else None


def _where(entry: Entry, roots: Sequence[str]) -> tuple[int | None, str]:
    if isinstance(entry.place, bytes):
        return None, entry.name
    found = vector_shards.relative(entry.place, roots)
    assert found is not None  # noqa: S101 - `index` made a root for each
    return found


def _whole(same: dict[Place, Work], shards: Sequence[Shard]) -> list[bool]:
    """Which shards are wanted with every row; of many small ones none is, so that they are put together."""
    counts = [0] * len(shards)
    for place in same:
        counts[place.shard] += 1
    whole = [count == shard.rows for count, shard in zip(counts, shards, strict=True)]
    small = [number for number, shard in enumerate(shards) if whole[number] and shard.rows < ROWS // 4]
    if len(small) > FEW:
        for number in small:
            whole[number] = False
    return whole


def _short(content: str) -> bytes:
    return bytes.fromhex(content[:32]) if len(content) == 64 else content.encode()
