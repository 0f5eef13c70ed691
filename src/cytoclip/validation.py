"""A validation during a run: the splits that are ranked, the best model kept, and whether the run goes on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cytoclip import (
    alarms,
    checkpoint,
    embeddings,
    encode,
    evaluation,
    families,
    files,
    projection_fit,
    report,
    selection,
    shard,
)
from cytoclip.checkpoint import RunFolder
from cytoclip.embeddings import Owner
from cytoclip.evaluation import Question
from cytoclip.jobs import Job
from cytoclip.journal import Journal
from cytoclip.pairs import fingerprint
from cytoclip.report import Scores
from cytoclip.streams import Position


@dataclass
class Progress:
    """All that a checkpoint remembers beside weights, moments and random states.

    Parameters
    ----------
    best_weights
        Digest of the weights in best/, so that they and `best` are known to belong together.
    kept
        Scores of `validate.keep` at the start (`before`) and at the best validation (`best`).
    waited
        Validations since the best one, those that `validate.patience` counts.
    skipped
        Names of pictures, and how often others stood in.
    positions
        Of each process's readers of pairs from afar.
    """

    step: int = 0
    before: Scores = field(default_factory=dict)
    last: Scores = field(default_factory=dict)
    best: Scores = field(default_factory=dict)
    best_step: int = 0
    best_weights: str = ""
    kept: dict[str, Scores] = field(default_factory=dict)
    waited: int = 0
    seconds: float = 0.0
    scaler: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    positions: list[list[Position]] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """What one validation measured: the scores, and the embeddings (N, D) of the validation split."""

    val: Scores
    keep: Scores | None
    image_ND: torch.Tensor
    text_ND: torch.Tensor


def begin(job: Job) -> Progress:
    """The starting model's validation."""
    progress, seen = Progress(inputs=job.inputs), look(job)
    progress.before = progress.last = seen.val
    if seen.keep:
        progress.kept["before"] = seen.keep
    _write_embeddings(job, "before", seen, job.inputs["model"])
    job.console.say(f"before: {_line(job, seen)}")
    if _is_new(job) and alarms.at_chance(seen.val):
        job.console.say(
            "the two towers know nothing of each other yet: with model.projections=fitted, training begins where a "
            "closed form brings them"
        )
    return progress


def note(job: Job, progress: Progress, book: Journal | None) -> bool:
    """Rank the validation split, and keep the model if it is the best so far: whether it was."""
    seen, by = look(job), job.config.validation.select_by
    progress.last = seen.val
    if book:
        book.validation(progress.step, seen.val, seen.keep)
    better = not progress.best or selection.score(progress.last, by) > selection.score(progress.best, by)
    if better:
        progress.best, progress.best_step, progress.waited = progress.last, progress.step, 0
        if seen.keep:
            progress.kept["best"] = seen.keep
        save_model(job, job.run.best)
        progress.best_weights = job.world.once(lambda: best_weights(job.run))
        _write_embeddings(job, "best", seen, progress.best_weights)
    elif progress.step % job.config.validation.every == 0:
        progress.waited += 1
    stands = "as before training" if progress.last == progress.before else "the best so far"
    job.console.say(f"step {progress.step}: {_line(job, seen)}{f', {stands}' if better else ''}")
    alarm = alarms.at_chance(progress.last)
    if alarm:
        job.console.warn(alarm)
    if job.watcher and job.world.first:
        job.watcher(progress.step, progress.last)
    return better


def look(job: Job) -> Seen:
    """Rank what is held out with the weights as they are, or their moving average."""
    question = Question(job.config.validation.ks)
    with averaged(job):
        embedded = encode.encode(job.opened.encoder, job.val, job.reading, job.world, job.console)
        keep = evaluation.rank(job.opened, *job.keep, question, job.world, job.console) if job.keep else None
    return Seen(evaluation.rank_embedded(*embedded, job.val, question, job.world), keep, *embedded)


def forget_other_best(job: Job, progress: Progress) -> None:
    """Where best/ is of a later step than the checkpoint that a run goes on from, the best so far is forgotten.

    That step was better than all before it: what is best from here on leads to the same end, no sooner runs out of
    patience, and until then best/ and its scores belong together again.
    """
    if not is_over(job, progress) and progress.best_weights != job.world.once(lambda: best_weights(job.run)):
        progress.best, progress.best_step, progress.best_weights = {}, 0, ""


def is_over(job: Job, progress: Progress) -> bool:
    """Whether no step is left to do: all are done, or patience has run out."""
    patience = job.config.validation.patience
    return progress.step >= job.plan.steps or (patience is not None and progress.waited >= patience)


def save_model(job: Job, folder: Path) -> None:
    with averaged(job), shard.whole(job.opened.encoder, job.world):
        job.world.once(lambda: checkpoint.save_model(folder, job.opened, job.adapter, job.config.model))


def averaged(job: Job) -> AbstractContextManager[None]:
    """The weights that are validated and saved: their moving average, where there is one."""
    return job.averages.applied() if job.averages else nullcontext()


def best_weights(run: RunFolder) -> str:
    """Digest of the weights in best/."""
    files.recover(run.best)
    return checkpoint.weights_digest(run.best)


def _is_new(job: Job) -> bool:
    """Whether towers were joined, and what joins them could be fitted."""
    joined = job.opened.encoder.clip.config.model_type in families.JOINED
    return joined and job.config.model.projections == "full" and not projection_fit.hidden(job.opened.encoder)


def _write_embeddings(job: Job, name: str, seen: Seen, weights: str) -> None:
    """After the model: killed between the two, a run comes to this step again, and writes both anew."""
    model = job.opened.name if name == "before" else str(job.run.best.absolute())
    owner = Owner(fingerprint(job.val), model, weights)
    path = job.run.embeddings / f"{name}.safetensors"
    job.world.once(lambda: embeddings.write(path, seen.image_ND, seen.text_ND, owner))


def _line(job: Job, seen: Seen) -> str:
    ks = job.config.validation.ks
    kept = f"; keep: {report.one_line(seen.keep, ks)}" if seen.keep else ""
    return report.one_line(seen.val, ks) + kept
