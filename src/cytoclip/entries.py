"""The pictures of a place, with captions or without: what is to be indexed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cytoclip import folders, places, sources, streams
from cytoclip.console import Console
from cytoclip.errors import counted, first_few
from cytoclip.files import Piece
from cytoclip.pairs import Pairs
from cytoclip.rows import MAX_EXTRA, Columns


class Entry(NamedTuple):
    """A picture and what the data say of it.

    Parameters
    ----------
    place
        Its file, the piece of one, or the bytes themselves, where they come from afar.
    name
        As the data write it.
    extra
        Further short keys, the split among them.
    """

    place: Path | Piece | bytes
    name: str
    captions: tuple[str, ...]
    source: str | None = None
    label: str | None = None
    group: str | None = None
    extra: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Source:
    """A place, looked through: its pictures, or the addresses of shards that hold them.

    Parameters
    ----------
    root
        The folder that most of the pictures are below; None where there is none.
    """

    listed: list[Entry]
    root: Path | None
    shards: list[str]


def opened(source: str, columns: Columns, console: Console) -> Source:
    """Look through a place, or list the shards at an address.

    Raises
    ------
    UserError
        Where there are no pictures.
    """
    if places.is_remote(source):
        return Source([], None, streams.shards(source))
    return Source(listed(Path(source), columns, console), _root_of(Path(source)), [])


def from_afar(address: str, columns: Columns) -> Iterator[Entry]:
    """The pictures of one shard at an address, with their bytes.

    Raises
    ------
    UserError
        For a shard that cannot be read, or rows that are no pairs.
    """
    for sample in streams.samples(address, columns):
        yield Entry(sample.picture, sample.name, sample.captions, group=sample.group)


def listed(source: Path, columns: Columns, console: Console) -> list[Entry]:
    """The pictures of a folder, of every split of a data root, or of whatever `sources.read` reads; each once.

    A folder that holds no list, table or shard is gone through at any depth, and its pictures need no captions. Of a
    picture that is listed several times the captions come together.

    Raises
    ------
    UserError
        For a place that holds no pictures, or entries that are none.
    """
    entries: dict[Path | Piece, Entry] = {}
    for split, pairs in _parts(source, columns, console):
        shared: dict[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]] = {}
        for row, place in enumerate(pairs.images):
            texts = tuple(text for text in (pairs.captions[row], *pairs.more[row]) if text.strip())
            before = entries.get(place)
            if before is not None:
                entries[place] = before._replace(captions=tuple(dict.fromkeys((*before.captions, *texts))))
                continue
            extra = pairs.extra[row]
            if split is not None:
                extra = shared.setdefault(extra, (*extra, ("split", split))[:MAX_EXTRA])
            entries[place] = Entry(
                place,
                pairs.names[row],
                tuple(dict.fromkeys(texts)),
                pairs.sources[row] or None,
                pairs.labels[row] or None,
                pairs.groups[row] or None,
                extra,
            )
    return list(entries.values())


def _parts(source: Path, columns: Columns, console: Console) -> list[tuple[str | None, Pairs]]:
    """(split, pairs) of each part of the place."""
    if not sources.is_split(source):
        splits = {name: place for name in places.splits(source) if (place := places.split(source, name)) is not None}
        if not all(sources.is_loose(place) for place in (source, *splits.values())):
            return [(name, _read(place, columns, console)) for name, place in splits.items()]
    return [(None, _read(source, columns, console))]


def _read(place: Path, columns: Columns, console: Console) -> Pairs:
    if sources.is_loose(place):
        return folders.read_all(place, console)
    left_out: list[str] = []
    found = sources.read(place, columns, console, left_out)
    if left_out:
        console.warn(f"{counted(len(left_out), 'entry', 'entries')} of {place} are left out: {first_few(left_out)}")
    return found


def _root_of(source: Path) -> Path | None:
    if places.is_hub(source):
        return None
    folder = source
    while places.is_pattern(folder) or folder.is_file():
        folder = folder.parent
    return folder.resolve()
