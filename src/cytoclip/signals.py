"""Signals that ask a run to stop: the step in hand is finished and saved first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# What a terminal, a scheduler and Slurm's `--signal` send. Windows has no USR1.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


@contextmanager
def heard() -> Iterator[Callable[[], int]]:
    """While inside, note the first of `SIGNALS` instead of dying of it; the second one acts as it always does.

    Yields what to ask after each step: the number of the signal, or 0. A process whose launcher died counts as
    terminated, since launchers leave their children running (accelerate launch on a signal, torchrun on USR1).
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: 0
        return
    noted: list[int] = []

    def note(number: int, _: Any) -> None:
        if noted:
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)
        noted.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    parent = os.getppid() if _launched() else None
    try:
        yield lambda: noted[0] if noted else signal.SIGTERM * (parent is not None and os.getppid() != parent)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_loader(_: int) -> None:
    """The handlers of a loading process: it must not die before its trainer has saved.

    A terminal and a scheduler signal all processes at once. Only the trainer's own SIGTERM ends one, where the system
    says who sent it (Linux); should the trainer die, torch's loop sees it within seconds.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    if trainer is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_until_sent_by, args=(trainer.pid,), daemon=True).start()


def _until_sent_by(trainer: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def _launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
