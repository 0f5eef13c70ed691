"""`fit`: the whole run, from a configuration to a run folder; read it from top to bottom."""

from __future__ import annotations

import importlib.metadata
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cytoclip import (
    alarms,
    augment,
    checkpoint,
    claim,
    config,
    device,
    diverged,
    evaluate,
    files,
    jobs,
    journal,
    liveness,
    optim,
    plan,
    report,
    report_page,
    shard,
    signals,
    state,
    streams,
)
from cytoclip.batches import Batch
from cytoclip.checkpoint import RunFolder
from cytoclip.config import Config
from cytoclip.console import Console, duration
from cytoclip.decoded import Decoded
from cytoclip.errors import ExitCode, Stopped, UserError, counted, first_few
from cytoclip.evaluate import Question
from cytoclip.feed import Arrival, FromAfar, FromDisk, Read
from cytoclip.jobs import Job
from cytoclip.loss import Logits, contrastive_step
from cytoclip.pictures import Pictures
from cytoclip.plan import Plan
from cytoclip.report import Scores


@dataclass(frozen=True)
class RunResult:
    """What a finished run measured on the validation split, and where it is.

    Parameters
    ----------
    before, last, best
        Scores of the starting point, of the last step, and of the best validation after the start.
    """

    run: Path
    steps: int
    best_step: int
    before: Scores
    last: Scores
    best: Scores

    def table(self) -> str:
        columns = {"before": self.before, f"step {self.steps}": self.last}
        if self.best_step != self.steps:
            columns |= {f"best, step {self.best_step}": self.best}
        return report.table(columns, _ks(self.before))


def fit(wanted: Config, console: Console) -> RunResult:
    """Train as `wanted` says, or go on where the same run stopped.

    Raises
    ------
    UserError
        For anything that the user can mend; before the first step wherever it can be known by then.
    """
    world = device.start(wanted.train.device, wanted.train.precision)
    run = RunFolder(Path(wanted.output))
    wanted = jobs.settled(wanted, world, run)
    plan.check_batch(wanted, world.size)
    with liveness.watched(world), claim.claimed(run, wanted, world, console):
        done = world.once(lambda: _finished(run, wanted))
        if done:
            console.say(f"{run.path} is finished: {done.steps} steps; delete it or name another output to train anew")
            return done
        console.say(jobs.first_line(wanted, world))
        behind = world.once(lambda: _behind(run, console))
        job = jobs.prepare(wanted, run, world, console)
        world.once(lambda: plan.check_disk(job.plan, run.path))
        world.once(lambda: _begin(run, job.config))
        progress = _resume(job, *behind) if behind else _start(job)
        _train(job, progress)
        return _finish(job, progress)


def dry_run(wanted: Config, console: Console) -> Plan:
    """Everything that `fit` checks and counts before its first step, and nothing written."""
    world = device.start(wanted.train.device, wanted.train.precision)
    run = RunFolder(Path(wanted.output))
    wanted = jobs.settled(wanted, world, run)
    plan.check_batch(wanted, world.size)
    world.once(lambda: claim.refuse_other_run(run, wanted))
    console.say(jobs.first_line(wanted, world))
    planned = jobs.prepare(wanted, run, world, console, storing=False).plan
    world.once(lambda: plan.check_disk(planned, run.path))
    return planned


@dataclass
class _Progress:
    """All that a checkpoint remembers beside weights, moments and random states."""

    step: int = 0
    before: Scores = field(default_factory=dict)
    last: Scores = field(default_factory=dict)
    best: Scores = field(default_factory=dict)
    best_step: int = 0
    best_weights: str = ""
    seconds: float = 0.0
    scaler: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)  # names of pictures, and how often others stood in
    positions: list[list[streams.Position]] = field(default_factory=list)  # of each process's readers, from afar


def _finished(run: RunFolder, wanted: Config) -> RunResult | None:
    """What a finished run measured; None for one that is not, or is asked for more steps than it did."""
    if not run.results.is_file() or claim.is_longer(run, wanted):
        return None
    try:
        found = files.read_json(run.results)
    except ValueError as error:
        raise UserError(
            f"{run.results} is damaged: {error}", "delete it to score the run again", ExitCode.RUN
        ) from None
    return RunResult(run.path, found["steps"], found["best_step"], found["before"], found["last"], found["best"])


