"""What a user is told when something is wrong, and the exit code that goes with it."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable
from enum import IntEnum
from itertools import islice
from pathlib import Path


class ExitCode(IntEnum):
    """Every exit code of every command. Signals end a process with 128 + their number, as shells do."""

    OK = 0
    INTERNAL = 1  # a bug: the only case with a traceback
    USAGE = 2  # a wrong command line or a wrong option
    FINDINGS = 3  # a check found something that needs a hand
    DATA = 4  # the pairs cannot be used as they are
    MODEL = 5  # the checkpoint cannot be used
    RUN = 6  # the run folder cannot be used
    SYSTEM = 7  # disk, memory, device or launcher
    DIVERGED = 8  # a loss or gradient that is not finite


class UserError(Exception):
    """Something that the user can mend: printed as one `error:` and one `hint:` line, without a traceback.

    Parameters
    ----------
    message
        Names the value and the place; no full stop.
    hint
        The nearest right thing to do; no full stop.
    code
        The exit code of the process.

    Attributes
    ----------
    everywhere
        Whether all processes of a run meet it; then only the first on each machine says so.
    """

    everywhere = True

    def __init__(self, message: str, hint: str, code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, ExitCode]]:
        return type(self), (self.message, self.hint, self.code)  # crosses processes whole

    def lines(self) -> str:
        """Two lines, whatever a library put into the message."""
        error, hint = (" ".join(text.splitlines()) for text in (self.message, self.hint))
        return f"error: {error}\nhint: {hint}"


class Stopped(Exception):  # noqa: N818 - it is no error
    """A run that was asked to stop by signal `number`, after it saved step `step`; a search, after trial `step`."""

    def __init__(self, number: int, step: int, what: str = "step") -> None:
        by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {by} after {what} {step}, which is saved; the same command goes on")
        self.number = number


_ELSEWHERE = {"float32": "no", "fp32": "no", "float16": "fp16", "half": "fp16", "bfloat16": "bf16", "gpu": "cuda"}
_SHOWN = 80  # characters of a value in a message


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` most likely means: by what other programs call it, by initials (`lr` for
    `learning_rate`), else by spelling.
    """
    names = list(known)
    if _ELSEWHERE.get(word) in names:
        return _ELSEWHERE[word]
    for name in names:
        if "_" in name and word == "".join(part[0] for part in name.split("_") if part):
            return name
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return close[0] if close else None


def neighbour(place: Path) -> Path | None:
    """What lies beside a place that is not there, under the name nearest to its own; None for one that is there."""
    try:
        if place.exists():
            return None
        near = nearest(place.name, [other.name for other in islice(place.parent.iterdir(), 10_000)])
    except (OSError, ValueError):  # no folder either, or no path at all
        return None
    return place.parent / near if near else None


def suggested(place: Path, otherwise: str) -> str:
    """The hint for a place that is not there: its neighbour, or `otherwise`."""
    near = neighbour(place)
    return f"did you mean {near}?" if near else otherwise


def counted(number: int, one: str, several: str = "") -> str:
    """`1 caption`, `3 captions`, `2 processes`."""
    return f"{number} {one if number == 1 else several or one + 's'}"


def first_few(names: list[str], few: int = 3) -> str:
    """`a, b, c and 7 more`: enough to find the fault, never a screenful."""
    shown = ", ".join(names[:few])
    rest = len(names) - few
    return f"{shown} and {rest} more" if rest > 0 else shown


def shown(value: object) -> str:
    """A value short enough for a message, and on one line, whatever it holds."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}…"


def first_line(error: BaseException) -> str:
    """What another library's error says, shortly; its name, where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
