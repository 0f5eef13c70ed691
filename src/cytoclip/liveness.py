"""A process of a run that dies ends the others, with a message, on any backend.

gloo notices a lost connection at once. NCCL waits for its timeout, which is a day (`device.start`), and no backend
notices a process that is there but does nothing. So each process tells the others that it lives, over a connection
that the training does not use, and ends itself where another has been silent for too long.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

from cytoclip.console import fail
from cytoclip.device import World
from cytoclip.errors import ExitCode, Stopped, UserError

BEAT = 5.0  # seconds between two signs of life
SILENT = 45.0  # seconds without one after which a process counts as dead
_DONE = "done"
# What gloo and torch's store say of a connection whose other end went away.
_LOST = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "failed to recv", "failed to send")


@contextmanager
def watched(world: World) -> Iterator[None]:
    """While inside, a process that dies or hangs ends all of them within a minute.

    Where it is noticed in a collective call, as `UserError`; where this process waits in a call that does not come
    back, with the same two lines and the same exit code.

    Raises
    ------
    UserError
        For a process that ended, or that cannot be reached at all.
    """
    if world.size == 1:
        yield
        return
    try:
        watch = _Watch(world)
        try:
            yield
        except Stopped:  # all processes stop after the same step
            watch.finish()
            raise
        finally:
            watch.leave()
        watch.finish()
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise ended() from None


def is_lost(error: BaseException) -> bool:
    """Whether a collective call failed because another process is no longer there."""
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST)


def ended(which: str = "another process of this run") -> UserError:
    """What is said where another process ended; each machine's own first process need not be the one to notice."""
    error = UserError(
        f"{which} ended or does not answer, so this one ends too",
        "its own message says why; the same command goes on from the last checkpoint",
        ExitCode.SYSTEM,
    )
    error.everywhere = False
    return error


class _Watch:
    """Two threads: one says that this process lives and asks the others, one looks at the clock.

    The first may block for long in a dead connection, so it is the second that decides.
    """

    def __init__(self, world: World) -> None:
        self._own, self._others = str(world.rank), [str(rank) for rank in range(world.size) if rank != world.rank]
        self._store = _meet(world)
        self._seen = dict.fromkeys(self._others, time.monotonic())
        self._done: set[str] = set()
        self._leaving = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()
        threading.Thread(target=self._look, daemon=True).start()

    def leave(self) -> None:
        """Stop watching; without `finish` the others take it for a death, and are right."""
        self._leaving.set()

    def finish(self) -> None:
        """Tell the others that this end is a good one. The first process, whose store it is, waits to hear theirs."""
        self.leave()
        self._beats.join(SILENT)
        try:
            self._store.set(self._own, _DONE)
            until = time.monotonic() + SILENT
            while self._own == "0" and len(self._done) < len(self._others) and time.monotonic() < until:
                self._ask({})
                time.sleep(BEAT / 50)
        except RuntimeError:  # the training is done and saved; whoever is gone needs nothing any more
            return

    def _beat(self) -> None:
        said: dict[str, bytes] = {}
        for count in itertools.count():
            with suppress(RuntimeError):  # it counts as silence
                self._store.set(self._own, str(count))
                self._ask(said)
            if self._leaving.wait(BEAT):
                return

    def _ask(self, said: dict[str, bytes]) -> None:
        for rank, says in zip(self._others, self._store.multi_get(self._others), strict=True):
            if says == _DONE.encode():
                self._done.add(rank)
            if says != said.get(rank):
                self._seen[rank] = time.monotonic()
            said[rank] = says

    def _look(self) -> None:
        looked = time.monotonic()
        while not self._leaving.wait(BEAT / 5):
            now = time.monotonic()
            if now - looked > SILENT / 3:  # this process itself was stopped: it has heard nobody, which says nothing
                self._seen = dict.fromkeys(self._others, now)
            looked = now
            silent = [rank for rank in self._others if rank not in self._done and now - self._seen[rank] > SILENT]
            if silent:
                # One that hosts the store takes all others' signs of life with it.
                fail(ended(f"process {silent[0]} of this run").lines())
                os._exit(int(ExitCode.SYSTEM))


def _meet(world: World) -> TCPStore:
    """A store of its own, which the first process hosts on a free port."""
    within = timedelta(seconds=max(SILENT * 2 / 3, 1))
    store = TCPStore("localhost", 0, is_master=True, timeout=within, wait_for_workers=False) if world.first else None
    port = world.once(lambda: store.port if store else 0)
    if store:
        return store
    host = os.environ.get("MASTER_ADDR", "localhost")
    try:
        return TCPStore(host, port, is_master=False, timeout=within)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"process {world.rank} cannot reach the first one at {host}, port {port}: {reason}",
            "let the machines of a run reach each other on all ports, and set MASTER_ADDR to a name all of them know",
            ExitCode.SYSTEM,
        ) from None
