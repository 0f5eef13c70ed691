"""Parquet and Arrow tables: pictures as paths, or as bytes that are read where they lie.

Bytes that stand in their file as they are (Arrow, uncompressed Parquet) are read from there by random access. Those of
compressed pages are copied once, in the order of the rows, into one flat file beside the index.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cytoclip import indices
from cytoclip.console import Console, size
from cytoclip.errors import ExitCode, UserError
from cytoclip.files import Piece, free_bytes, whole_file
from cytoclip.pairs import Pairs
from cytoclip.rows import TAGS, Columns, Gathered, concatenated, data_error, kind, pick, plain_row, require_regular

_ROWS = 64  # decoded at once: their pictures are held
_MAX_GROUP = 8 << 30  # bytes that a row group's columns may claim, unpacked
_PAGE_HEADER = 1 << 16  # bytes between two values of a column at most: a page's header, with statistics
_HINT = "each row needs a picture, as path or bytes, and a caption; rows count from 0"
_MAX_SCHEMA = 100_000_000  # bytes and items that a Parquet footer may claim, as in pyarrow's own default
_BROKEN = (pa.ArrowException, OSError, ValueError, struct.error, KeyError, TypeError, OverflowError)


def read(files: Sequence[Path], columns: Columns, console: Console) -> Pairs:
    """The pairs of Parquet (.parquet) or Arrow stream (.arrow) files, in the order of files and rows.

    Raises
    ------
    UserError
        For a file that is neither, columns that cannot be found, rows that are no pairs, or no space for a copy.
    """
    parts = []
    with console.progress("looking through tables", len(files)) as bar:
        for file in files:
            facts = require_regular(file)
            about = _about(columns)
            found = indices.load(file, facts, about)
            if found is None:
                found = _arrow(file, columns, console) if file.suffix == ".arrow" else _parquet(file, columns, console)
                if all(isinstance(image, Piece) for image in found.images):
                    indices.store(file, facts, about, found, console)
            parts.append(found)
            bar.advance()
    return concatenated(parts)


def _about(columns: Columns) -> tuple[str | None, ...]:
    return "columnar", columns.image, columns.caption


def _parquet(file: Path, columns: Columns, console: Console) -> Pairs:
    with _readable(file):
        table = pq.ParquetFile(
            file, thrift_string_size_limit=_MAX_SCHEMA, thrift_container_size_limit=_MAX_SCHEMA, memory_map=False
        )
        chosen = _chosen(file, table.schema_arrow, table.iter_batches, columns, console)
        wanted = _wanted(table.schema_arrow, chosen)
        claimed = _claimed(table, wanted)
        if claimed > _MAX_GROUP:
            raise data_error(f"a row group of {file} claims {size(claimed)}", "write it with smaller row groups")
        rows = (row for batch in table.iter_batches(_ROWS, columns=wanted) for row in batch.to_pylist())
        if not _holds_bytes(table.schema_arrow.field(chosen.image).type):
            return _paths(file, rows, chosen, columns)
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _gathered(file, rows, chosen, _Places(file, data))
            if found is not None:
                return found
        rows = (row for batch in table.iter_batches(_ROWS, columns=wanted) for row in batch.to_pylist())
        return _copied(file, rows, chosen, columns, console)


def _arrow(file: Path, columns: Columns, console: Console) -> Pairs:
    with _readable(file):
        whole = pa.memory_map(str(file)).read_buffer()
        schema = pa.ipc.open_stream(pa.BufferReader(whole)).schema

        def batches(_rows: int, columns: list[str] | None = None) -> Iterator[Any]:
            for batch in pa.ipc.open_stream(pa.BufferReader(whole)):
                batch.validate(full=True)  # a made-up offset would be read wherever it points
                for begin in range(0, batch.num_rows, _ROWS):
                    part = batch.slice(begin, _ROWS)
                    yield part.select(columns) if columns else part

        chosen = _chosen(file, schema, batches, columns, console)
        wanted = _wanted(schema, chosen)
        rows = (row for batch in batches(_ROWS, wanted) for row in batch.to_pylist())
        if not _holds_bytes(schema.field(chosen.image).type):
            return _paths(file, rows, chosen, columns)
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _gathered(file, rows, chosen, _Places(file, data))
            if found is not None:
                return found
        rows = (row for batch in batches(_ROWS, wanted) for row in batch.to_pylist())
        return _copied(file, rows, chosen, columns, console)


class _Places:
    """Where values lie in a file as they are: each is looked for behind the one before it, and compared in full.

    A value that came before (a dictionary holds it once) is found where it was.
    """

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self._file, self._data, self._at = file, data, 0
        self._before: dict[bytes, int] = {}

    def find(self, value: bytes) -> Piece | None:
        digest = hashlib.sha256(value).digest()
        found = self._before.get(digest)
        if found is None:
            begin, end = self._at, len(self._data) if not self._at else self._at + len(value) + _PAGE_HEADER
            found = self._data.find(value, begin, end)
            if found < 0:  # in the next row group, behind the other columns of this one
                found = self._data.find(value, end) if self._before else -1
            if found < 0:
                return None
            self._before[digest], self._at = found, found + len(value)
        return Piece(self._file, found, len(value))


class _Copies:
    """Values written behind one another into a flat file; one that came before is not written again."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self._file, self._stream, self._at = file, stream, 0
        self._before: dict[bytes, Piece] = {}

    def find(self, value: bytes) -> Piece:
        digest = hashlib.sha256(value).digest()
        if digest not in self._before:
            self._stream.write(value)
            self._before[digest] = Piece(self._file, self._at, len(value))
            self._at += len(value)
        return self._before[digest]


