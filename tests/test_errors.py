"""What is wrong is said in two lines, survives a process boundary, and names the nearest right thing."""

from __future__ import annotations

import pickle

import pytest

from cytoclip.errors import ExitCode, UserError, first_few, nearest


def test_a_user_error_is_one_error_line_and_one_hint_line() -> None:
    assert UserError("no such file: x", "give a file").lines() == "error: no such file: x\nhint: give a file"


def test_line_breaks_in_a_library_message_do_not_make_more_lines() -> None:
    """Hugging Face and torch write paragraphs; scripts that read stderr count on two lines."""
    found = UserError("cannot open:\nfirst\r\nsecond", "do this\nor that").lines()
    assert found.split("\n") == ["error: cannot open: first second", "hint: do this or that"]


def test_a_user_error_crosses_processes_whole() -> None:
    """Loader workers and other ranks send exceptions by pickle, which loses keyword-only state by default."""
    came = pickle.loads(pickle.dumps(UserError("m", "h", ExitCode.DATA)))  # noqa: S301 - our own bytes
    assert (came.message, came.hint, came.code, str(came)) == ("m", "h", ExitCode.DATA, "m")


def test_a_user_error_is_a_usage_error_unless_said_otherwise() -> None:
    assert UserError("m", "h").code is ExitCode.USAGE


def test_exit_codes_are_a_promise() -> None:
    """Scripts branch on these numbers: a change here is a change for every user."""
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0, "INTERNAL": 1, "USAGE": 2, "FINDINGS": 3, "DATA": 4, "MODEL": 5, "RUN": 6, "SYSTEM": 7, "DIVERGED": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("stpes", ["batch_size", "steps"], "steps"),
        ("lr", ["lora", "learning_rate"], "learning_rate"),  # spelling alone would say lora
        ("bs", ["steps", "batch_size"], "batch_size"),
        ("d", ["data"], None),  # one initial of one word says nothing
        ("zzz", ["steps", "epochs"], None),
        ("", ["steps"], None),
        ("steps", [], None),
    ],
)
def test_nearest(word: str, known: list[str], expected: str | None) -> None:
    assert nearest(word, known) == expected


def test_nearest_takes_a_generator() -> None:
    """It looks through the names twice, and a generator is used up after once."""
    assert nearest("trian", (name for name in ("train", "val"))) == "train"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a"], "a"),
        (["a", "b", "c"], "a, b, c"),
        (["a", "b", "c", "d"], "a, b, c and 1 more"),
        ([str(i) for i in range(1000)], "0, 1, 2 and 997 more"),
    ],
)
def test_first_few_counts_what_it_leaves_out(names: list[str], expected: str) -> None:
    assert first_few(names) == expected