def _behind(run: RunFolder, console: Console) -> tuple[int, Path] | None:
    """(step, folder) of the checkpoint to go on from; None where the run begins."""
    found = state.newest(run.checkpoints, console.warn)
    if found is None and run.results.is_file():
        raise UserError(
            f"{run.path} is finished and has no checkpoints left to go on from",
            "name another output; model.name may be that run's folder",
            ExitCode.RUN,
        )
    return found


def _begin(run: RunFolder, wanted: Config) -> None:
    """In this order, so that a crash between the two leaves a run that is not finished, not one of another length."""
    run.results.unlink(missing_ok=True)
    files.write_text(run.config, _versions() + config.dump(wanted))


def _start(job: Job) -> _Progress:
    progress = _Progress(inputs=job.inputs)
    progress.before = progress.last = _validate(job)
    job.console.say(f"before: {report.one_line(progress.before, job.config.validation.ks)}")
    return progress


def _resume(job: Job, step: int, folder: Path) -> _Progress:
    """Go on from a checkpoint; what comes out is what the run would have come to without the stop.

    The one exception: a run that was asked for more steps has also been validated at its old last step, and that may
    be its best one. Losses and weights are those of a run that was asked for all its steps at once.
    """
    kept, averages = state.load_state(folder, job.opened.encoder, job.optimizer, job.world)
    if job.averages:
        job.averages.load(averages)
    progress = _Progress(**kept)
    other = [name for name, digest in job.inputs.items() if progress.inputs.get(name) != digest]
    if other:
        raise UserError(
            f"{job.run.path} was begun with another {other[0]} than is there now",
            "put it back, or name another output to train anew",
            ExitCode.RUN,
        )
    if isinstance(job.feed, FromAfar):
        job.feed.refuse_other_readers(progress.positions, job.world)
    job.scaler.load_state_dict(progress.scaler)
    if step < job.plan.steps and progress.best_weights != job.world.once(lambda: _best_weights(job.run)):
        # best/ is of a later step than this checkpoint, and so better than all before that step: what is best from
        # here on leads to the same end, and until then best/ and its scores belong together again.
        progress.best, progress.best_step, progress.best_weights = {}, 0, ""
    job.console.say(f"resuming {job.run.path} after step {step}")
    return progress


def _best_weights(run: RunFolder) -> str:
    files.recover(run.best)
    return checkpoint.weights_digest(run.best)


def _train(job: Job, progress: _Progress) -> None:
    steps = job.plan.steps
    read = _read_so_far(job, progress)
    arrivals = job.feed.arrivals(progress.step, steps, job.world, read)
    chance = job.objective.chance_loss(job.config.train.batch_size), job.objective.chance_name
    watch, began = journal.Stopwatch(), time.perf_counter() - progress.seconds
    waiting = alarms.Waiting(job.config.data, job.reading.workers, _unwatched(job, progress.step))
    with ExitStack() as stack:
        book = stack.enter_context(_journal(job, progress.step))
        bar = stack.enter_context(job.console.progress("training", steps, start=progress.step))
        asked_to_stop = stack.enter_context(signals.heard())
        losses: list[float] | None = []  # since the warm-up; None once their alarm has rung
        while progress.step < steps:
            asked = time.perf_counter()
            arrival = next(arrivals)
            watch.waited(asked)
            if progress.step == 0 and arrival.batch.images.ndim == 4:
                _look_at_first(job, arrival.batch)
            row, curves = _step(job, progress.step, arrival)
            progress.step += 1
            curves |= watch.read(job.config.train.batch_size)
            if losses is not None and progress.step > job.config.train.warmup_steps:
                losses.append(row["loss"] - curves.get("anchor", 0.0))
                losses = None if _ring(job, alarms.flat_loss(losses, *chance)) else losses
            if book:
                book.step(row, curves)
            bar.advance(note=journal.note(row, curves, *chance))
            _ring(job, waiting.line(curves["waiting_for_data"]))
            save = _due(progress.step, job.config.checkpoint.every, steps)
            if _due(progress.step, job.config.validation.every, steps):
                save |= _note_validation(job, progress, book)  # best/ and the state that made it belong together
            progress.seconds = time.perf_counter() - began
            stopped = job.world.largest(asked_to_stop())  # all processes stop after the same step
            if save or stopped:
                _note_reading(job, progress, read)
                _save(job, progress, book)
            if stopped and progress.step < steps:
                raise Stopped(stopped, progress.step)
            watch.read(0)  # the next step's speed is its own


