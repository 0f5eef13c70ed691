"""Trials of a search, each an ordinary run: one after the other in this process, or several at once in their own."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from cytoclip import selection, signals, training
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.errors import ExitCode, Stopped, UserError
from cytoclip.report import Scores

_LOOK = 0.5  # seconds between two looks for a signal


@dataclass(frozen=True)
class Trial:
    """One run that is asked for; `number` is its name among the others."""

    number: int
    wanted: Config


@dataclass(frozen=True)
class Ending:
    """What became of a trial.

    Parameters
    ----------
    score
        Of its best validation, where it finished.
    failed
        Why it did not; None where it finished, or was ended because it was worse than others.
    """

    score: float | None = None
    failed: UserError | None = None


@dataclass(frozen=True)
class Heard:
    """Who hears of the trials: `validated` says whether that trial shall end there."""

    validated: Callable[[int, int, float], bool]
    ended: Callable[[int, Ending], None]


def one_by_one(trials: Iterator[Trial], heard: Heard) -> None:
    """Carry out trials in this process, each when the one before it has been heard of.

    Raises
    ------
    Stopped
        A signal came; the trial in hand has saved its last step, and is not heard of.
    """
    for trial in trials:
        heard.ended(trial.number, _run(trial, heard.validated))


def at_once(trials: Iterator[Trial], jobs: int, heard: Heard) -> None:
    """Carry out trials in `jobs` processes; one that dies is a failed trial, and another takes its place.

    On several GPUs the processes take turns.

    Raises
    ------
    Stopped
        A signal came; every trial in hand has saved its last step, and is not heard of.
    """
    with _workers(jobs) as workers, signals.heard() as asked_to_stop:
        while True:
            for worker in workers:
                if worker.trial is None and not worker.give(next(trials, None)):
                    break
            busy = {worker.conn: worker for worker in workers if worker.trial}
            if not busy:
                return
            for conn in wait(list(busy), timeout=_LOOK):
                _hear(busy[conn], heard)
            stopped = asked_to_stop()
            if stopped:
                raise Stopped(stopped, _stop(list(busy.values()), heard), "trial")


class Ended(Exception):  # noqa: N818 - it is no error
    """A trial that shall not go on."""


@dataclass
class _Worker:
    """A process that runs one trial after the other, and the trial that it has in hand."""

    number: int
    jobs: int
    trial: Trial | None = None
    process: Any = field(init=False)
    conn: Any = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.conn, theirs = multiprocessing.Pipe()
        spawning = multiprocessing.get_context("spawn")
        self.process = spawning.Process(target=_serve, args=(theirs, self.number, self.jobs))
        self.process.start()
        theirs.close()

    def give(self, trial: Trial | None) -> bool:
        """Hand it a trial; False where there is none."""
        if trial is not None:
            self.trial = trial
            with suppress(OSError):  # where it has died meanwhile, the next look finds it
                self.conn.send(trial)
        return trial is not None

    def died(self) -> UserError:
        """Another process takes its place, and why that was."""
        self.process.join()
        code = self.process.exitcode
        self.start()
        by = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        return UserError(
            f"its process ended {by}", "if memory ran out, take fewer --jobs or a smaller batch", ExitCode.SYSTEM
        )


@contextmanager
def _workers(jobs: int) -> Iterator[list[_Worker]]:
    workers = [_Worker(number, jobs) for number in range(jobs)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.conn.close()  # it ends when it next asks or says something
            worker.process.join(timeout=10)
            if worker.process.is_alive():
                worker.process.kill()


def _hear(worker: _Worker, heard: Heard) -> None:
    assert worker.trial  # noqa: S101 - it is busy
    number = worker.trial.number
    try:
        said = worker.conn.recv()
    except (EOFError, OSError):
        worker.trial = None
        heard.ended(number, Ending(failed=worker.died()))
        return
    if isinstance(said, Ending):
        worker.trial = None
        heard.ended(number, said)
        return
    verdict = heard.validated(number, *said)
    with suppress(OSError):  # where it has died meanwhile, the next look finds it
        worker.conn.send(verdict)


def _stop(busy: list[_Worker], heard: Heard) -> int:
    """Each saves its step and ends; what finishes meanwhile counts. The last trial that was in hand."""
    for worker in busy:
        with suppress(ProcessLookupError):
            os.kill(worker.process.pid, signal.SIGTERM)
    for worker in busy:
        assert worker.trial  # noqa: S101 - it is busy
        with suppress(EOFError, OSError):
            while not isinstance(said := worker.conn.recv(), Ending):
                worker.conn.send(heard.validated(worker.trial.number, *said))
            heard.ended(worker.trial.number, said)
    return max(worker.trial.number for worker in busy if worker.trial)


def _serve(conn: Connection, number: int, jobs: int) -> None:
    """What a process of `at_once` does until its parent lets go of it."""
    if hasattr(os, "setsid"):
        os.setsid()  # a Ctrl-C comes once, through the parent
    _take_place(number, jobs)

    def validated(_: int, step: int, score: float) -> bool:
        conn.send((step, score))
        return bool(conn.recv())  # EOFError where the parent is gone: the run ends

    with suppress(EOFError, OSError, Stopped, KeyboardInterrupt):
        while True:
            conn.send(_run(conn.recv(), validated))


def _take_place(number: int, jobs: int) -> None:
    """Its share of the cores, and one of the GPUs."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = listed.split(",") if listed else [str(i) for i in range(torch.cuda.device_count())]
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]  # nothing has asked CUDA for more yet


def _run(trial: Trial, validated: Callable[[int, int, float], bool]) -> Ending:
    by = trial.wanted.validation.select_by

    def watch(step: int, scored: Scores) -> None:
        if validated(trial.number, step, selection.score(scored, by)):
            raise Ended

    try:
        return Ending(selection.score(training.fit(trial.wanted, Console(shown=False), watch).best, by))
    except Ended:
        return Ending()
    except UserError as error:
        return Ending(failed=error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        return Ending(failed=UserError(f"no memory left: {reason}", "take a smaller batch", ExitCode.SYSTEM))
    finally:
        gc.collect()  # an encoder and the hook in its tower hold each other
        torch.cuda.empty_cache()  # does nothing where there is no GPU