def _copied(
    file: Path, rows: Iterator[Mapping[str, Any]], chosen: Columns, columns: Columns, console: Console
) -> Pairs:
    copy, needed = indices.copy_of(file, _about(columns)), file.stat().st_size
    console.say(f"{file} holds compressed pages: its pictures, about {size(needed)}, are copied once to {copy}")
    if needed > free_bytes(copy):
        raise UserError(
            f"{size(needed)} of pictures in {file} are to be copied, and {size(free_bytes(copy))} are free",
            "free some space, or write the Parquet file uncompressed",
            ExitCode.SYSTEM,
        )
    with whole_file(copy) as stream:
        found = _gathered(file, rows, chosen, _Copies(copy, stream))
    assert found is not None  # noqa: S101 - a copy has a place for every value
    return found


def _gathered(
    file: Path, rows: Iterator[Mapping[str, Any]], chosen: Columns, places: _Places | _Copies
) -> Pairs | None:
    """The pairs of rows whose pictures are bytes; None where one of them does not lie anywhere as it is."""
    gathered = Gathered(file, file.parent, hint=_HINT)
    for number, row in enumerate(rows):
        value = row[str(chosen.image)]
        value, name = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
        if not value:
            gathered.skip(number, "its picture is empty" if name is None else "its picture has a path and no bytes")
            continue
        piece = places.find(value)
        if piece is None:
            return None
        last = name.rpartition("/")[2] if isinstance(name, str) and "\0" not in name else ""
        gathered.add(
            number, piece, row[str(chosen.caption)], plain_row(row), f"{file.name}/{number:06}{last and '-'}{last}"
        )
    return gathered.pairs()


def _paths(file: Path, rows: Iterator[Mapping[str, Any]], chosen: Columns, columns: Columns) -> Pairs:
    gathered = Gathered.of_table(file, columns, hint=_HINT)
    for number, row in enumerate(rows):
        gathered.add(number, row[str(chosen.image)], row[str(chosen.caption)], plain_row(row))
    return gathered.pairs()


def _wanted(schema: Any, chosen: Columns) -> list[str]:
    """Picture, caption, tags, and what else a row may say in few words."""
    short = (pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary, pa.types.is_integer,
             pa.types.is_boolean)  # fmt: skip
    named = (chosen.image, chosen.caption, *TAGS)
    return [field.name for field in schema if field.name in named or any(fits(field.type) for fits in short)]


def _chosen(file: Path, schema: Any, batches: Any, asked: Columns, console: Console) -> Columns:
    """Columns by name and kind; pictures' bytes of the first rows are looked at, not those of all."""
    first = next(iter(batches(_ROWS)), None)
    if first is None or not first.num_rows:
        raise data_error(f"{file} holds no rows", "put at least one pair into it")
    if len(set(schema.names)) < len(schema.names):
        raise data_error(f"{file} has two columns of one name", "give each column a name of its own")
    chosen = pick(first.to_pylist(), asked, file, console.say)
    picture, caption = (schema.field(name).type for name in (chosen.image, chosen.caption))
    if not (_holds_bytes(picture) or _is_text(picture)):
        raise _other_column("image", chosen.image, file, picture, "pictures")
    of = caption.value_type if pa.types.is_list(caption) or pa.types.is_large_list(caption) else caption
    if not _is_text(of):
        raise _other_column("caption", chosen.caption, file, caption, "text")
    return chosen


def _other_column(what: str, chosen: str | None, file: Path, holds: Any, wanted: str) -> UserError:
    hint = f"name another: data.{what}_column=…, or --{what}-column with cytoclip bring and check"
    return data_error(f"column {chosen} of {file} holds {holds}, not {wanted}", hint)


def _claimed(table: Any, wanted: Sequence[str]) -> int:
    """The most bytes that the wanted columns of one row group claim to be unpacked."""

    def of(group: Any) -> int:
        chunks = (group.column(number) for number in range(group.num_columns))
        return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in wanted)

    meta = table.metadata
    return max((of(meta.row_group(number)) for number in range(meta.num_row_groups)), default=0)


def _holds_bytes(of: Any) -> bool:
    if pa.types.is_struct(of):
        return any(of.field(number).name == "bytes" for number in range(of.num_fields))
    of = of.value_type if pa.types.is_dictionary(of) else of
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(is_kind(of) for is_kind in kinds)


def _is_text(of: Any) -> bool:
    of = of.value_type if pa.types.is_dictionary(of) else of
    return any(is_kind(of) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """What pyarrow raises for a damaged file, as a message."""
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise data_error(f"{file} needs more memory than there is", "write it with smaller row groups") from None
    except _BROKEN as error:
        reason = " ".join(str(error).split())[:200] or kind(error)
        raise data_error(f"{file} cannot be read: {reason}", "copy or write it again") from None
