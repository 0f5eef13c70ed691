"""Readers: from a place on disk, in whatever format, to `Pairs`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from cytoclip import columnar, folders, places, shards, tables
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError, counted, first_few, nearest
from cytoclip.pairs import Pairs
from cytoclip.rows import AS_UTF_8, Columns, Gathered, concatenated, data_error, kind

LIST_NAME = "img_text_pair.json"
_LAYOUT = f'a split is a folder with `imgs/` and `{LIST_NAME}`, a list of {{"img": …, "caption": …}}'
_ENTRY = 'each entry needs "img", a path below imgs/, and "caption", a text; entries count from 0'
_FORMATS = "or a .csv, .tsv, .jsonl, .json, .parquet or .tar, a folder of pictures with a .txt each, or hub:owner/name"
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of Hugging Face's imagefolder
_PACKED = ("arrow", "parquet", "tar")
_WORKBOOKS = ("xlsx", "xlsm", "xls", "ods")
_QUIET = Console(quiet=True)


def read(
    place: Path,
    columns: Columns = Columns(),  # noqa: B008 - frozen
    console: Console = _QUIET,
    left_out: list[str] | None = None,
) -> Pairs:
    """The pairs of one split, in the order of its list. No picture is decoded.

    Parameters
    ----------
    place
        - a folder with `imgs/` and `img_text_pair.json`, whose entries have `img` (a path below `imgs/`) and `caption`
          (a text, or a list of several), and may have `group`, `source` and `label` (text or whole numbers);
        - a table: .csv, .tsv, .jsonl, .json (a list of objects, or COCO captions), .parquet;
        - WebDataset shards: a .tar, or a folder of them;
        - several tables or shards by a pattern, `{000..099}` or `*`;
        - a folder of Hugging Face's: imagefolder with `metadata.csv`, or what `save_to_disk` wrote;
        - a folder of pictures with a .txt each;
        - `hub:owner/name` or `hub:owner/name/split`.
    columns
        Of tables; what is not named is guessed, and said on `console`.
    left_out
        Where given, entries of the original layout that are no pairs are told here and left out, not raised.

    Raises
    ------
    UserError
        For a place that is none of these, an entry that is not a pair, or a name that leaves its folder.
    """
    if places.is_hub(place):
        return _hub(str(place).removeprefix(places.HUB), columns, console)
    if places.is_pattern(place):
        return _files(places.expand(place), columns, console)
    if place.is_dir():
        return _folder(place, columns, console, left_out)
    if not place.exists() and not place.suffix:
        raise _no_folder(place)
    return _files([place], columns, console)


def is_loose(place: Path) -> bool:
    """Whether a place is a folder of pictures as they are, with no list, table or shard in it that says more."""
    lists = (LIST_NAME, "imgs", *_METADATA)
    if places.is_hub(place) or places.is_pattern(place) or not place.is_dir():
        return False
    if any(os.path.lexists(place / name) for name in lists):
        return False
    return not any(next(place.glob(f"*.{ending}"), None) for ending in _PACKED)


def holds_pairs(place: Path) -> bool:
    """Whether a place that is there holds pairs itself, and no splits."""
    if places.is_hub(place):
        return str(place).count("/") > 1  # owner, name and split
    if places.is_pattern(place) or place.is_file():
        return True
    return place.is_dir() and not places.splits(place) and (not is_loose(place) or folders.holds_texts(place))


def called(place: Path) -> Path:
    """What a message names when pictures of a place are meant: `imgs/` in the original layout, else the place."""
    return place / "imgs" if (place / LIST_NAME).is_file() else place


def listing(place: Path) -> Path:
    """The file or place that lists the pairs of a place."""
    return place / LIST_NAME if (place / LIST_NAME).is_file() else place


def _folder(folder: Path, columns: Columns, console: Console, left_out: list[str] | None) -> Pairs:
    if (folder / LIST_NAME).exists() or (folder / "imgs").exists():
        return _original(folder, left_out)
    metadata = [name for name in _METADATA if (folder / name).is_file()]
    if metadata:
        return _files([folder / metadata[0]], columns, console)
    for ending in _PACKED:
        found = sorted(folder.glob(f"*.{ending}"))
        if found:
            return _files(_in_order(folder, found), columns, console)
    there = places.splits(folder)
    if there:
        raise data_error(f"{folder} holds several splits: {', '.join(there)}", f"name one: {folder / there[0]}")
    if folders.holds_texts(folder):
        return folders.read(folder, console)
    others = sorted(p.name for p in folder.glob("*.json"))
    hint = f"found {first_few(others)}; rename it, or name the file itself" if others else f"{_LAYOUT}; {_FORMATS}"
    raise data_error(f"no {LIST_NAME} in {folder}", hint)


def _in_order(folder: Path, found: list[Path]) -> list[Path]:
    """Of a folder that `datasets` wrote, the files that its state lists: others may be left over."""
    if not (folder / "state.json").is_file() or found[0].suffix != ".arrow":
        return found
    state = tables.load_json(folder / "state.json")
    listed = state.get("_data_files") if isinstance(state, dict) else None
    names = [str(one.get("filename")) for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    by_name = {place.name: place for place in found}
    if not names or any(name not in by_name for name in names):
        raise data_error(f"{folder / 'state.json'} names files that are not in {folder}", "save the data set again")
    return [by_name[name] for name in names]


def _files(files: list[Path], columns: Columns, console: Console) -> Pairs:
    """Tables or shards, all of one kind."""
    readers: dict[str, Any] = {"parquet": columnar.read, "arrow": columnar.read, "tar": shards.read}
    endings = {file.suffix.lower().removeprefix(".") for file in files}
    if len(endings) > 1:
        raise data_error(f"files of several kinds: {', '.join(sorted(endings))}", "name those of one kind")
    ending = endings.pop()
    if ending in readers:
        return readers[ending](files, columns, console)  # type: ignore[no-any-return]
    if [file.name for file in files] == [LIST_NAME]:
        return _original(files[0].parent, None)
    if ending in places.ENDINGS:
        return concatenated([tables.read(file, columns, console) for file in files])
    if not files[0].exists():
        raise _no_folder(files[0])
    hints = {"gz": f"unpack it: gzip -d {files[0]}"} | dict.fromkeys(_WORKBOOKS, AS_UTF_8)
    hint = hints.get("gz" if ending == "tgz" else ending, f"{_LAYOUT}; {_FORMATS}")
    raise data_error(f"{files[0]} is of no known format", hint)


def _original(folder: Path, left_out: list[str] | None) -> Pairs:
    entries = _entries(folder)
    base = folder / "imgs"
    if not base.is_dir():
        raise data_error(f"no imgs folder in {folder}", _LAYOUT)
    gathered = Gathered(folder / LIST_NAME, base, "entry", "entries", _ENTRY)
    for number, entry in enumerate(entries):
        wrong = _problem(entry)
        if wrong:
            gathered.skip(number, wrong)
        else:
            gathered.add(number, entry["img"], entry["caption"], entry)
    return gathered.pairs(left_out)


def _no_folder(folder: Path) -> UserError:
    missing = next(p for p in (*reversed(folder.parents), folder) if not p.is_dir())  # maybe the data root itself
    siblings = [p.name for p in missing.parent.iterdir()] if missing.parent.is_dir() else []
    if not missing.suffix:
        siblings = [name for name in siblings if (missing.parent / name).is_dir()]
    near = nearest(missing.name, siblings)
    what = "file" if missing.suffix and missing == folder else "folder"
    on_the_way = "" if missing == folder else f", on the way to {folder}"
    return data_error(
        f"no such {what}: {missing}{on_the_way}", f"did you mean {missing.parent / near}?" if near else _LAYOUT
    )


def _entries(folder: Path) -> list[Any]:
    place = folder / LIST_NAME
    if not place.exists():
        others = sorted(p.name for p in folder.glob("*.json"))
        raise data_error(f"no {LIST_NAME} in {folder}", f"found {first_few(others)}; rename it" if others else _LAYOUT)
    entries = tables.load_json(place)
    if not isinstance(entries, list):
        raise data_error(f"{place} holds {kind(entries)}, not a list", _LAYOUT)
    if not entries:
        raise data_error(f"{place} is an empty list", "put at least one pair into it")
    return entries


def _problem(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return f"{kind(entry)}, not an object"
    for key in ("img", "caption"):
        if key not in entry:
            near = nearest(key, [str(k) for k in entry])
            return f"no {key!r}" + (f" (it has {near!r})" if near else "")
    return None


def _hub(name: str, columns: Columns, console: Console) -> Pairs:
    """A data set of the hub, downloaded by `datasets` into its own cache, and read from there like any Arrow file."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{places.HUB}{name} needs the datasets library", 'pip install "cytoclip[hub]"', ExitCode.SYSTEM
        )
    import datasets

    owner, _, rest = name.partition("/")
    repository, _, split = rest.partition("/")
    wanted = "validation" if split == "val" else split or "train"
    if not owner or not repository or "/" in split:
        raise data_error(f"{places.HUB}{name} names no data set", f"such as {places.HUB}owner/name/train")
    console.say(f"{places.HUB}{name}: asking the hub for {wanted}")
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(f"{owner}/{repository}", split=wanted)
    except Exception as error:  # of datasets, huggingface_hub, and the network behind them
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise data_error(f"{places.HUB}{name} cannot be read: {reason}", "check its name, split and login") from None
    files = [Path(one["filename"]) for one in loaded.cache_files]
    found = columnar.read(files, columns, console)
    if len(found) != len(loaded):
        raise data_error(f"{places.HUB}{name} has {counted(len(loaded), 'row')} and its files {len(found)}",
                         "save it with save_to_disk, and name that folder")  # fmt: skip
    return found


def is_split(place: Path) -> bool:
    """Whether a place holds pairs itself, rather than splits that do."""
    if places.is_hub(place) or places.is_pattern(place) or not place.is_dir():
        return True
    own = (LIST_NAME, "imgs", *_METADATA)
    return any(os.path.lexists(place / name) for name in own) or not places.splits(place)
