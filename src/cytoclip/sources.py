"""Readers: from files on disk to `Pairs`. The one format so far is the original project's `img_text_pair.json`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from cytoclip.errors import ExitCode, UserError, counted, first_few, nearest
from cytoclip.pairs import Pairs

_HALF = re.compile("[\ud800-\udfff]")  # half of a character beyond U+FFFF: valid JSON, but no file name and no token
LIST_NAME = "img_text_pair.json"
_LAYOUT = f'a split is a folder with `imgs/` and `{LIST_NAME}`, a list of {{"img": …, "caption": …}}'


def read(folder: Path, left_out: dict[int, str] | None = None) -> Pairs:
    """The pairs of one split, in the order of its list. No picture is opened.

    Parameters
    ----------
    folder
        Holds `imgs/` and `img_text_pair.json`. Each entry has `img` (a path below `imgs/`) and `caption`, and may
        have `group`, `source` and `label` (text or whole numbers). Other keys are allowed.
    left_out
        Where given, entries that are not pairs are left out and told here, the reason by number, and not raised.

    Raises
    ------
    UserError
        For a missing folder or list, an entry that is not a pair, or a name that leaves `imgs/`.
    """
    entries = _entries(folder)
    base = folder / "imgs"
    if not base.is_dir():
        raise _data_error(f"no imgs folder in {folder}", _LAYOUT)
    problems = {i: p for i, entry in enumerate(entries) if (p := _problem(entry)) is not None}
    if problems and (left_out is None or len(problems) == len(entries)):
        place = folder / LIST_NAME
        named = first_few([f"entry {i}: {problem}" for i, problem in problems.items()])
        raise _data_error(
            f"{len(problems)} of {len(entries)} entries of {place} are not pairs: {named}",
            'each entry needs "img", a path below imgs/, and "caption", a text; entries count from 0',
        )
    if left_out is not None:
        left_out.update(problems)
        entries = [entry for i, entry in enumerate(entries) if i not in problems]
    inside = base.resolve()
    images = tuple((inside / entry["img"]) for entry in entries)
    outside = [e["img"] for e, image in zip(entries, images, strict=True) if not _real(image).is_relative_to(inside)]
    if outside:
        raise _data_error(
            f"{counted(len(outside), 'link')} below {base} leading out of it: {first_few(outside)}",
            "copy the pictures into imgs/",
        )
    return Pairs(
        images=images,
        names=tuple(entry["img"] for entry in entries),
        captions=tuple(entry["caption"] for entry in entries),
        groups=_tags(entries, "group"),
        sources=_tags(entries, "source"),
        labels=_tags(entries, "label"),
    )


def _real(image: Path) -> Path:
    return Path(os.path.realpath(image))  # as resolve(), which raises for a link to itself


def _entries(folder: Path) -> list[Any]:
    if not folder.is_dir():
        missing = next(p for p in (*reversed(folder.parents), folder) if not p.is_dir())  # maybe the data root itself
        siblings = [p.name for p in missing.parent.iterdir() if p.is_dir()] if missing.parent.is_dir() else []
        near = nearest(missing.name, siblings)
        raise _data_error(f"no such folder: {missing}", f"did you mean {missing.parent / near}?" if near else _LAYOUT)
    place = folder / LIST_NAME
    if not place.is_file():
        others = sorted(p.name for p in folder.glob("*.json"))
        raise _data_error(f"no {LIST_NAME} in {folder}", f"found {first_few(others)}; rename it" if others else _LAYOUT)
    try:
        entries = json.loads(place.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _data_error(f"{place} is not JSON: {error}", _LAYOUT) from None
    if not isinstance(entries, list):
        raise _data_error(f"{place} holds {_kind(entries)}, not a list", _LAYOUT)
    if not entries:
        raise _data_error(f"{place} is an empty list", "put at least one pair into it")
    return entries


def _problem(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return f"{_kind(entry)}, not an object"
    for key in ("img", "caption"):
        if key not in entry:
            near = nearest(key, [str(k) for k in entry])
            return f"no {key!r}" + (f" (it has {near!r})" if near else "")
        if not isinstance(entry[key], str):
            return f"its {key} is {_kind(entry[key])}, not a text"
        if not entry[key].strip():
            return f"its {key} is empty"
        if _HALF.search(entry[key]):
            return f"its {key} holds half a character, {entry[key]!r}"
    name = PurePosixPath(entry["img"])
    if name.is_absolute() or ".." in name.parts or "\0" in entry["img"]:
        return f"{entry['img']!r} leaves imgs/"
    for key in ("group", "source", "label"):
        if not isinstance(entry.get(key), str | int | None) or isinstance(entry.get(key), bool):
            return f"its {key} is {_kind(entry[key])}, not a text or whole number"
    return None


def _tags(entries: list[Any], key: str) -> tuple[str | None, ...]:
    return tuple(None if entry.get(key) is None else str(entry[key]) for entry in entries)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _data_error(message: str, hint: str) -> UserError:
    return UserError(message, hint, ExitCode.DATA)
