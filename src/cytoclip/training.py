"""`fit`: the whole run, from a configuration to a run folder; read it from top to bottom."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cytoclip import (
    alarms,
    augment,
    claim,
    config,
    device,
    diverged,
    files,
    jobs,
    journal,
    liveness,
    optim,
    outcome,
    plan,
    report,
    report_page,
    signals,
    state,
    streams,
    validation,
)
from cytoclip.batches import Batch
from cytoclip.checkpoint import RunFolder
from cytoclip.config import Config
from cytoclip.console import Console, duration
from cytoclip.decoded import Decoded
from cytoclip.errors import ExitCode, Stopped, UserError, counted, first_few
from cytoclip.feed import Arrival, FromAfar, FromDisk, Read
from cytoclip.jobs import Job, Watcher
from cytoclip.loss import Logits, contrastive_step
from cytoclip.pictures import Pictures
from cytoclip.plan import Plan
from cytoclip.report import Scores
from cytoclip.validation import Progress


@dataclass(frozen=True)
class RunResult:
    """What a finished run measured on the validation split, and where it is.

    Parameters
    ----------
    before, last, best
        Scores of the starting point, of the last step, and of the best validation after the start.
    test
        Scores of the test split by the starting model (`before`) and by best/ (`best`); empty where there is none.
    """

    run: Path
    steps: int
    best_step: int
    before: Scores
    last: Scores
    best: Scores
    test: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        columns = {"before": self.before, f"step {self.steps}": self.last}
        best = f"best, step {self.best_step}"
        if self.best_step != self.steps:
            columns |= {best: self.best}
        ks = _ks(self.before)
        tables = [report.table(columns, ks)]
        if self.test:
            asked = {"before": self.test["before"], best: self.test["best"]}
            tables += ["the test split, asked once, at the end:", report.table(asked, ks)]
        return "\n\n".join(tables)


def fit(wanted: Config, console: Console, watcher: Watcher | None = None) -> RunResult:
    """Train as `wanted` says, or go on where the same run stopped.

    `watcher` hears of each validation in the first process; what it raises ends the run, as if it were killed there.

    Raises
    ------
    UserError
        For anything that the user can mend; before the first step wherever it can be known by then.
    """
    world = device.start(wanted.train.device, wanted.train.precision, warn=console.warn)
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
        job = replace(jobs.prepare(wanted, run, world, console, begins=not behind), watcher=watcher)
        world.once(lambda: plan.check_disk(job.plan, run.path))
        world.once(lambda: _begin(run, job.config))
        progress = _resume(job, *behind) if behind else validation.begin(job)
        jobs.begin_fitted(job)
        _train(job, progress)
        return _finish(job, progress)


def dry_run(wanted: Config, console: Console) -> Plan:
    """Everything that `fit` checks and counts before its first step, and nothing written."""
    world = device.start(wanted.train.device, wanted.train.precision, warn=console.warn)
    run = RunFolder(Path(wanted.output))
    wanted = jobs.settled(wanted, world, run)
    plan.check_batch(wanted, world.size)
    world.once(lambda: claim.refuse_other_run(run, wanted))
    console.say(jobs.first_line(wanted, world))
    planned = jobs.prepare(wanted, run, world, console, storing=False).plan
    world.once(lambda: plan.check_disk(planned, run.path))
    return planned


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
    return _result(run, found)


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
    versions = ", ".join(f"{name} {version}" for name, version in outcome.versions().items())
    files.write_text(run.config, f"# {versions}\n" + config.dump(wanted))


def _resume(job: Job, step: int, folder: Path) -> Progress:
    """Go on from a checkpoint; what comes out is what the run would have come to without the stop.

    The one exception: a run that was asked for more steps has also been validated at its old last step, and that may
    be its best one. Losses and weights are those of a run that was asked for all its steps at once.
    """
    kept, averages = state.load_state(folder, job.opened.encoder, job.optimizer, job.world)
    if job.averages:
        job.averages.load(averages)
    progress = Progress(**kept)
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
    validation.forget_other_best(job, progress)
    job.console.say(f"resuming {job.run.path} after step {step}")
    return progress


def _train(job: Job, progress: Progress) -> None:
    steps = job.plan.steps
    read = _read_so_far(job, progress)
    arrivals = job.feed.arrivals(progress.step, steps, job.world, read)
    chance = job.objective.chance_loss(job.config.train.batch_size), job.objective.chance_name
    watch, began = journal.Stopwatch(), time.perf_counter() - progress.seconds
    waiting = alarms.Waiting(job.config.data, job.reading.workers, _unwatched(job, progress.step))
    with ExitStack() as stack:
        book = stack.enter_context(_journal(job, progress))
        bar = stack.enter_context(job.console.progress("training", steps, start=progress.step))
        asked_to_stop = stack.enter_context(signals.heard())
        losses: list[float] | None = []  # since the warm-up; None once their alarm has rung
        while not validation.is_over(job, progress):
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
                save |= validation.note(job, progress, book)  # best/ and the state that made it belong together
            over = validation.is_over(job, progress)
            progress.seconds = time.perf_counter() - began
            stopped = job.world.largest(asked_to_stop())  # all processes stop after the same step
            if save or over or stopped:
                _note_reading(job, progress, read)
                _save(job, progress, book)
            if stopped and not over:
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


def _read_so_far(job: Job, progress: Progress) -> Read:
    """Where this process goes on reading; what all have skipped is counted on by the first."""
    positions = [streams.Position(*each) for each in progress.positions[job.world.rank]] if progress.positions else []
    return Read(Counter(progress.skipped if job.world.first else {}), positions)


def _note_reading(job: Job, progress: Progress, read: Read) -> None:
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


def _ring(job: Job, alarm: str | None) -> bool:
    if alarm:
        job.console.warn(alarm)
    return alarm is not None


def _save(job: Job, progress: Progress, book: journal.Journal | None) -> None:
    if book:
        book.sync()
    progress.scaler = job.scaler.state_dict()
    remembered = {k: v for k, v in asdict(progress).items() if k != "step"}
    averages = job.averages.state() if job.averages else None
    keep = job.config.checkpoint.keep_last
    state.save_state(
        job.run.checkpoints, progress.step, job.opened.encoder, job.optimizer, job.world, remembered, averages, keep
    )


def _finish(job: Job, progress: Progress) -> RunResult:
    if progress.step < job.plan.steps:
        job.console.say(
            f"stopped early after step {progress.step} of {job.plan.steps}: validate.patience is "
            f"{job.config.validation.patience}, and the best validation is that of step {progress.best_step}"
        )
    _say_what_was_mended(job)
    if progress.skipped:
        job.console.warn(
            f"{counted(len(progress.skipped), 'picture')} could not be used, and others stood in "
            f"{counted(sum(progress.skipped.values()), 'time')}: {first_few(list(progress.skipped))}; "
            "`cytoclip check` says what is wrong with each"
        )
    validation.save_model(job, job.run.model)
    written = outcome.results(job, progress)
    job.world.once(lambda: files.write_json(job.run.results, written))  # last: it is what makes the run finished
    job.world.once(
        lambda: report_page.write(
            job.run.path, job.console, {"val": job.val} | ({"test": job.test} if job.test else {})
        )
    )
    job.console.say(f"finished {progress.step} steps in {duration(progress.seconds)}")
    return _result(job.run, written)


def _result(run: RunFolder, written: dict[str, Any]) -> RunResult:
    """From results.json; before there was a schema, a run knew of no test split."""
    steps, best_step = written["steps"], written["best_step"]
    test = written.get("test", {})
    return RunResult(run.path, steps, best_step, written["before"], written["last"], written["best"], test)


def _say_what_was_mended(job: Job) -> None:
    mended = sum(kept.mended() for kept in _kept(job))
    if mended:
        job.console.warn(f"data.cache: {counted(mended, 'damaged picture')} decoded again; is the disk sound?")


def _kept(job: Job) -> list[Decoded]:
    """The decoded pictures on disk, of training and of validation, where there are."""
    pictures = job.feed.pictures if isinstance(job.feed, FromDisk) else None
    return [kept for kept in (pictures.kept if isinstance(pictures, Pictures) else None, job.reading.kept) if kept]


@contextmanager
def _journal(job: Job, progress: Progress) -> Iterator[journal.Journal | None]:
    """The run's journal in the first process, with the start's validation in it; None in the others."""
    if not job.world.first:
        yield None
        return
    book = journal.Journal(job.run.losses, job.run.path, job.config.track.to, progress.step)
    try:
        if progress.step == 0:
            book.validation(0, progress.before, progress.kept.get("before"))
        yield book
    finally:
        book.close()


def _due(step: int, every: int, steps: int) -> bool:
    return step % every == 0 or step == steps


def _ks(scored: Scores) -> list[int]:
    return [int(k) for key in scored["chance"] if (k := key.removeprefix("hit@")).isdigit()]
