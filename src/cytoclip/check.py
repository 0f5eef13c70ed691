"""What is wrong with a data root: every picture decoded, every caption read, every split held against the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cytoclip import checkpoint, findings, looks, places, sources, texts, verdict
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError
from cytoclip.findings import Reader, Split
from cytoclip.kinds import Case, Finding, by_severity
from cytoclip.looks import Look
from cytoclip.objectives import Objective
from cytoclip.pairs import Pairs
from cytoclip.rows import Columns
from cytoclip.verdict import Facts, Report


def check(root: Path, model: str | None, batch_size: int | None, console: Console) -> Report:
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
        There is no split that can be read, or the checkpoint cannot be used.
    """
    reader = _reader(model) if model else None
    read, unreadable = _read(root, console)
    files = list(dict.fromkeys(place for pairs in read.values() for place in pairs.images))
    seen = dict(zip(files, looks.look_at(files, root, console), strict=True))
    splits = {
        name: _split(places.split(root, name) or root / name, pairs, seen, reader) for name, pairs in read.items()
    }
    first = next(iter(splits.values()))
    size = batch_size or verdict.batch_size(len(first.pairs))
    objective = Objective(reader.family.objective if reader else "infonce")
    found = [*findings.find(splits, reader), *unreadable, *_as_a_whole(splits, size)]
    return Report(
        root=str(root),
        splits=splits,
        facts={name: Facts.of(split, reader) for name, split in splits.items()},
        findings=by_severity(found),
        batch_size=size,
        objective=objective,
        repeats=verdict.typical_repeats(first.pairs, size, objective),
        reader=reader,
    )


def _reader(model: str) -> Reader:
    opened = checkpoint.open_model(model)
    return Reader(model, opened.tokenizer, opened.context, opened.encoder.family, opened.pixels)


def _read(root: Path, console: Console) -> tuple[dict[str, Pairs], list[Finding]]:
    """The splits that can be read, and a finding for each that cannot; where none can, that is the error."""
    there = places.splits(root)
    if not there:
        what = "holds no train, val or test split" if root.is_dir() else "is no folder"
        raise UserError(f"{root} {what}", "name the folder that holds the splits", ExitCode.DATA)
    read: dict[str, Pairs] = {}
    unreadable = []
    for name in there:
        left_out: list[str] = []
        try:
            read[name] = sources.read(places.split(root, name) or root / name, Columns(), console, left_out)
        except UserError as error:
            if len(there) == 1 or (name == there[-1] and not read):
                raise
            unreadable.append(Finding("unreadable-split", name, 0, (Case(name, "", note=error.message),)))
        if left_out:
            cases = tuple(Case(name, where, note=why) for where, _, why in (one.partition(": ") for one in left_out))
            unreadable.append(Finding("no-pair", name, len(left_out) + len(read[name]), cases))
    return read, unreadable


def _split(folder: Path, pairs: Pairs, seen: dict[looks.Place, Look], reader: Reader | None) -> Split:
    mine = [seen[place] for place in pairs.images]
    contents = tuple(look.content or f"unread {place}" for look, place in zip(mine, pairs.images, strict=True))
    split = Split(replace(pairs, contents=contents), mine, tuple(_unnamed(folder / "imgs", pairs)))
    if reader is None:
        return split
    captions = [text for _, text in split.captions()]
    return replace(split, tokens=texts.token_counts(reader.tokenizer, captions, reader.family))


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


def _as_a_whole(splits: dict[str, Split], size: int) -> list[Finding]:
    found = []
    train = splits.get("train")
    if train is not None and len(train.pairs) < size:
        found.append(Finding("few-pairs", "train", 0, (), f"{len(train.pairs)} pairs and a batch of {size}"))
    if "val" not in splits:
        found.append(Finding("no-validation", ", ".join(splits), 0, ()))
    return found
