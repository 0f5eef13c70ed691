"""Tables of pairs as text: CSV and TSV, JSON lines, a JSON list, COCO's captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from cytoclip.console import Console
from cytoclip.errors import shown
from cytoclip.pairs import Pairs
from cytoclip.rows import (
    AS_UTF_8,
    MAX_TEXT,
    Columns,
    Gathered,
    data_error,
    is_picture,
    kind,
    leaves,
    pick,
    plain_row,
    require_regular,
)

_SEPARATORS = ",;\t|"
_SAMPLE = 100  # rows, to guess separator and columns
_MAX_COLUMNS = 10_000
_MAX_JSON = 4 << 30  # bytes: a parsed list takes several times as much memory
csv.field_size_limit(MAX_TEXT)  # of a quoted value that goes over many lines, too
_HINT = "each row needs a picture's path, relative to the table's folder, and a caption; rows count from 1"
_COCO = 'COCO captions hold "images" with id and file_name, and "annotations" with image_id and caption'


class _Row(NamedTuple):
    """A row of a table as text, and the lines that it goes over."""

    first: int
    last: int
    values: list[str]

    def where(self) -> str:
        return f"line {self.first}" if self.first == self.last else f"lines {self.first} to {self.last}"


def read(file: Path, columns: Columns, console: Console) -> Pairs:
    """The pairs of one table, by its ending: .csv, .tsv, .jsonl, .ndjson or .json (a list of objects, or COCO).

    Names of pictures are relative to the table's folder, or to `columns.root`, and may not leave it.

    Raises
    ------
    UserError
        For a file that is not what its ending says, columns that cannot be found, or rows that are no pairs.
    """
    require_regular(file)
    if file.suffix.lower() != ".json":
        return from_rows(file, _text_rows(file, console), columns, console)
    loaded = load_json(file)
    return (
        _coco(file, loaded, columns)
        if isinstance(loaded, dict)
        else from_rows(file, _listed(file, loaded), columns, console)
    )


def rows_of(file: Path, console: Console) -> Iterator[Any]:
    """The rows of such a table as they stand, COCO apart; each should be an object.

    Raises
    ------
    UserError
        For a file that is not what its ending says.
    """
    require_regular(file)
    return _listed(file, load_json(file)) if file.suffix.lower() == ".json" else _text_rows(file, console)


def from_rows(file: Path, rows: Iterator[Any], columns: Columns, console: Console) -> Pairs:
    """The pairs of rows as objects, of which the first ones tell the columns."""
    first = list(islice(rows, _SAMPLE))
    objects = [row for row in first if isinstance(row, Mapping)]
    if not first:
        raise data_error(f"{file} holds no rows", "put at least one pair into it")
    if not objects:
        raise data_error(f"{file} holds rows that are {kind(first[0])}, not objects", _HINT)
    chosen = pick(objects, columns, file, console.say)
    gathered = Gathered.of_table(file, columns, "row", "rows", _HINT)
    for number, row in enumerate(chain(first, rows), start=1):
        if isinstance(row, Mapping):
            image = row.get(str(chosen.image))
            image = image.get("path") if isinstance(image, Mapping) else image
            gathered.add(number, image, row.get(str(chosen.caption)), plain_row(row))
        else:
            gathered.skip(number, f"{kind(row)}, not an object")
    return gathered.pairs()


def load_json(file: Path) -> Any:
    facts = require_regular(file)
    if facts.st_size > _MAX_JSON:
        raise data_error(f"{file} has {facts.st_size} bytes, too many for one JSON value", "use JSON lines or Parquet")
    try:
        return json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise data_error(f"{file} is not JSON: {error}", "look at it in an editor, and save it as UTF-8") from None


def _listed(file: Path, loaded: Any) -> Iterator[Any]:
    if not isinstance(loaded, list):
        raise data_error(f"{file} holds {kind(loaded)}, not a list", "a list of objects, one a pair")
    return iter(loaded)


def _text_rows(file: Path, console: Console) -> Iterator[Any]:
    return _csv(file, console) if file.suffix.lower() in (".csv", ".tsv") else _json_lines(file)


def _lines(file: Path) -> Iterator[str]:
    """Lines of UTF-8, each bounded: a file without an end of line is not read into memory."""
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_TEXT + 1):
            number += 1
            if len(line) > MAX_TEXT:
                raise data_error(f"line {number} of {file} is longer than {MAX_TEXT} bytes", "is it a table?")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                utf_16 = number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff")
                why = (
                    f"{file} is UTF-16, not UTF-8"
                    if utf_16
                    else f"line {number} of {file} is not UTF-8: {error.reason}"
                )
                raise data_error(why, AS_UTF_8) from None


def _json_lines(file: Path) -> Iterator[Any]:
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise data_error(f"line {number} of {file} is not JSON: {error}", "one object on each line") from None


def _csv(file: Path, console: Console) -> Iterator[dict[str, Any]]:
    separator = _separator(file)
    rows = _parsed(_lines(file), separator, file)
    top = next(rows, _Row(1, 1, []))
    header = top.values
    if any(is_picture(value) for value in header):  # a picture's name is no name of a column
        console.say(f"{file} has no header: its columns are called 1 to {len(header)}")
        rows, header = chain([top], rows), [str(number) for number in range(1, len(header) + 1)]
    header = [name.strip() for name in header]
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise data_error(f"{file} has two columns called {shown(twice)}", "give each column a name of its own")
    for row in rows:
        if len(row.values) > len(header):
            raise data_error(
                f"{row.where()} of {file}: a row of {len(row.values)} values for {len(header)} columns: "
                f"{shown(separator.join(row.values))}",
                f'a caption that holds {separator!r} stands between "quotes"'
                + (f"; is a quote left open in line {row.first}?" if row.last > row.first else ""),
            )
        if row.values:
            yield dict(zip(header, row.values, strict=False))


def _separator(file: Path) -> str:
    """The one that cuts the first rows into equally many values, and most of them."""

    def score(separator: str) -> tuple[bool, int]:
        rows = _parsed(islice(_lines(file), _SAMPLE), separator, file, whole=False)
        widths = [len(row.values) for row in islice(rows, _SAMPLE) if row.values]
        return (len(set(widths)) == 1, widths[0]) if widths and widths[0] > 1 else (False, 0)

    usual = ("\t" if file.suffix.lower() == ".tsv" else ",") + _SEPARATORS
    scores = {separator: score(separator) for separator in dict.fromkeys(usual)}
    best = max(scores, key=lambda separator: scores[separator])
    if not file.stat().st_size:
        raise data_error(f"{file} is empty", "put a header and at least one pair into it")
    if not scores[best][1]:
        raise data_error(f"{file} has one column", "separate picture and caption by a comma, tab, semicolon or |")
    return best


def _parsed(lines: Iterator[str], separator: str, file: Path, whole: bool = True) -> Iterator[_Row]:
    """The rows of lines; where they are the `whole` file, a quote that nothing closes is refused: it swallows rows."""
    quotes = 0

    def counting() -> Iterator[str]:
        nonlocal quotes
        for line in lines:
            quotes += line.count('"')
            yield line

    rows = csv.reader(counting(), delimiter=separator)
    row = _Row(0, 0, [])
    while True:
        before, in_row, quotes = rows.line_num, quotes, 0
        try:
            values = next(rows)
        except StopIteration:
            if whole and row.last > row.first and in_row % 2:
                raise data_error(
                    f"{row.where()} of {file} are one row: a quote is left open", f"close it in line {row.first}"
                ) from None
            return
        except csv.Error as error:
            hint = (
                "save it with line feeds" if "new-line" in str(error) else f"is a quote left open in line {before + 1}?"
            )
            raise data_error(f"line {rows.line_num} of {file}: {error}", hint) from None
        row = _Row(before + 1, rows.line_num, values)
        if len(values) > _MAX_COLUMNS:
            raise data_error(f"{row.where()} of {file}: {len(values)} values", "is it a table of pairs?")
        yield row


def _coco(file: Path, loaded: dict[str, Any], columns: Columns) -> Pairs:
    """One pair for each picture, in the order of "images"; its captions in the order of "annotations"."""
    images, annotations = loaded.get("images"), loaded.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise data_error(f"{file} holds an object that is not COCO's", _COCO)
    said: dict[Any, list[Any]] = {}
    for number, one in enumerate(annotations):
        wrong = not isinstance(one, dict) or not isinstance(one.get("image_id"), str | int) or "caption" not in one
        if wrong:
            raise data_error(f"annotation {number} of {file} has no image_id or no caption", _COCO)
        said.setdefault(one["image_id"], []).append(one["caption"])
    gathered = Gathered.of_table(file, columns, "image", "images", _COCO, _coco_folder(file, images))
    for number, one in enumerate(images):
        if not isinstance(one, dict) or not isinstance(one.get("id"), str | int):
            gathered.skip(number, "it has no id")
        else:
            captions = said.pop(one["id"], [])
            gathered.add(number, one.get("file_name"), captions, plain_row(one))
    if said:
        raise data_error(f"{len(said)} captions' images of {file} are not among its images, such as {next(iter(said))}",
                         _COCO)  # fmt: skip
    return gathered.pairs()


def _coco_folder(file: Path, images: list[Any]) -> Path:
    """Where the pictures lie: COCO keeps `annotations/captions_train2017.json` beside `train2017/`."""
    name = file.stem.removeprefix("captions_")
    near = [file.parent / inside for inside in ("", "images", "imgs", name)]
    near += [file.parent.parent / inside for inside in (name, f"images/{name}", "images")]
    first = next((one["file_name"] for one in images if isinstance(one, dict) and one.get("file_name")), None)
    if not isinstance(first, str) or leaves(first) or len(first) > 4096:
        return file.parent
    return next((folder for folder in near if _is_there(folder / first)), file.parent)


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or half a character
        return False
