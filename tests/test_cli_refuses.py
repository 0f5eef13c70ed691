"""Command lines that are wrong in themselves: two lines on stderr, which name what was probably meant."""

from __future__ import annotations

import re

import pytest

from tests.typed import Run, refused


def test_the_nearest_value_of_an_option_is_named(run: Run) -> None:
    wrong = [run("export", "model", "--to", "x", "--format", word) for word in ("sentence_transformers", "xyz")]
    hints = [refused(outcome)[1] for outcome in wrong]
    assert hints[0] == "did you mean sentence-transformers? cytoclip export --help says what it takes"
    assert hints[1] == "cytoclip export --help says what it takes"


@pytest.mark.parametrize(("word", "meant"), [("fp32", "no"), ("float16", "fp16"), ("bf61", "bf16"), ("bananas", None)])
def test_a_precision_that_is_none_is_refused_by_its_nearest(run: Run, word: str, meant: str | None) -> None:
    message, hint = refused(run("index", "model", "pics", "--to", "x", "--precision", word))
    assert f"'{word}' is not one of 'no', 'bf16', 'fp16', 'auto'" in message
    assert hint.startswith(f"did you mean {meant}? " if meant else "cytoclip index --help")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--config", "the YAML stands without an option before it; "),
        ("--batch-size", "options of a run are written train.batch_size=value, and `cytoclip config` lists them; "),
        ("--train.steps=3", "options of a run are written train.steps=value, and `cytoclip config` lists them; "),
        ("--xyz", "options of a run are written section.key=value, and `cytoclip config` lists them; "),
    ],
)
def test_who_types_a_runs_options_as_elsewhere_is_told_how_they_are_written(run: Run, typed: str, said: str) -> None:
    for command in ("train", "tune"):
        _, hint = refused(run(command, "my.yaml", typed, "3"))
        assert hint == f"{said}cytoclip {command} --help says what it takes"
    assert refused(run("tune", "my.yaml", "--trails", "3"))[1] == "cytoclip tune --help says what it takes"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "'trian'"),
        (["--foo"], "--foo"),
        (["train"], "config"),
        (["train", "x.yaml", "--foo"], "--foo"),
        (["evaluate", "model", "root", "--ks"], "--ks"),
        (["evaluate", "model", "root", "--batch-size", "0"], "--batch-size"),
        (["demo", "--seed", "x"], "--seed"),
        (["soup"], "run"),
        (["soup", "runs/x", "--keep-at-least", "1.5"], "--keep-at-least"),
    ],
)
def test_a_wrong_command_line_is_two_lines(run: Run, words: list[str], said: str) -> None:
    message, hint = refused(run(*words))
    assert said in message
    assert re.search(r"(^|lists them; )cytoclip( train| evaluate| demo| soup)? --help says", hint)


def test_a_misspelt_command_names_the_nearest(run: Run) -> None:
    assert "Did you mean 'train'" in refused(run("trian"))[0]
