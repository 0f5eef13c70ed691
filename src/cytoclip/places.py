"""Where a split's pairs lie: names with {000..099} or *, and what stands for a split in a data root."""

from __future__ import annotations

from glob import iglob
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from cytoclip.errors import ExitCode, UserError, first_few

MANY = 100_000  # files that one pattern may name: `{0..999999999}` is a slip, and would never end
ENDINGS = ("csv", "tsv", "jsonl", "ndjson", "json", "parquet", "tar")
SPLITS = ("train", "val", "test")
HUB = "hub:"
_NAMES = {"val": ("val", "validation", "valid")}  # ours first, then as others call it
_SIGNS = "*?[{"


def is_hub(place: Path) -> bool:
    """Whether a place is the name of a data set on the Hugging Face hub, `hub:owner/name` or with `/split` behind."""
    return str(place).startswith(HUB)


def is_pattern(place: Path) -> bool:
    return any(sign in str(place) for sign in _SIGNS) and not place.exists()


def expand(pattern: Path) -> list[Path]:
    """The files that a pattern names, sorted by name, each once.

    Raises
    ------
    UserError
        For braces that don't close, no files, or more than 100,000.
    """
    found: dict[Path, None] = {}
    try:
        for one in islice(braceexpand(str(pattern)), MANY + 1):
            there = iglob(one, recursive=True) if any(sign in one for sign in "*?[") else [one]  # noqa: PTH207 - any root
            found.update((Path(each), None) for each in islice(there, MANY + 1))
            if len(found) > MANY:
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
        raise _data_error(f"no files match {pattern}", "look at its folder and at the ending of its files")
    return files


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
    for called in _NAMES.get(name, (name,)):
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
