"""Rank a split with a model and say how often the right answer is among the first k."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cytoclip import batches, captions, checkpoint, config, device, encode, files, liveness, places, report, retrieval
from cytoclip.checkpoint import Opened
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.encode import Reading
from cytoclip.errors import ExitCode, UserError, counted
from cytoclip.pairs import Pairs, identities, spread
from cytoclip.report import Scores

RESULT_NAME = "eval_result.json"  # the original project's


@dataclass(frozen=True)
class Question:
    """What to rank: the k of hit@k, and the directions, `image_to_text` and `text_to_image` or one of them."""

    ks: Sequence[int]
    directions: Sequence[str] = tuple(report.DIRECTIONS)


def rank(opened: Opened, pairs: Pairs, reading: Reading, question: Question, world: World, console: Console) -> Scores:
    """Embed a split once and rank it in each direction; the same result in every process."""
    image_ND, text_ND = encode.encode(opened.encoder, pairs, reading, world, console)
    sides = {"image_to_text": (image_ND, text_ND), "text_to_image": (text_ND, image_ND)}
    identity = identities(pairs)

    def ranked() -> Scores:
        measured = {name: retrieval.hit_rates(*sides[name], identity, question.ks) for name in question.directions}
        return report.scores(measured, retrieval.chance(identity, question.ks))

    return world.once(ranked)


def reading(opened: Opened, pairs: Pairs, batch_size: int, workers: int) -> Reading:
    """How `opened` reads the captions and pictures of a split."""
    tokens = captions.tokenise(opened.tokenizer, pairs.captions, opened.context, opened.encoder.family)
    return Reading(tokens, opened.pixels, batch_size, workers)


def evaluate(
    name: str, folder: Path, question: Question, console: Console, batch_size: int = 64, workers: int | None = None
) -> Scores:
    """Open a model and rank one split folder with it.

    Raises
    ------
    UserError
        For a model or split that cannot be used.
    """
    precision, said_by = precision_of(name)
    world = device.start(precision=precision, said_by=said_by)
    with liveness.watched(world):
        pairs = world.once(lambda: spread(batches.open_split(folder, console)))
        opened = checkpoint.open_model(name)
        opened.encoder.to(world.device)
        for k in question.ks:
            if k > len(pairs):
                console.warn(f"k = {k} is more than the {len(pairs)} captions and pictures there are: hit@{k} is 1")
        console.say(
            f"{opened.name}: {len(pairs)} pairs of {folder} on {world.device.type}, precision {world.precision} "
            f"(from {world.precision_from}), {counted(world.size, 'process', 'processes')}"
        )
        how = reading(opened, pairs, batch_size, world.loaders(workers))
        if how.tokens.truncated:
            console.warn(f"{counted(how.tokens.truncated, 'caption')} above {opened.context} tokens: cut there")
        return rank(opened, pairs, how, question, world, console)


def precision_of(name: str) -> tuple[str, str]:
    """A run's own, so that its results come again; else the launcher's; else float32, and who says so."""
    run = checkpoint.run_of(name)
    if run:
        return config.load(run.config).train.precision, "the run"
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
    """Where a split of a data root is, with the splits there are in the message where it is not."""
    found = places.split(data_root, split)
    if data_root.is_dir() and not found:
        there = places.splits(data_root)
        hint = f"splits there: {', '.join(there)}" if there else "a data root holds train/ and val/"
        raise UserError(f"no split {split!r} in {data_root}", hint, ExitCode.DATA)
    return found or data_root / split