def _look_at_first(job: Job, batch: Batch) -> None:
    """An alarm for pictures without contrast; and beside the run's numbers what its first pictures were varied to."""
    few = plan.held(job.config, job.world.size)  # the whole batch as floats need not fit
    _ring(job, alarms.no_contrast(job.opened.encoder.to_floats(batch.images[:few])))
    if job.variation and batch.changes is not None and job.world.first:
        shown = slice(0, augment.SHOWN)
        files.write_bytes(job.run.varied, augment.sheet(job.variation, batch.images[shown], batch.changes[shown]))


def _unwatched(job: Job, done: int) -> int:
    """Steps whose waiting is no sign: the rest of the warm-up, and of what a cache still lacks an epoch."""
    kept = _kept(job)[:1]
    epoch = job.plan.steps_per_epoch if kept and len(kept[0].missing()) else None
    return max(job.config.train.warmup_steps - done, epoch or 0)


def _read_so_far(job: Job, progress: _Progress) -> Read:
    """Where this process goes on reading; what all have skipped is counted on by the first."""
    positions = [streams.Position(*each) for each in progress.positions[job.world.rank]] if progress.positions else []
    return Read(Counter(progress.skipped if job.world.first else {}), positions)


def _note_reading(job: Job, progress: _Progress, read: Read) -> None:
    every = job.world.listed([read])
    progress.skipped = dict(sum((one.skipped for one in every), Counter()))
    progress.positions = [one.positions for one in every] if read.positions else []


def _step(job: Job, step: int, arrival: Arrival) -> tuple[dict[str, float], dict[str, float]]:
    """One optimizer step; what it was, and what is only worth a curve."""
    encoder, world, wanted = job.opened.encoder, job.world, job.config.train
    moving = encoder.moving()
    rate = optim.learning_rate(step, job.plan.steps, wanted)
    optim.set_rates(job.optimizer, rate)
    job.optimizer.zero_grad()
    chunks = arrival.batch.chunks(plan.held(job.config, world.size))
    factor = job.scaler.get_scale() if job.scaler.is_enabled() else 1.0
    logits = Logits(encoder.logit_scale, encoder.logit_bias)
    shown, start = augment.seen_by(encoder, job.variation), job.start and augment.seen_by(job.start, job.variation)
    result = contrastive_step(shown, logits, chunks, arrival.identity, world, job.objective, factor, start)
    world.sum_gradients(moving.values())
    job.scaler.unscale_(job.optimizer)
    clipped = optim.clip(moving, wanted.max_grad_norm)
    scale = encoder.logit_scale.detach().reshape(())
    values = torch.stack([result.loss, clipped, scale, result.hit_at_1, result.anchor]).tolist()
    skips = job.scaler.is_enabled() and factor >= 1  # fp16 tries again at half the scale
    norm = 0.0 if skips else values[1]
    diverged.refuse_non_finite(step + 1, values[0], norm, shown, chunks, arrival.names, world)
    job.scaler.step(job.optimizer)
    job.scaler.update()
    encoder.clamp_scale()
    if job.averages:
        job.averages.update()
    row = {"step": step + 1, "loss": values[0], "lr": rate, "logit_scale": values[2], "gradient_norm": values[1]}
    curves = {"hit_at_1": values[3], "chance_loss": job.objective.chance_loss(wanted.batch_size)}
    if job.objective.anchored:
        curves["anchor"] = values[4]
    if world.device.type == "cuda":
        curves["memory_gb"] = torch.cuda.max_memory_allocated(world.device) / 1e9
    return row, curves


