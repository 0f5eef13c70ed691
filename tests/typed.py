"""A command typed in this process, and how it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cytoclip.errors import ExitCode


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def refused(outcome: Outcome, code: ExitCode = ExitCode.USAGE) -> tuple[str, str]:
    """Nothing on stdout, one `error:` and one `hint:` line on stderr, and the exit code."""
    lines = outcome.err.splitlines()
    assert (outcome.code, outcome.out, len(lines)) == (int(code), "", 2), outcome
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert len(lines[0]) > len("error: ")
    return lines[0].removeprefix("error: "), lines[1].removeprefix("hint: ")
