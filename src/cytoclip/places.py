"""Where a split's pairs lie: names with {000..099} or *, and what stands for a split in a data root."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from cytoclip.errors import ExitCode, UserError, first_few

MANY = 100_000  # files that one pattern may name: `{0..999999999}` is a slip, and would never end
ENDINGS = ("csv", "tsv", "jsonl", "ndjson", "json", "parquet", "tar")
SPLITS = ("train", "val", "test")
HUB = "hub:"
_NAMES = {"val": ("val", "validation", "valid")}  # ours first, then as others call it
_SIGNS = "*?[{"
_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})")


def is_hub(place: Path) -> bool:
    """Whether a place is the name of a data set on the Hugging Face hub, `hub:owner/name` or with `/split` behind."""
    return str(place).startswith(HUB)


def is_remote(place: str) -> bool:
    """Whether a place of data is an address (s3://, hf://, https://, …) rather than a path."""
    return "://" in place


def is_pattern(place: Path) -> bool:
    return any(sign in str(place) for sign in _SIGNS) and not place.exists()


def expand(pattern: Path) -> list[Path]:
    """The files that a pattern names, sorted by name, each once.

    Its folders that are there are meant as they are called, whatever signs their names hold. `**` neither follows
    links to folders, which may lead in circles, nor goes into hidden ones.

    Raises
    ------
    UserError
        For braces that don't close, no files, or more than 100,000.
    """
    found: dict[Path, None] = {}
    begin, rest = _literal(pattern)
    try:
        for number, one in enumerate(braces(str(rest))):
            there = _matches(begin, one) if any(sign in one for sign in "*?[") else [begin / one]
            found.update((each, None) for each in islice(there, MANY + 1))
            if len(found) > MANY or number > MANY:
                raise _data_error(f"{pattern} names more than {MANY} files", "name fewer, larger ones")
    except ValueError as error:
        raise _data_error(f"{pattern} is no pattern: {error}", "such as shards/{000..099}.tar or parts/*.csv") from None
    files = sorted(place for place in found if not place.is_dir())
    missing = [str(place) for place in files if not place.exists()]
    if missing:
        raise _data_error(
            f"{len(missing)} of the {len(files)} files that {pattern} names are not there: {first_few(missing)}",
            "name those that are there; * names whatever is there",
        )
    if not files:
        names = sorted(place.name for place in begin.iterdir()) if begin.is_dir() else []
        hint = f"{begin} holds {first_few(names)}" if names else f"{begin} is empty"
        raise _data_error(f"no files match {pattern}", hint)
    return files


def _literal(pattern: Path) -> tuple[Path, Path]:
    """The folders that a pattern begins with and that are there, and the rest of it."""
    for cut in range(len(pattern.parts) - 1, 0, -1):
        begin = Path(*pattern.parts[:cut])
        if begin.is_dir():
            return begin, Path(*pattern.parts[cut:])
    return Path(), pattern


def _matches(begin: Path, pattern: str) -> Iterator[Path]:
    hidden = pattern.startswith(".") or "/." in pattern
    for place in begin.glob(pattern):
        if hidden or not any(part.startswith(".") for part in place.relative_to(begin).parts):
            yield place


def braces(text: str) -> Iterator[str]:
    """What a shell makes of {000..099} and {a,b}, one by one: however many there are, none is held.

    Raises
    ------
    ValueError
        For braces that don't close.

    Examples
    --------
    >>> list(braces("{08..10}-{a,b}"))
    ['08-a', '08-b', '09-a', '09-b', '10-a', '10-b']
    """
    begin = text.find("{")
    if begin < 0:
        yield text
        return
    end = _closing(text, begin)
    for one in _choices(text[begin + 1 : end]):
        for rest in braces(text[end + 1 :]):
            yield text[:begin] + one + rest


def _choices(within: str) -> Iterator[str]:
    numbers = _RANGE.fullmatch(within)
    parts = _parts(within)
    if numbers:
        first, last = (int(numbers[which]) for which in (1, 2))
        padded = any(number.lstrip("-").startswith("0") and len(number) > 1 for number in numbers.groups())
        width = max(len(number) for number in numbers.groups()) if padded else 0
        step = 1 if first <= last else -1
        yield from (f"{number:0{width}}" for number in range(first, last + step, step))
    elif len(parts) > 1:
        for part in parts:
            yield from braces(part)
    else:
        yield from (f"{{{one}}}" for one in braces(within))  # as a shell leaves it


def _closing(text: str, begin: int) -> int:
    depth = 0
    for at in range(begin, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if not depth:
            return at
    raise ValueError("a { is not closed")


def _parts(within: str) -> list[str]:
    """Cut at the commas that are in no braces of their own."""
    parts, depth = [""], 0
    for sign in within:
        depth += (sign == "{") - (sign == "}")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def ours(name: str) -> str:
    """What a split is called here: `val` for `validation` and `valid`."""
    return next((called for called, names in _NAMES.items() if name in names), name)


def split(root: Path, name: str) -> Path | None:
    """What stands for a split in a data root, or None.

    A folder in the original layout or with a `metadata` table; else a file, or shards, named for the split beside it
    (`train.csv`, `train-*.tar`); else a folder.

    Raises
    ------
    UserError
        Where two files stand for it.
    """
    if is_hub(root):
        return root / name
    for called in (name, *(other for other in _NAMES.get(ours(name), ()) if other != name)):
        folder = root / called
        if any((folder / inside).exists() for inside in ("imgs", "img_text_pair.json")):
            return folder
        files = [root / f"{called}.{ending}" for ending in ENDINGS if (root / f"{called}.{ending}").is_file()]
        shards = [
            root / f"{called}{mark}*.{ending}"
            for mark in "-_"
            for ending in ENDINGS
            if next(root.glob(f"{called}{mark}*.{ending}"), None)
        ]
        found = [*files, *shards]
        if len(found) > 1:
            names = first_few([place.name for place in found])
            raise _data_error(f"more than one file stands for {name} in {root}: {names}", f"name one in data.{name}")
        if found or folder.is_dir():
            return found[0] if found else folder
    return None


def splits(root: Path) -> list[str]:
    """The splits that a data root holds."""
    return [name for name in SPLITS if split(root, name) is not None] if root.is_dir() else []


def _data_error(message: str, hint: str) -> UserError:
    return UserError(message, hint, ExitCode.DATA)
