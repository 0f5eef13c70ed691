"""Parquet files of pictures with their embeddings: what an index is made of, and what other engines load.

Letters: N rows, C captions of a row, D embedding.

One row a picture. Names stay below the roots that the manifest names; an index may come from somebody else, so each
file is bounded and of the expected columns before a row of it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cytoclip import files
from cytoclip.errors import ExitCode, UserError
from cytoclip.files import Piece

ROWS = 8192  # of a file at most: 32 MB of embeddings of 512 dimensions
_GROUP = 2048  # rows of a row group
_MAX_ROW = 1 << 20  # bytes of a row's texts at most, on average, that are unpacked
_MAX_SCHEMA = 100_000_000  # bytes and items that a Parquet footer may claim, as in pyarrow's own default
_ABOUT = b"cytoclip"
_TEXTS = ("file", "name", "content", "caption", "source", "label", "group", "extra")
_BROKEN = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError)


class Row(NamedTuple):
    """A picture as an index keeps it.

    Parameters
    ----------
    id
        53 bits of a hash of root, file and offset: the same in every index of the same data, exact in JavaScript.
    root, file
        A number among the index's roots and the file below it; root None where the picture is at an address.
    piece_offset, piece_size
        Where it lies in a packed file.
    about
        A digest of all that is said here, of the file's size and time of change too; 0 where the file was too young to
        be known by its time of change.
    extra
        Further short keys as a JSON object.
    """

    id: int
    root: int | None
    file: str
    piece_offset: int | None
    piece_size: int | None
    name: str
    content: str
    about: int
    captions: tuple[str, ...]
    source: str | None
    label: str | None
    group: str | None
    extra: str | None


class Header(NamedTuple):
    """What a file says of itself: the digest of the model that made its embeddings, and the roots."""

    model: str
    roots: tuple[str, ...]


def schema(width: int) -> Any:
    """The columns: `caption` and `text` are a picture's first caption, `more` and `more_text` its further ones."""
    vector = pa.list_(pa.float32(), width)
    number, text = pa.int64(), pa.string()
    return pa.schema(
        [
            pa.field("id", number, nullable=False),
            pa.field("root", pa.int32()),
            *(pa.field(name, text, nullable=False) for name in ("file", "name", "content")),
            pa.field("about", number, nullable=False),
            pa.field("piece_offset", number),
            pa.field("piece_size", number),
            *(pa.field(name, text) for name in ("caption", "source", "label", "group", "extra")),
            pa.field("more", pa.list_(text)),
            pa.field("image", vector, nullable=False),
            pa.field("text", vector),
            pa.field("more_text", pa.list_(vector)),
        ]
    )


LIGHT = tuple(name for name in schema(1).names if name not in ("image", "text", "more_text"))


def write(
    path: Path, header: Header, rows: Sequence[Row], image_ND: NDArray[np.float32], texts: Sequence[NDArray[Any]]
) -> None:
    """The whole file or none; `texts` are the embeddings (C, D) of each row's captions."""
    width = image_ND.shape[1]
    first = [text_CD[0] if len(text_CD) else None for text_CD in texts]
    further = [text_CD[1:] for text_CD in texts]
    of = schema(width)
    columns: dict[str, Any] = {
        name: pa.array([getattr(row, name) for row in rows], of.field(name).type)
        for name in LIGHT
        if name not in ("caption", "more")
    }
    columns["caption"] = pa.array([row.captions[0] if row.captions else None for row in rows], pa.string())
    columns["more"] = pa.array([list(row.captions[1:]) or None for row in rows], pa.list_(pa.string()))
    columns["image"] = _vectors(image_ND, np.zeros(len(rows), bool))
    missing = np.array([one is None for one in first], bool)
    blank_D = np.zeros(width, np.float32)
    columns["text"] = _vectors(np.stack([blank_D if one is None else one for one in first]), missing)
    counts = [len(text_CD) for text_CD in further]
    flat = np.concatenate([np.empty((0, width), np.float32), *further])
    offsets = pa.array([*np.cumsum([0, *counts])], pa.int32())
    columns["more_text"] = pa.ListArray.from_arrays(
        offsets, _vectors(flat, np.zeros(len(flat), bool)), mask=pa.array([not count for count in counts])
    )
    said = {_ABOUT: json.dumps({"model": header.model, "roots": header.roots}).encode()}
    table = pa.Table.from_arrays([columns[name] for name in of.names], schema=of.with_metadata(said))
    with files.whole_file(path) as stream:
        pq.write_table(
            table,
            stream,
            row_group_size=_GROUP,
            compression=dict.fromkeys((*LIGHT, "more.list.element"), "zstd"),
            use_dictionary=["source", "label", "group", "extra", "caption"],
        )


def describe(path: Path) -> tuple[Header, int, int] | None:
    """(header, rows, width) of a file; None where it is none of ours, or cut off."""
    try:
        opened = _opened(path)
        found = opened.schema_arrow
        said = json.loads(found.metadata[_ABOUT])
        width = found.field("image").type.list_size
        header = Header(str(said["model"]), tuple(map(str, said["roots"])))
    except (UserError, AttributeError, *_BROKEN):
        return None
    return (header, opened.metadata.num_rows, width) if _fits(found, width) else None


