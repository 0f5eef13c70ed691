"""The terminal as one object: lines and progress on stderr, results on stdout, everything also in the log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from cytoclip.files import disk_errors

PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal to draw a bar on


class Console:
    """What a command says while it works.

    Parameters
    ----------
    quiet
        Say nothing: what every process but the first one does.
    shown
        False: what is said goes into the log file only.
    """

    def __init__(self, quiet: bool = False, shown: bool = True) -> None:
        self._quiet = quiet
        self._shown = shown
        self._terminal = Terminal(stderr=True, highlight=False, soft_wrap=True)
        self._log: Path | None = None

    def log_to(self, path: Path) -> None:
        """From now on, append every line to `path` too, with the time before it."""
        if not self._quiet:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._log = path

    def say(self, line: str) -> None:
        if self._quiet:
            return
        if self._shown:
            self._terminal.print(Text(line))
        self.record(line)

    def record(self, line: str) -> None:
        """Write a line into the log file only."""
        if self._log:
            with disk_errors(self._log), self._log.open("a", encoding="utf-8") as stream:
                stream.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")

    def warn(self, line: str) -> None:
        self.say(f"warning: {line}")

    def result(self, text: str) -> None:
        """Print data on stdout, as it is."""
        if not self._quiet:
            print(text, flush=True)

    @contextmanager
    def progress(self, title: str, total: int, start: int = 0) -> Iterator[Bar]:
        """A bar with the time left on a terminal, else a plain line every ten seconds."""
        if self._quiet or not self._shown or not self._terminal.is_terminal:
            yield Bar(self, title, total, start)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._terminal, transient=True) as drawn:
            task = drawn.add_task(title, total=total, completed=start, note="")
            yield Bar(self, title, total, start, drawn, task)


class Bar:
    """Progress of one piece of work; made by `Console.progress`."""

    def __init__(
        self,
        console: Console,
        title: str,
        total: int,
        done: int = 0,
        drawn: Progress | None = None,
        task: TaskID | None = None,
    ) -> None:
        self._console, self._title, self._total, self._done = console, title, total, done
        self._drawn, self._task = drawn, task
        self._began = self._said = time.monotonic()
        self._first = done

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` is what stands behind the bar."""
        self._done += count
        if self._drawn is not None and self._task is not None:
            self._drawn.update(self._task, advance=count, note=note)
        if time.monotonic() - self._said < PLAIN_SECONDS:
            return
        self._said = time.monotonic()
        left = (self._total - self._done) * (self._said - self._began) / max(self._done - self._first, 1)
        line = f"{self._title} {self._done}/{self._total}, {duration(left)} left{', ' if note else ''}{note}"
        (self._console.record if self._drawn else self._console.say)(line)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, indented by two: the first column to the left, all others to the right.

    Examples
    --------
    >>> aligned([["", "before"], ["hit@1", "0.1"]])
    ['         before', '  hit@1     0.1']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "".join(
            f"  {cell:>{width}}" if i else f"  {cell:<{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`.

    Examples
    --------
    >>> duration(3723.4), duration(123)
    ('1:02:03', '2:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Bytes in decimal units, three digits.

    Examples
    --------
    >>> size(512), size(1_234_567_890)
    ('512 B', '1.23 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def fail(lines: str) -> None:
    """The last words of a command, on stderr."""
    print(lines, file=sys.stderr, flush=True)
