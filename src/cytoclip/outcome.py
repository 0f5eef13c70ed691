"""What a run comes to: its held-out splits scored in full, with the starting model and with best/, for results.json."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from cytoclip import (
    __version__,
    checkpoint,
    classify,
    device,
    embeddings,
    encode,
    evaluation,
    jobs,
    labels,
    measure,
    plan,
    prompts,
)
from cytoclip.checkpoint import Opened
from cytoclip.embeddings import Owner
from cytoclip.errors import ExitCode, UserError
from cytoclip.feed import FromDisk
from cytoclip.jobs import Job
from cytoclip.pairs import Pairs, fingerprint
from cytoclip.report import Scores
from cytoclip.validation import Progress

SCHEMA = 1  # of results.json; another number where a key changes its meaning
SIDES = ("before", "best")


def results(job: Job, progress: Progress) -> dict[str, Any]:
    """All of results.json, the same in every process.

    The test split is embedded and scored here and nowhere else: twice the cost of one evaluation, since the starting
    model is asked too.
    """
    world, wanted = job.world, job.config
    kept = {"keep": {"root": wanted.validation.keep, **progress.kept}} if wanted.validation.keep else {}
    return {
        "schema": SCHEMA,
        "steps": progress.step,
        "best_step": progress.best_step,
        "ks": wanted.validation.ks,
        "select_by": wanted.validation.select_by,
        "stopped_early": progress.step < job.plan.steps,
        "before": progress.before,
        "last": progress.last,
        "best": progress.best,
        **({"floor": jobs.typical(job, job.feed).floor} if isinstance(job.feed, FromDisk) else {}),
        **_held_out(job, progress),
        **_by_class(job),
        **kept,
        "seconds": round(progress.seconds, 1),
        "pairs_seen": progress.step * wanted.train.batch_size,
        "processes": world.size,
        "device": world.device.type,
        "hardware": device.hardware(world.device),
        "versions": versions(),
        "skipped": progress.skipped,
        "from_hub": not Path(wanted.model.name).exists(),
    }


def versions() -> dict[str, str]:
    """Of what decides a number: our own and the libraries' below us, and Python's."""
    below = ("torch", "transformers", "accelerate", "peft")
    found = {"cytoclip": __version__, **{name: importlib.metadata.version(name) for name in below}}
    return {**found, "python": platform.python_version()}


def _held_out(job: Job, progress: Progress) -> dict[str, dict[str, Scores]]:
    """Of val, and of test where there is one: the scores of each side, from the embeddings in the run folder."""
    splits = {"val": job.val, **({"test": job.test} if job.test else {})}
    owners = {
        (split, side): Owner(fingerprint(pairs), *_side(job, progress, side))
        for split, pairs in splits.items()
        for side in SIDES
    }
    for side in SIDES:
        lacking = [split for split in splits if not _is_there(job, split, side, owners[split, side])]
        if lacking:
            opened = _opened(job, side)
            for split in lacking:
                _embed(job, opened, splits[split], _path(job, split, side), owners[split, side])
            del opened
            gc.collect()  # an encoder and the hook in its tower hold each other, on a GPU too

    return job.world.once(lambda: {split: _compared(job, split, pairs) for split, pairs in splits.items()})


def _compared(job: Job, split: str, pairs: Pairs) -> dict[str, Scores]:
    """Both sides in full, and by how much best/ is above the start."""
    found = {}
    for side in SIDES:
        image_ND, text_ND = (rows.to(job.world.device) for rows in embeddings.read(_path(job, split, side)))
        found[side] = measure.full(image_ND, text_ND, pairs, job.config.validation.ks)
    difference = measure.difference(found["best"], found["before"])
    return {**{side: one.scores for side, one in found.items()}, "difference": difference}


def _by_class(job: Job) -> dict[str, Any]:
    """Zero-shot classification of val, or of test where there is one, by the labels of its entries, if it has any."""
    split, pairs = ("test", job.test) if job.test else ("val", job.val)
    if len({label for label in pairs.labels if label}) < 2:
        return {}
    pictures = labels.pictures(split, pairs, job.console)
    if not 2 <= len(set(pictures.labels)) <= classify.MOST_CLASSES:
        return {}
    row_of = {content: row for row, content in enumerate(pairs.contents)}
    rows = [row_of[content] for content in pictures.contents]
    found: dict[str, Any] = {}
    for side in SIDES:
        opened = _opened(job, side)
        image_ND = embeddings.read(_path(job, split, side))[0][rows]
        reading = evaluation.reading(opened, pictures, plan.held(job.config, job.world.size), job.reading.workers)
        found[side] = classify.zero_shot(
            opened, pictures, image_ND, prompts.read(None), reading, job.world, job.console
        )
        del opened
        gc.collect()
    return {"classification": {"split": split, **found}}


def _side(job: Job, progress: Progress, side: str) -> tuple[str, str]:
    """The name and the weights' digest of the starting model, or of best/."""
    if side == "before":
        return job.opened.name, job.inputs["model"]
    return str(job.run.best.absolute()), progress.best_weights


def _path(job: Job, split: str, side: str) -> Path:
    """Validation writes those of val as it goes (`validation.py`)."""
    path: Path = job.run.embeddings / (f"{side}.safetensors" if split == "val" else f"{split}-{side}.safetensors")
    return path


def _is_there(job: Job, split: str, side: str, owner: Owner) -> bool:
    return job.world.once(lambda: embeddings.are_of(_path(job, split, side), owner))


def _opened(job: Job, side: str) -> Opened:
    """One more model beside the one that was trained: whole in every process, without gradients and moments."""
    if side == "best":
        opened = checkpoint.open_model(str(job.run.best))
    else:
        opened = checkpoint.open_start(job.config)
        if opened.digest() != job.inputs["model"]:
            raise UserError(
                f"{job.config.model.name} has other weights or settings than when {job.run.path} was begun",
                "put them back and give the same command again: all steps are done and saved",
                ExitCode.RUN,
            )
    opened.encoder.to(job.world.device)
    return opened


def _embed(job: Job, opened: Opened, pairs: Pairs, path: Path, owner: Owner) -> None:
    reading = evaluation.reading(opened, pairs, plan.held(job.config, job.world.size), job.reading.workers)
    embedded = encode.encode(opened.encoder, pairs, reading, job.world, job.console)
    job.world.once(lambda: embeddings.write(path, *embedded, owner))
