"""WebDataset's tar shards: members of one key are a pair, read where they lie.

Only headers and texts are read here, and nothing is unpacked. A member's key is its name up to the first dot after the
last slash: `a/001.jpg`, `a/001.txt`, `a/001.json` and `a/001.cls` are picture, caption, fields and label of one pair.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cytoclip import indices
from cytoclip.console import Console
from cytoclip.errors import UserError, counted, shown
from cytoclip.files import Piece
from cytoclip.pairs import Pairs
from cytoclip.rows import (
    MAX_TEXT,
    PICTURES,
    Columns,
    Gathered,
    concatenated,
    data_error,
    is_picture,
    plain_row,
    require_regular,
)

_BLOCK = 512
_MAX_NAME = 1 << 16  # bytes of a long name or of extended headers: what holds one for a file system is 4096
_CAPTIONS = ("caption", "captions", "text")
_TEXTS = ("txt", "text", "caption", "json", "cls")
_PACKED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}


class Member(NamedTuple):
    """A regular file within a tar."""

    name: str
    offset: int
    size: int


def read(files: Sequence[Path], columns: Columns, console: Console) -> Pairs:
    """The pairs of tar shards, in the order of the shards and of their pictures. Each shard is looked through once.

    Raises
    ------
    UserError
        For a shard that is no plain tar, or holds members that are no pairs.
    """
    parts = []
    with console.progress("looking through shards", len(files)) as bar:
        for file in files:
            facts = require_regular(file)
            about = ("tar", columns.image, columns.caption)
            found = indices.load(file, facts, about)
            if found is None:
                found = _pairs(file, columns)
                indices.store(file, facts, about, found, console)
            parts.append(found)
            bar.advance()
    return concatenated(parts)


def members(stream: BinaryIO, size: int, place: Path) -> Iterator[Member]:
    """Every regular file of a plain tar (ustar, GNU and pax long names), by its headers alone.

    Links, folders and devices are passed over. A member that ends behind the end of the file, or is stored with holes,
    is refused: its picture is not there as it is.
    """
    at, long_name, extended = 0, "", {}  # type: int, str, dict[str, str]
    while at + _BLOCK <= size:
        stream.seek(at)
        header = stream.read(_BLOCK)
        if not any(header):
            return  # the end of the archive, whatever is behind it
        length = _checked_size(header, place, at)
        name, flag = _name(header), header[156:157]
        if flag in b"0\0" or flag == b"7":  # what a pax header says goes for a file only
            length = _whole(extended["size"], place, at) if "size" in extended else length
            name = extended.get("path") or long_name or name
        if flag in b"123456":
            length = 0
        begin = at + _BLOCK
        if length > size - begin:
            raise data_error(f"{place} is cut off: {shown(name)} claims {length} bytes", "copy or pack it again")
        if flag in b"xgLK":
            if length > _MAX_NAME:
                raise data_error(f"{place} holds a name of {length} bytes", "pack it again with shorter names")
            said = stream.read(length)
            long_name = _text(said) if flag == b"L" else long_name
            extended = _extended(said, place) if flag == b"x" else extended
        else:
            if flag == b"S" or any(key.startswith("GNU.sparse") for key in extended):
                raise data_error(f"{place} holds {shown(name)} with holes", "pack it again without tar --sparse")
            if flag in b"0\0" or flag == b"7":
                yield Member(name, begin, length)
            long_name, extended = "", {}
        at = begin + -(-length // _BLOCK) * _BLOCK
    _refuse_cut(place, at, size)


def _refuse_cut(place: Path, at: int, size: int) -> None:
    """Members and their headers fill blocks: a file that ends within one has lost its end."""
    if at != size:
        raise data_error(f"{place} is cut off at byte {size}", "copy or pack it again")


def _pairs(file: Path, columns: Columns) -> Pairs:
    size = file.stat().st_size
    gathered = Gathered(
        file, file.parent, "key", "keys", "each key needs a picture, and a .txt or .json with a caption"
    )
    found: dict[str, list[Member]] = {}
    with file.open("rb") as stream:
        begin = stream.read(_BLOCK)
        for magic, command in _PACKED.items():
            if begin.startswith(magic):
                raise data_error(f"{file} is compressed, which allows no random access", f"unpack it: {command} {file}")
        if begin and (len(begin) < _BLOCK or (any(begin) and _claimed(begin[148:156]) is None)):
            raise data_error(f"{file} is not a tar", "name a tar shard")
        for member in members(stream, size, file):
            folder, _, last = member.name.rpartition("/")
            key, dot, ending = last.partition(".")
            wanted = ending.lower() in _TEXTS or is_picture(last) or ending == columns.image
            if key and dot and wanted:  # of `.DS_Store` and `._001.jpg` the key is empty
                found.setdefault(f"{folder}/{key}", []).append(member._replace(name=member.name))
        for key, parts in found.items():
            _add(gathered, stream, key.removeprefix("/"), parts, file, columns)
    return gathered.pairs()


def _add(gathered: Gathered, stream: BinaryIO, key: str, parts: Sequence[Member], file: Path, columns: Columns) -> None:
    where = shown(key)
    by_ending: dict[str, Member] = {}
    for part in parts:
        if by_ending.setdefault(_ending(part), part) is not part:
            gathered.skip(where, f"it holds {shown(part.name)} twice")
            return
    pictures = [e for e in by_ending if f".{e.rpartition('.')[2]}" in PICTURES and e not in _TEXTS]
    if columns.image in by_ending:
        pictures = [str(columns.image)]
    if len(pictures) > 1:  # `jpg` beside `mask.png`: the plain one is the picture
        pictures = [e for e in pictures if "." not in e] or pictures
    if len(pictures) != 1:
        what = f"{len(pictures)} pictures, {', '.join(pictures[:3])}" if pictures else "no picture"
        gathered.skip(where, f"it has {what}")
        return
    try:
        caption, row = _said(stream, by_ending, columns)
    except UserError as error:
        gathered.skip(where, error.message)
        return
    picture = by_ending[pictures[0]]
    if not picture.size:
        gathered.skip(where, "its picture is empty")
        return
    piece = Piece(file, picture.offset, picture.size)
    gathered.add(where, piece, caption, row, f"{file.name}/{picture.name.removeprefix('./')}")


def _said(stream: BinaryIO, parts: dict[str, Member], columns: Columns) -> tuple[object, dict[str, Any]]:
    """Caption of a key, and all else it says: from `.json`, else the plain texts."""
    fields: Any = {}
    if "json" in parts:
        try:
            fields = json.loads(_read(stream, parts["json"]))
        except (ValueError, RecursionError):
            raise data_error("its .json is not JSON", "") from None
        if not isinstance(fields, dict):
            raise data_error("its .json is not an object", "")
    texts = {ending: _read(stream, parts[ending]).strip() for ending in _TEXTS[:3] if ending in parts}
    row = dict(fields)
    if "cls" in parts:
        row["label"] = _read(stream, parts["cls"]).strip()
    if columns.caption:
        caption = fields.get(columns.caption, texts.get(columns.caption))
    else:
        caption = next((fields[key] for key in _CAPTIONS if fields.get(key)), None) or next(iter(texts.values()), None)
    if caption is None:
        raise data_error("it has no caption", "")
    return caption, plain_row(row)


def _read(stream: BinaryIO, member: Member) -> str:
    if member.size > MAX_TEXT:
        raise data_error(f"its {_ending(member)} has {counted(member.size, 'byte')}", "")
    stream.seek(member.offset)
    try:
        return stream.read(member.size).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise data_error(f"its {_ending(member)} is not UTF-8", "") from None


def _ending(member: Member) -> str:
    return member.name.rpartition("/")[2].partition(".")[2].lower()


def _checked_size(header: bytes, place: Path, at: int) -> int:
    claimed = _claimed(header[148:156])
    summed = sum(header) - sum(header[148:156]) + 8 * 0x20
    if claimed != summed:
        raise data_error(f"{place} is damaged at byte {at}, or not a tar", "copy or pack it again")
    length = _claimed(header[124:136])
    if length is None or length < 0:
        raise data_error(f"{place} is damaged at byte {at}: a member of no size", "copy or pack it again")
    return length


def _claimed(field: bytes) -> int | None:
    """Octal digits, or GNU's base 256 for numbers that don't fit."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0")[0].strip() or b"0"
    return int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else None


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "replace")


def _extended(said: bytes, place: Path) -> dict[str, str]:
    """Pax records: `length key=value\\n`."""
    found, at = {}, 0
    while at < len(said) and said[at : at + 1] != b"\0":
        digits, space, _ = said[at : at + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = said[at : at + length]
        key, equals, value = record[len(digits) + 1 :].partition(b"=")
        if not length or not equals or not value.endswith(b"\n"):
            raise data_error(f"{place} holds a damaged pax header", "copy or pack it again")
        found[_text(key)] = value[:-1].decode("utf-8", "replace")
        at += length
    return found


def _whole(text: str, place: Path, at: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise data_error(f"{place} is damaged at byte {at}: a member of {shown(text)} bytes", "copy or pack it again")
    return int(text)
