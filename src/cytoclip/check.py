"""What is wrong with a data root: every picture decoded, every caption read, every split held against the others."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from cytoclip import apart, cache, checkpoint, findings, looks, places, repeats, sources, texts, verdict
from cytoclip.console import Console
from cytoclip.data_options import Data
from cytoclip.errors import ExitCode, UserError, counted, first_few
from cytoclip.findings import Reader, Split
from cytoclip.kinds import Case, Finding, by_severity
from cytoclip.looks import Look
from cytoclip.objectives import Objective
from cytoclip.pairs import Pairs
from cytoclip.pictures import Pictures
from cytoclip.repeats import Repeats
from cytoclip.rows import Columns
from cytoclip.verdict import Facts, Report


@dataclass(frozen=True)
class Asked:
    """What the data are held against: options of the run that is to come, as `cytoclip train` calls them.

    Parameters
    ----------
    crop
        As data.crop.
    columns
        As data.image_column, data.caption_column and data.image_root.
    keeps
        Fill the cache of decoded pictures that a run of this checkpoint and crop reads with data.cache=true.
    """

    crop: str = "auto"
    columns: Columns = field(default_factory=Columns)
    keeps: bool = False


def check(
    root: Path,
    model: str | None,
    batch_size: int | None,
    console: Console,
    asked: Asked = Asked(),
) -> Report:
    """Look at the splits of a data root, whichever are there.

    Parameters
    ----------
    model
        A checkpoint whose tokenizer and picture size are asked; without one, what needs them is left out.
    batch_size
        Pairs contrasted in one step, for the floor of the loss; None: what would suit.

    Raises
    ------
    UserError
        There is no split that can be read, or the checkpoint cannot be used, or the cache cannot be filled.
    """
    if asked.keeps and not model:
        raise UserError(
            "--cache without --model: nobody knows the size that pictures are to be kept at",
            "name the checkpoint that is to be trained, such as --model openai/clip-vit-base-patch16",
        )
    reader = _reader(model, asked.crop) if model else None
    read, unreadable = _read(root, asked.columns, console)
    files = list(dict.fromkeys(place for pairs in read.values() for place in pairs.images))
    seen = dict(zip(files, looks.look_at(files, root, console), strict=True))
    splits = {name: _split(_place(root, name), pairs, seen, reader) for name, pairs in read.items()}
    if asked.keeps and reader:
        _keep(root, splits, reader, console)
    first = next(iter(splits.values()))
    size = batch_size or verdict.batch_size(len(first.pairs))
    objective = Objective(reader.family.objective if reader else "infonce")
    repeated = verdict.typical_repeats(first.pairs, size, objective)
    found = [*findings.find(splits, reader), *unreadable, *_as_a_whole(splits, size, repeated)]
    return Report(
        root=str(root),
        splits=splits,
        facts={name: Facts.of(split, reader) for name, split in splits.items()},
        findings=by_severity(found),
        batch_size=size,
        objective=objective,
        repeats=repeated,
        reader=reader,
        crop=asked.crop,
    )


def _reader(model: str, crop: str) -> Reader:
    opened = checkpoint.with_crop(checkpoint.open_model(model), crop)
    return Reader(model, opened.tokenizer, opened.context, opened.encoder.family, opened.pixels)


def _read(root: Path, columns: Columns, console: Console) -> tuple[dict[str, Pairs], list[Finding]]:
    """The splits that can be read, and a finding for each that cannot; where none can, that is the error."""
    there = places.splits(root)
    if not there:
        raise _no_root(root)
    read: dict[str, Pairs] = {}
    unreadable = []
    for name in there:
        left_out: list[str] = []
        try:
            read[name] = sources.read(_place(root, name), columns, console, left_out)
        except UserError as error:
            if len(there) == 1 or (name == there[-1] and not read):
                raise
            unreadable.append(Finding("unreadable-split", name, 0, (Case(name, "", note=error.message),)))
        if left_out:
            cases = tuple(Case(name, where, note=why) for where, _, why in (one.partition(": ") for one in left_out))
            unreadable.append(Finding("no-pair", name, len(left_out) + len(read[name]), cases))
    apart.warn_of_cut_sources(next(iter(read.values())), console)
    return read, unreadable


def _place(root: Path, name: str) -> Path:
    """Of a split that `places.splits` found."""
    return places.split(root, name) or root / name


def _no_root(root: Path) -> UserError:
    if not root.exists():
        try:
            places.expand(root) if places.is_pattern(root) else sources.read(root)
        except UserError as error:  # it names what is there instead
            return error
    parent = root.absolute().parent
    if root.is_dir():
        what, hint = "holds no train, val or test split", "name the folder that holds the splits"
        hint += f": {parent}" if places.splits(parent) else ""
    else:
        what, hint = "is no folder of splits", f"make one of it: `cytoclip bring {shlex.quote(str(root))} --to …`"
    return UserError(f"{root} {what}", hint, ExitCode.DATA)


def _split(folder: Path, pairs: Pairs, seen: dict[looks.Place, Look], reader: Reader | None) -> Split:
    mine = [seen[place] for place in pairs.images]
    contents = tuple(look.content or f"unread {place}" for look, place in zip(mine, pairs.images, strict=True))
    split = Split(replace(pairs, contents=contents), mine, tuple(_unnamed(folder / "imgs", pairs)))
    if reader is None:
        return split
    captions = [text for _, text in split.captions()]
    return replace(split, tokens=texts.token_counts(reader.tokenizer, captions, reader.family))


def _keep(root: Path, splits: dict[str, Split], reader: Reader, console: Console) -> None:
    """Fill the tables that a run reads (`intake.py`): of its training and validation pictures, by the same key.

    Those that cannot be used are findings already, and are left out. Others have changed since they were looked at.
    """
    parts = []
    for name in sorted(splits.keys() & {"train", "val"}, reverse=True):
        pairs = splits[name].pairs
        rows = [row for row, look in enumerate(splits[name].looks) if not look.problem]
        pictures = Pictures([pairs.images[row] for row in rows], reader.pixels)
        contents = [pairs.contents[row] for row in rows]
        parts.append(cache.Part(_place(root, name), contents, pictures))
    cache.announce(Data(root=str(root), cache=True), parts, console)
    failed = [error.message for part in parts for error in cache.fill(part, looks.cores(), console)]
    if failed:
        console.warn(f"{counted(len(failed), 'picture')} could not be kept: {first_few(failed)}")


def _unnamed(base: Path, pairs: Pairs) -> Iterator[str]:
    """Files below imgs/, links not followed, that no pair names; hidden ones are nobody's pictures."""
    base = base.resolve()
    named = {os.path.normpath(place) for place in pairs.images if isinstance(place, Path)}
    for folder, inner, names in os.walk(base):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            place = Path(folder, name)
            if str(place) not in named and not name.startswith(".") and name not in ("Thumbs.db", "desktop.ini"):
                yield str(place.relative_to(base))


def _as_a_whole(splits: dict[str, Split], size: int, repeated: Repeats | None) -> list[Finding]:
    found = []
    train = splits.get("train")
    if train is not None and len(train.pairs) < size:
        found.append(Finding("few-pairs", "train", 0, (), f"{len(train.pairs)} pairs and a batch of {size}"))
    if train is not None and repeated and repeated.kind:
        found.append(Finding(repeated.kind, "train", 0, (), repeats.lost(repeated, size)))
    if "val" not in splits:
        found.append(Finding("no-validation", ", ".join(splits), 0, ()))
    return found
