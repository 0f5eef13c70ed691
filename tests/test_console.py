"""stdout is data and nothing else; stderr is everything else; the log file has all of it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console as Terminal

from cytoclip import console as module
from cytoclip.console import Console, duration, fail

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time that passes only when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_only_results_go_to_stdout(capsys: Captured) -> None:
    console = Console()
    console.say("working")
    console.warn("odd")
    console.result('{"a": 1}')
    fail("error: x\nhint: y")
    out, err = capsys.readouterr()
    assert out == '{"a": 1}\n'
    assert err == "working\nwarning: odd\nerror: x\nhint: y\n"


def test_lines_are_printed_as_they_are(capsys: Captured) -> None:
    """rich would take [0/5] for a markup tag, colour numbers, and break long lines at the width of the terminal."""
    line = "[bold]step[/bold] [0/5] :smile: " + "x" * 500
    Console().say(line)
    Console().result(line)
    out, err = capsys.readouterr()
    assert err == out == line + "\n"


def test_quiet_says_nothing_and_logs_nothing(capsys: Captured, tmp_path: Path, clock: Callable[[float], None]) -> None:
    """What every process but the first does: two processes must not write one log file."""
    console = Console(quiet=True)
    console.log_to(tmp_path / "run" / "log.txt")
    console.say("a")
    console.warn("b")
    console.result("c")
    console.record("d")
    with console.progress("train", 10) as bar:
        clock(60)
        bar.advance()
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_the_log_file_has_every_line_with_its_time(capsys: Captured, tmp_path: Path) -> None:
    path = tmp_path / "run" / "log.txt"
    console = Console()
    console.say("before the log")
    console.log_to(path)
    console.say("a cell 细胞")
    console.warn("b")
    console.record("only here")
    console.result("data")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in lines] == ["a cell 细胞", "warning: b", "only here"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d .*", line) for line in lines)
    assert "only here" not in capsys.readouterr().err


def test_a_second_run_appends_to_the_log(capsys: Captured, tmp_path: Path) -> None:
    for line in ("first", "resumed"):
        console = Console()
        console.log_to(tmp_path / "log.txt")
        console.say(line)
    assert [line[20:] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["first", "resumed"]


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(
    capsys: Captured, clock: Callable[[float], None]
) -> None:
    with Console().progress("train", 100) as bar:
        for _ in range(25):  # one second each
            clock(1)
            bar.advance(note="loss 2.1")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["train 10/100, 1:30 left, loss 2.1", "train 20/100, 1:20 left, loss 2.1"]


def test_the_time_left_of_a_resumed_run_counts_only_what_was_done_now(
    capsys: Captured, clock: Callable[[float], None]
) -> None:
    with Console().progress("train", 100, start=90) as bar:
        clock(20)
        bar.advance(2)
    assert capsys.readouterr().err == "train 92/100, 1:20 left\n"


def test_a_bar_that_has_not_advanced_has_no_division_by_zero(capsys: Captured, clock: Callable[[float], None]) -> None:
    with Console().progress("read", 10) as bar:
        clock(30)
        bar.advance(0)
    assert capsys.readouterr().err == "read 0/10, 5:00 left\n"


def test_on_a_terminal_the_bar_is_drawn_and_the_lines_go_to_the_log(
    capsys: Captured, clock: Callable[[float], None], tmp_path: Path
) -> None:
    console = Console()
    console._terminal = Terminal(stderr=True, force_terminal=True, width=100, highlight=False)
    console.log_to(tmp_path / "log.txt")
    with console.progress("train", 10) as bar:
        clock(11)
        bar.advance(3, "loss 2.1")
        assert bar._drawn is not None
        task = bar._drawn.tasks[0]
        assert (task.completed, task.total, task.fields["note"]) == (3, 10, "loss 2.1")
    out, err = capsys.readouterr()
    assert out == ""
    assert "train" in err
    assert " left, loss" not in err  # the plain line is for the log only
    assert (tmp_path / "log.txt").read_text()[20:] == "train 3/10, 0:26 left, loss 2.1\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (0.4, "0:00"), (9.6, "0:10"), (59.6, "1:00"), (123, "2:03"), (3599.7, "1:00:00"), (3723.4, "1:02:03"),
     (100 * 3600, "100:00:00")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_bars_may_stand_inside_one_another_on_a_terminal() -> None:
    """Validation draws its own bar while the training bar stands; rich before 14.1 raises there."""
    console = Console()
    console._terminal = Terminal(file=io.StringIO(), force_terminal=True)
    with console.progress("training", 2) as outer:
        outer.advance()
        with console.progress("embedding", 3) as inner:
            inner.advance(3)
        outer.advance()
