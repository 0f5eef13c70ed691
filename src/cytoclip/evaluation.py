"""Rank a split with one or several models, and say how they differ and whether that is beyond noise."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cytoclip import (
    batches,
    captions,
    checkpoint,
    config,
    device,
    embeddings,
    encode,
    files,
    intervals,
    liveness,
    measure,
    places,
    report,
    sources,
)
from cytoclip.checkpoint import Opened
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.embeddings import Owner
from cytoclip.encode import Reading
from cytoclip.errors import ExitCode, UserError, counted
from cytoclip.measure import Measured
from cytoclip.pairs import Pairs, fingerprint, spread
from cytoclip.report import Scores

RESULT_NAME = "eval_result.json"  # the original project's
SCHEMA = 1  # of the document; another number where a key changes its meaning
BASE = "base"
NO_BASE = "none"

Embedded = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Question:
    """What to rank: the k of hit@k, and the directions, `image_to_text` and `text_to_image` or one of them."""

    ks: Sequence[int]
    directions: Sequence[str] = tuple(report.DIRECTIONS)


@dataclass(frozen=True)
class How:
    """How to go about it.

    Parameters
    ----------
    base
        The model that the others are compared with: a name, `none`, or None for the starting point of the first of
        them that is a run.
    embeddings
        A file where embeddings are kept, and from which those of the same model and pairs are taken; each further model
        has a file beside it, with its number in the name.
    batch_size, workers
        Pictures or captions embedded at once, and processes that decode.
    """

    base: str | None = NO_BASE
    embeddings: Path | None = None
    batch_size: int = 64
    workers: int | None = None


@dataclass(frozen=True)
class Compared:
    """Several models on one split, the base first where there is one; each dictionary goes by what a table calls them.

    Parameters
    ----------
    names
        What was asked for: a hub id or folder.
    differences
        Of each model to the base.
    """

    pairs: Pairs
    names: dict[str, str]
    measured: dict[str, Measured]
    embedded: dict[str, Embedded]
    differences: dict[str, Scores]

    def __repr__(self) -> str:
        """The table at every k that was asked for: what a notebook shows."""
        directions = [one for scores in self.columns().values() for one in scores.values() if isinstance(one, dict)]
        names = {name for one in directions for name in one}
        return self.text(sorted(int(name.removeprefix("hit@")) for name in names if re.fullmatch(r"hit@\d+", name)))

    def columns(self) -> dict[str, Scores]:
        return {title: one.scores for title, one in self.measured.items()}

    def document(self, split: str) -> dict[str, Any]:
        """What `--json` prints."""
        models = []
        for title, one in self.columns().items():
            compared = {"difference": self.differences[title]} if title in self.differences else {}
            models.append({"model": self.names[title], **one, **compared})
        return {"schema": SCHEMA, "split": split, "base": self.names.get(BASE), "models": models}

    def text(self, ks: Sequence[int]) -> str:
        """The table, and what it says of the base."""
        lines = [report.table(self.columns(), ks)]
        for title, difference in self.differences.items():
            lines += ["", f"{title} against {BASE} ({self.names[BASE]}), with its 95 % interval:"]
            lines += report.difference_lines(difference, ks)
        return "\n".join(lines)


def rank(opened: Opened, pairs: Pairs, reading: Reading, question: Question, world: World, console: Console) -> Scores:
    """Embed a split once and rank it; the same result in every process."""
    embedded = encode.encode(opened.encoder, pairs, reading, world, console)
    return rank_embedded(*embedded, pairs, question, world)


def rank_embedded(
    image_ND: torch.Tensor, text_ND: torch.Tensor, pairs: Pairs, question: Question, world: World
) -> Scores:
    """Rank the embeddings of a split; the same result in every process."""
    return world.once(lambda: measure.quick(image_ND, text_ND, pairs, question.ks, question.directions))


def reading(opened: Opened, pairs: Pairs, batch_size: int, workers: int) -> Reading:
    """How `opened` reads the captions and pictures of a split."""
    tokens = captions.tokenise(opened.tokenizer, pairs.captions, opened.context, opened.encoder.family)
    return Reading(tokens, opened.pixels, batch_size, workers)


def evaluate(models: Sequence[str], folder: Path, question: Question, console: Console, how: How) -> Compared:
    """Open models one after another and rank one split with each; the same result in every process.

    Raises
    ------
    UserError
        For a model or split that cannot be used.
    """
    precision, said_by = precision_of(models)
    world = device.start(precision=precision, said_by=said_by, warn=console.warn)
    with liveness.watched(world):
        pairs = world.once(lambda: spread(batches.open_split(folder, console)))
        for k in question.ks:
            if k > len(pairs):
                console.warn(f"k = {k} is more than the {len(pairs)} captions and pictures there are: hit@{k} is 1")
        console.say(
            f"{counted(len(pairs), 'pair')} of {folder} on {world.device.type}, {world.arithmetic}, "
            f"{counted(world.size, 'process', 'processes')}"
        )
        names: dict[str, str] = {}
        embedded: dict[str, Embedded] = {}
        for asked in _asked(models, how.base):
            opened = _opened(asked, console)
            if opened:
                file = _file(how, asked.title, len(embedded.keys() - {BASE}))
                embedded[asked.title] = _embedded(opened, pairs, file, how, world, console)
                names[asked.title] = asked.name
                del opened  # one model at a time
        measured = world.once(lambda: _measured(pairs, embedded, question, console))
        others = [title for title in names if BASE in names and title != BASE]
        differences = {title: measure.difference(measured[title], measured[BASE]) for title in others}
        return Compared(pairs, names, measured, embedded, differences)


def precision_of(models: Sequence[str]) -> tuple[str, str]:
    """That of the runs among them, so that their results come again, else the launcher's, else float32; who says so.

    Runs of several precisions are compared in float32, and so are those of one that this processor only imitates.
    """
    runs = {config.load(run.config).train.precision for run in map(checkpoint.run_of, models) if run}
    if len(runs) > 1:
        return "no", "runs of several precisions"
    if runs:
        precision = runs.pop()
        if device.imitates(precision):
            return "no", f"the device, which has no units for the run's {precision}"
        return precision, "the run"
    return ("auto", "") if os.environ.get("ACCELERATE_MIXED_PRECISION") else ("no", "the default of evaluation")


def save_as_original(scored: Scores, place: str, direction: str) -> Path:
    """Write `eval_result.json` into `place` where that is a writable folder, else into the current one.

    The keys of the asked direction stand flat (`hit@1`, `hit@1_groups`), as the original's did; with both, those of
    image → text do, and each direction stands under its own name too.
    """
    folder = Path(place)
    target = folder if folder.is_dir() and os.access(folder, os.W_OK) else Path()
    flat = scored["image_to_text" if direction == "both" else direction]
    both = {name: scored[name] for name in report.DIRECTIONS} if direction == "both" else {}
    chance = {f"chance_{key}": value for key, value in scored["chance"].items()}
    files.write_json(target / RESULT_NAME, {**flat, "direction": direction, "pairs": scored["pairs"], **chance, **both})
    return target / RESULT_NAME


def split_folder(data_root: Path, split: str) -> Path:
    """Where a split of a data root is, with the splits there are in the message where it is not.

    A place that holds pairs itself is its own val split, such as a table, and `root/val` of a data root.
    """
    if sources.holds_pairs(data_root) or (data_root.suffix and not data_root.exists()):
        return _itself(data_root, split)
    found = places.split(data_root, split)
    if data_root.is_dir() and not found:
        there = places.splits(data_root)
        hint = f"splits there: {', '.join(there)}" if there else "a data root holds train/ and val/"
        raise UserError(f"no split {split!r} in {data_root}", hint, ExitCode.DATA)
    return found or data_root / split


def _itself(place: Path, split: str) -> Path:
    """A place of pairs, where it can be the split that is asked for."""
    name, beside = places.ours(place.name), places.splits(place.parent) if place.is_dir() else []
    if name in beside and name != places.ours(split):
        raise UserError(f"no split {split!r} in {place}", f"give {place.parent}, which holds it", ExitCode.DATA)
    if name not in beside and places.ours(split) != "val":
        raise UserError(f"{place} holds pairs and no split {split!r}", "leave --split out", ExitCode.DATA)
    return place


@dataclass(frozen=True)
class _Asked:
    """A model that was asked for, or is implied by one that was."""

    title: str
    name: str
    open: Callable[[], Opened]
    implied: bool = False


def _asked(models: Sequence[str], base: str | None) -> list[_Asked]:
    """The base first. Named among the models too it is one column, as it has nothing to differ in from itself."""
    found = [
        _Asked(f"./{name}" if name == BASE else name, name, lambda name=name: checkpoint.open_model(name))  # type: ignore[misc]
        for name in dict.fromkeys(models)
    ]
    run = next((run for run in map(checkpoint.run_of, models) if run), None)
    if base is None and run:
        wanted = config.load(run.config)
        as_it_is = wanted.model.context_length is None and wanted.data.crop == "auto"
        others = _others(found, wanted.model.name) if as_it_is else found
        implied = others == found  # else it was named, and must be there
        return [_Asked(BASE, wanted.model.name, lambda: checkpoint.open_start(wanted), implied), *others]
    if base in (None, NO_BASE):
        return found
    name = str(base)
    return [_Asked(BASE, name, lambda: checkpoint.open_model(name)), *_others(found, name)]


def _others(asked: list[_Asked], base: str) -> list[_Asked]:
    """Those that are not the base itself, or all where that would leave none."""
    paths = {name: Path(name) for name in (base, *(one.name for one in asked))}
    same = {name: str(path.resolve()) if path.exists() else name for name, path in paths.items()}
    return [one for one in asked if same[one.name] != same[base]] or asked


def _opened(asked: _Asked, console: Console) -> Opened | None:
    """None for a starting point that is not there any more."""
    try:
        return asked.open()
    except UserError as error:
        if not asked.implied:
            raise
        console.warn(f"without the run's starting point, {asked.name}: {error.message}")
        return None


def _file(how: How, title: str, others: int) -> Path | None:
    """FILE for the first model that was asked for; `FILE-base`, `FILE-2` and so on beside it for the others."""
    if how.embeddings is None or (title != BASE and not others):
        return how.embeddings
    ending = BASE if title == BASE else str(others + 1)
    return how.embeddings.with_stem(f"{how.embeddings.stem}-{ending}")


def _embedded(opened: Opened, pairs: Pairs, file: Path | None, how: How, world: World, console: Console) -> Embedded:
    """Embeddings of the split, from a file that has them, or made and kept there."""
    opened.encoder.to(world.device)
    weights = opened.digest(world.precision)
    owner = Owner(fingerprint(pairs), opened.name, weights)
    if file and world.once(lambda: _are_there(file, owner, console)):
        console.say(f"{opened.name}: embeddings from {file}")
        image_ND, text_ND = embeddings.read(file)
        return image_ND.to(world.device), text_ND.to(world.device)
    console.say(f"{opened.name}")
    reads = reading(opened, pairs, how.batch_size, world.loaders(how.workers))
    if reads.tokens.truncated:
        console.warn(f"{counted(reads.tokens.truncated, 'caption')} above {opened.context} tokens: cut there")
    image_ND, text_ND = encode.encode(opened.encoder, pairs, reads, world, console)
    if file:
        world.once(lambda: embeddings.write(file, image_ND, text_ND, owner))
    return image_ND, text_ND


def _are_there(file: Path, owner: Owner, console: Console) -> bool:
    """Whether a file has the embeddings that are wanted; what is no such file is not written over."""
    if file.suffix != ".safetensors":
        raise UserError(f"--embeddings {file} does not end in .safetensors", f"such as {file.stem}.safetensors")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"--embeddings {file}: nothing can be written into {file.parent}", "name a folder of yours")
    if embeddings.are_of(file, owner):
        return True
    if file.exists():
        before = embeddings.owner(file)
        if before is None:
            raise UserError(f"--embeddings {file} is there and holds no embeddings of ours", "name another file")
        console.warn(f"{file} holds embeddings of {before.model}, of other weights or pairs: made anew")
    return False


def _measured(pairs: Pairs, embedded: dict[str, Embedded], question: Question, console: Console) -> dict[str, Measured]:
    found = {}
    for title, (image_ND, text_ND) in embedded.items():
        with console.progress("ranking", len(set(pairs.contents))) as bar:
            found[title] = measure.full(image_ND, text_ND, pairs, question.ks, question.directions, bar.advance)
    drawn = next(iter(found.values())).drawn
    doubt = intervals.doubt(drawn.by, drawn.count)
    if doubt:
        console.warn(doubt)
    return found