def _note_validation(job: Job, progress: _Progress, book: journal.Journal | None) -> bool:
    """Rank the validation split, and keep the model if it is the best so far: whether it was."""
    progress.last = _validate(job)
    if book:
        book.validation(progress.step, progress.last)
    line = report.one_line(progress.last, job.config.validation.ks)
    better = not progress.best or report.selection_score(progress.last) > report.selection_score(progress.best)
    if better:
        progress.best, progress.best_step = progress.last, progress.step
        _save_model(job, job.run.best)
        progress.best_weights = job.world.once(lambda: _best_weights(job.run))
    job.console.say(f"step {progress.step}: {line}{', the best so far' if better else ''}")
    _ring(job, alarms.at_chance(progress.last))
    return better


def _ring(job: Job, alarm: str | None) -> bool:
    if alarm:
        job.console.warn(alarm)
    return alarm is not None


def _validate(job: Job) -> Scores:
    question = Question(job.config.validation.ks)
    with _averaged(job):
        return evaluate.rank(job.opened, job.val, job.reading, question, job.world, job.console)


def _save_model(job: Job, folder: Path) -> None:
    with _averaged(job), shard.whole(job.opened.encoder, job.world):
        job.world.once(lambda: checkpoint.save_model(folder, job.opened, job.adapter, job.config.model))


def _averaged(job: Job) -> AbstractContextManager[None]:
    """The weights that are validated and saved: their moving average, where there is one."""
    return job.averages.applied() if job.averages else nullcontext()


def _save(job: Job, progress: _Progress, book: journal.Journal | None) -> None:
    if book:
        book.sync()
    progress.scaler = job.scaler.state_dict()
    remembered = {k: v for k, v in asdict(progress).items() if k != "step"}
    averages = job.averages.state() if job.averages else None
    keep = job.config.checkpoint.keep_last
    state.save_state(
        job.run.checkpoints, progress.step, job.opened.encoder, job.optimizer, job.world, remembered, averages, keep
    )


def _finish(job: Job, progress: _Progress) -> RunResult:
    steps = progress.step
    result = RunResult(job.run.path, steps, progress.best_step, progress.before, progress.last, progress.best)
    written = {
        **{key: value for key, value in asdict(result).items() if key != "run"},
        "ks": job.config.validation.ks,
        "seconds": round(progress.seconds, 1),
        "pairs_seen": steps * job.config.train.batch_size,
        "processes": job.world.size,
        "device": job.world.device.type,
        "skipped": progress.skipped,
    }
    _say_what_was_mended(job)
    if progress.skipped:
        job.console.warn(
            f"{counted(len(progress.skipped), 'picture')} could not be used, and others stood in "
            f"{counted(sum(progress.skipped.values()), 'time')}: {first_few(list(progress.skipped))}; "
            "`cytoclip check` says what is wrong with each"
        )

    _save_model(job, job.run.model)
    job.world.once(lambda: files.write_json(job.run.results, written))  # last: it is what makes the run finished
    job.world.once(lambda: report_page.write(job.run.path, job.console, {"val": job.val}))
    job.console.say(f"finished {steps} steps in {duration(progress.seconds)}")
    return result


def _say_what_was_mended(job: Job) -> None:
    mended = sum(kept.mended() for kept in _kept(job))
    if mended:
        job.console.warn(f"data.cache: {counted(mended, 'damaged picture')} decoded again; is the disk sound?")


def _kept(job: Job) -> list[Decoded]:
    """The decoded pictures on disk, of training and of validation, where there are."""
    pictures = job.feed.pictures if isinstance(job.feed, FromDisk) else None
    return [kept for kept in (pictures.kept if isinstance(pictures, Pictures) else None, job.reading.kept) if kept]


def _versions() -> str:
    names = ("cytoclip", "torch", "transformers", "accelerate", "peft")
    return "# " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names) + "\n"


@contextmanager
def _journal(job: Job, done: int) -> Iterator[journal.Journal | None]:
    """The run's journal in the first process; None in the others."""
    if not job.world.first:
        yield None
        return
    book = journal.Journal(job.run.losses, job.run.path, job.config.track.to, done)
    try:
        yield book
    finally:
        book.close()


def _due(step: int, every: int, steps: int) -> bool:
    return step % every == 0 or step == steps


def _ks(scored: Scores) -> list[int]:
    return [int(key.removeprefix("hit@")) for key in scored["chance"] if not key.endswith("_groups")]