def read(path: Path, rows: int, width: int, columns: Sequence[str] = LIGHT) -> Any:
    """Columns of a file as a table of so many rows.

    Raises
    ------
    UserError
        Where it is not there, a link, damaged, of other columns, or claims to be larger than its rows can be.
    """
    try:
        opened = _opened(path)
        if not _fits(opened.schema_arrow, width):
            raise _wrong(path, "it has other columns")
        if opened.metadata.num_rows != rows:
            raise _wrong(path, f"it has {opened.metadata.num_rows} rows, not {rows}")
        limit = rows * (_MAX_ROW + 12 * width) + _MAX_SCHEMA
        if _claimed(opened.metadata) > limit:
            raise _wrong(path, "it claims to be larger than it can be")
        table = opened.read(list(columns), use_threads=False)
        table.validate(full=True)
    except _BROKEN as error:
        raise _wrong(path, " ".join(str(error).split())[:200] or type(error).__name__) from None
    return table


def is_whole(path: Path, rows: int, width: int) -> bool:
    """Whether every column of a file can be read."""
    try:
        read(path, rows, width, _opened(path).schema_arrow.names)
    except (UserError, *_BROKEN):
        return False
    return True


def vectors(column: Any, width: int) -> NDArray[np.float32]:
    """A column of embeddings as (N, D); zeros where there is none."""
    chunks = [chunk.fill_null([0.0] * width) if chunk.null_count else chunk for chunk in column.chunks]
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in chunks]
    return np.concatenate([np.empty((0, width), np.float32), *parts])


def images(path: Path, rows: int, width: int) -> NDArray[np.float32]:
    """The pictures' embeddings of a file, (N, D), checked to be of length 1."""
    found = vectors(read(path, rows, width, ["image"])["image"], width)
    _require_unit(path, found)
    return found


def texts(path: Path, rows: int, width: int, wanted: NDArray[np.int64]) -> NDArray[np.float32]:
    """The embeddings of the first captions of the rows `wanted`, (W, D), checked to be of length 1."""
    found = vectors(read(path, rows, width, ["text"])["text"], width)[wanted]
    _require_unit(path, found)
    return found


def captions(path: Path, rows: int, width: int) -> list[tuple[list[str], NDArray[np.float32]]]:
    """Of each row its captions and their embeddings (C, D), checked to be of length 1."""
    table = read(path, rows, width, ["caption", "more", "text", "more_text"])
    first_ND, further = vectors(table["text"], width), table["more_text"]
    found = []
    for number, (one, more) in enumerate(zip(table["caption"].to_pylist(), table["more"].to_pylist(), strict=True)):
        texts = [] if one is None else [one, *(more or [])]
        parts = [first_ND[number : number + 1]] if texts else [np.empty((0, width), np.float32)]
        if more:
            parts.append(np.array(further[number].as_py(), np.float32).reshape(-1, width))
        found.append((texts, np.concatenate(parts)))
        if len(found[-1][1]) != len(texts) or None in texts:
            raise _wrong(path, f"row {number} has {len(texts)} captions and {len(found[-1][1])} embeddings of them")
    flat = np.concatenate([np.empty((0, width), np.float32), *(each for _, each in found)])
    _require_unit(path, flat)
    return found


def identity(root: int | None, file: str, offset: int | None) -> int:
    """The id of a picture."""
    return hashed(f"{root}\0{file}\0{offset}") >> 10


def digest(*said: Any) -> int:
    """63 bits of what is said of a row, never 0."""
    return hashed(repr(said)) or 1


def hashed(text: str) -> int:
    """63 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def relative(place: Path | Piece, roots: Sequence[str]) -> tuple[int, str] | None:
    """(root, file below it) of a picture's file; None where it is below none of them."""
    path = place.path if isinstance(place, Piece) else place
    for number, root in enumerate(roots):
        if path.is_relative_to(root):
            return number, path.relative_to(root).as_posix()
    return None


def _vectors(rows_ND: NDArray[np.float32], missing: NDArray[np.bool_]) -> Any:
    flat = pa.array(np.ascontiguousarray(rows_ND, np.float32).ravel())
    mask = pa.array(missing) if missing.any() else None
    return pa.FixedSizeListArray.from_arrays(flat, rows_ND.shape[1], mask=mask)


def _opened(path: Path) -> Any:
    facts = os.lstat(path)  # a link may lead anywhere
    if not stat.S_ISREG(facts.st_mode):
        raise _wrong(path, "it is no regular file")
    return pq.ParquetFile(
        path, thrift_string_size_limit=_MAX_SCHEMA, thrift_container_size_limit=_MAX_SCHEMA, memory_map=False
    )


def _fits(found: Any, width: int) -> bool:
    return bool(found.remove_metadata().equals(schema(width)))


def _claimed(meta: Any) -> int:
    return sum(meta.row_group(number).total_byte_size for number in range(meta.num_row_groups))


def _require_unit(path: Path, rows_ND: NDArray[np.float32]) -> None:
    lengths = np.einsum("nd,nd->n", rows_ND, rows_ND)
    if len(rows_ND) and not np.abs(lengths - 1).max() < 1e-2:  # NaN fails too; bf16 keeps 3e-3
        raise _wrong(path, "its embeddings are not of length 1")


def _wrong(path: Path, why: str) -> UserError:
    return UserError(f"{path} cannot be used: {why}", "make the index again: cytoclip index --rebuild", ExitCode.DATA)
