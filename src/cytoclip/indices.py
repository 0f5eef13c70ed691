"""Where the pictures of a packed file lie, kept beside it: found once, then read again at once.

An index holds the pairs of one file (shard, offset, size), line by line, and belongs to one size and time of change of
it. Pictures that do not lie in their file as they are (compressed pages of Parquet) are first copied into a flat file.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cytoclip.console import Console
from cytoclip.errors import UserError
from cytoclip.files import Piece, cache_folder, whole_file
from cytoclip.pairs import Pairs
from cytoclip.rows import MAX_TEXT

_VERSION = 2
_MAX_LINE = 64 * MAX_TEXT  # of an index: a pair has several captions at most


def load(file: Path, facts: os.stat_result, about: Sequence[str | None]) -> Pairs | None:
    """The pairs of a file as an index remembers them; None where there is none, or it is of another file.

    Parameters
    ----------
    facts
        Of the file now.
    about
        What else the pairs depend on, such as the names of columns.
    """
    images: list[Path | Piece] = []
    columns: tuple[list[Any], ...] = ([], [], [], [], [], [], [])
    shared: dict[Any, Any] = {}
    try:
        index = _index_of(file, about)
        if not stat.S_ISREG(index.lstat().st_mode):
            return None
        with index.open("rb") as stream:
            header = json.loads(stream.readline(_MAX_LINE))
            held = copy_of(file, about) if header["copied"] is not None else file
            if header != _header(facts, about, header["copied"], header["pairs"]) or not _fits(held, header["copied"]):
                return None
            end = facts.st_size if header["copied"] is None else header["copied"]
            while line := stream.readline(_MAX_LINE):
                row = json.loads(line)
                name, offset, size, caption, more, extra, *tags = row
                if not _is_row(row) or offset < 0 or not 0 < size <= end - offset:
                    return None
                images.append(Piece(held, offset, size))
                rest = (tuple((key, value) for key, value in extra), *tags)
                values = (name, caption, tuple(more), *(shared.setdefault(each, each) for each in rest))
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
            if header["pairs"] != len(images):
                return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # damaged: made anew
        return None
    names, captions, more, extra, groups, sources, labels = (tuple(column) for column in columns)
    more, extra = (column if any(column) else () for column in (more, extra))
    return Pairs(tuple(images), names, captions, groups, sources, labels, more=more, extra=extra)


def store(file: Path, facts: os.stat_result, about: Sequence[str | None], pairs: Pairs, console: Console) -> None:
    """Keep the pairs of a file. Where nobody may write that is said, and they are found anew each time."""
    held = copy_of(file, about)
    copied = held.stat().st_size if any(isinstance(p, Piece) and p.path == held for p in pairs.images[:1]) else None
    tags = (pairs.groups, pairs.sources, pairs.labels)
    try:
        with whole_file(_index_of(file, about)) as stream:
            stream.write(_line(_header(facts, about, copied, len(pairs))))
            columns = (pairs.images, pairs.names, pairs.captions, pairs.more, pairs.extra, *tags)
            for image, name, *rest in zip(*columns, strict=True):
                stream.write(_line([name, image.offset, image.size, *rest]))
    except UserError as error:
        console.warn(f"the index of {file} is not kept: {error.message}")


def copy_of(file: Path, about: Sequence[str | None]) -> Path:
    """Where the pictures of a file are copied that do not lie in it as they are.

    Another column has another copy: a run that reads the one is not to find the other in its place.
    """
    return _beside(file, about, "pictures")


def _index_of(file: Path, about: Sequence[str | None]) -> Path:
    return _beside(file, about, "index")


def _beside(file: Path, about: Sequence[str | None], ending: str) -> Path:
    named = hashlib.sha256(os.fsencode(file.name) + b"\0" + _line(about)).hexdigest()[:24]
    return cache_folder(file.parent) / "index" / f"{named}.{ending}"


def _header(facts: os.stat_result, about: Sequence[str | None], copied: int | None, pairs: int) -> dict[str, Any]:
    own = {"version": _VERSION, "size": facts.st_size, "changed": facts.st_mtime_ns, "about": list(about)}
    return {**own, "copied": copied, "pairs": pairs}


def _is_row(row: list[Any]) -> bool:
    """An index may have come with the data."""
    name, offset, size, caption, more, extra, *tags = row
    texts = all(
        type(text) is str for text in (name, caption, *more, *(text for key, value in extra for text in (key, value)))
    )
    return texts and type(offset) is type(size) is int and all(type(tag) in (str, type(None)) for tag in tags)


def _fits(held: Path, copied: int | None) -> bool:
    if copied is None:
        return True
    facts = held.lstat()
    return stat.S_ISREG(facts.st_mode) and facts.st_size == copied


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"
