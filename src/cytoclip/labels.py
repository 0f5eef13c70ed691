"""What class each picture is of: from the pairs, or from a table beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from cytoclip import tables
from cytoclip.console import Console
from cytoclip.errors import counted, first_few, shown
from cytoclip.pairs import Pairs
from cytoclip.rows import data_error, kind, pick_labels, plain_row, tags_problem

_SAMPLE = 100  # rows, to guess the columns


def read(files: Sequence[Path], console: Console) -> dict[str, str]:
    """The label of each picture that the tables name, in the formats of `tables.read`; an empty label is none.

    Raises
    ------
    UserError
        For a table without such columns, a row that is none, or a picture with two labels.
    """
    found: dict[str, str] = {}
    for file in files:
        for name, label in _rows(file, console):
            if found.setdefault(name, label) != label:
                raise data_error(
                    f"{file} gives {shown(name)} the label {shown(label)}, after {shown(found[name])}",
                    "one label a picture",
                )
    if files and not found:
        raise data_error(f"{first_few([str(file) for file in files])} gives no picture a label", "a label in each row")
    return found


def given(splits: Mapping[str, Pairs], table: Mapping[str, str], console: Console) -> dict[str, Pairs]:
    """The splits with the labels of a table instead of their own; rows that name none of their pictures are said.

    Raises
    ------
    UserError
        Where no row names a picture of theirs.
    """
    known = {name for pairs in splits.values() for name in pairs.names}
    unknown = [shown(name) for name in table if name not in known]
    where = " and ".join(splits)
    if len(unknown) == len(table):
        example = next(iter(splits.values())).names[0]
        raise data_error(
            f"none of the pictures that the labels name is in {where}: {first_few(unknown)}",
            f"write names as the data do, such as {shown(example)}",
        )
    if unknown:
        console.say(f"{counted(len(unknown), 'row')} of the labels name no picture of {where}: {first_few(unknown)}")
    return {
        split: replace(pairs, labels=tuple(table.get(name) for name in pairs.names)) for split, pairs in splits.items()
    }


def pictures(split: str, pairs: Pairs, console: Console) -> Pairs:
    """Each different picture that has a label once; those left out are said.

    A picture that its pairs label in two ways is left out too.
    """
    first: dict[str, int] = {}
    labelled: dict[str, set[str]] = {}
    for row, (content, label) in enumerate(zip(pairs.contents, pairs.labels, strict=True)):
        first.setdefault(content, row)
        labelled.setdefault(content, set()).update([label] if label else [])
    left_out = {
        "has no label|have no label": [row for content, row in first.items() if not labelled[content]],
        "has two labels|have two labels": [row for content, row in first.items() if len(labelled[content]) > 1],
    }
    for why, rows in left_out.items():
        if rows:
            one, several = why.split("|")
            names = first_few([pairs.names[row] for row in rows])
            console.say(
                f"{counted(len(rows), 'picture')} of {len(first)} in {split} {one if len(rows) == 1 else several} "
                f"and {'is' if len(rows) == 1 else 'are'} left out: {names}"
            )
    kept = [row for content, row in first.items() if len(labelled[content]) == 1]
    columns = {name: tuple(column[row] for row in kept) for name, column in vars(pairs).items()}
    columns["labels"] = tuple(next(iter(labelled[pairs.contents[row]])) for row in kept)
    return Pairs(**columns)


def _rows(file: Path, console: Console) -> list[tuple[str, str]]:
    rows = tables.rows_of(file, console)
    first = list(islice(rows, _SAMPLE))
    objects = [row for row in first if isinstance(row, Mapping)]
    if not objects:
        raise data_error(f"{file} holds no rows with names of columns", "a column image and a column label")
    image, label = pick_labels(objects, file, console.say)
    found, problems = [], []
    for number, row in enumerate(chain(first, rows), start=1):
        wrong, pair = _pair(row, image, label)
        if wrong:
            problems.append(f"row {number}: {wrong}")
        elif pair:
            found.append(pair)
    if problems:
        raise data_error(
            f"{counted(len(problems), 'row')} of {file} without picture and label: {first_few(problems)}",
            "each row has a picture's name and a label, which may be empty",
        )
    return found


def _pair(row: Any, image: str, label: str) -> tuple[str | None, tuple[str, str] | None]:
    """What is wrong with a row, or its picture and label; neither where its label is empty."""
    if not isinstance(row, Mapping):
        return f"{kind(row)}, not an object", None
    name = row.get(image)
    tags = plain_row({"label": row.get(label)})
    if not isinstance(name, str) or not name:
        return f"its {image} is {kind(name)}" if name != "" else f"its {image} is empty", None
    wrong = tags_problem(tags)
    value = tags.get("label")
    return (wrong, None) if wrong or value is None else (None, (name, str(value)))
