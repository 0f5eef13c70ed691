"""A run and a measurement from Python are those of the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cytoclip
from cytoclip import config, training
from cytoclip.config import Config
from cytoclip.errors import UserError
from tests.typed import Run

Done = tuple[Config, training.RunResult]


@pytest.fixture
def given(root: Path, base: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "data": {"root": str(root), "workers": 0},
        "model": {"name": str(base)},
        "train": {"steps": 2, "batch_size": 12, "precision": "no"},
        "validate": {"every": 100, "ks": [1, 5]},
        "track": {"to": []},
        "output": str(tmp_path / "run"),
    }


def test_train_takes_mappings_a_file_and_a_config(given: dict[str, Any], tmp_path: Path) -> None:
    first = cytoclip.train(given, "train.seed=3", quiet=True)
    assert first.steps == 2
    assert first.run == tmp_path / "run"
    written = tmp_path / "experiment.yaml"
    written.write_text(json.dumps(given))  # JSON is YAML
    assert cytoclip.train(written, "train.seed=3", quiet=True).last == first.last, "the finished run's result"
    wanted = cytoclip.config.load(first.run / "config.yaml")  # type: ignore[attr-defined]
    assert wanted.train.seed == 3
    assert cytoclip.train(wanted, f"output={tmp_path / 'again'}", quiet=True).last == first.last


def test_a_path_in_a_mapping_is_its_name(given: dict[str, Any]) -> None:
    named = {**given, "output": Path(given["output"]), "data": {**given["data"], "root": Path(given["data"]["root"])}}
    named["data"]["replay"] = [{"root": Path("more"), "weight": 0.5}]
    given["data"]["replay"] = [{"root": "more", "weight": 0.5}]
    assert config.made(named) == config.made(given)


@pytest.mark.parametrize(
    ("wrong", "overrides", "said"),
    [
        ({"trian": {}}, [], "trian"),
        ({}, ["train.stesp=3"], "train.stesp"),
        ({}, ["nonsense"], "nonsense"),
        ({"output": object()}, [], "the experiment cannot be read"),
    ],
)
def test_a_wrong_experiment_is_said(
    given: dict[str, Any], wrong: dict[str, Any], overrides: list[str], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        cytoclip.train({**given, **wrong}, *overrides)
    assert said in caught.value.message


def test_evaluate_is_the_command(done: Done, root: Path, run: Run) -> None:
    folder = done[1].run
    compared = cytoclip.evaluate(folder, root, ks=[1, 5], quiet=True)
    outcome = run("evaluate", str(folder), str(root), "--ks", "1", "5", "--json")
    assert compared.document("val") == json.loads(outcome.out)
    assert list(compared.columns()) == ["base", str(folder)]
    assert list(cytoclip.evaluate([folder], root, ks=[1], base="none", quiet=True).columns()) == [str(folder)]


@pytest.mark.parametrize(
    ("models", "more", "said"),
    [
        ([], {}, "models is empty"),
        ("x", {"ks": 0}, "ks=0 is no whole number from 1"),
        ("x", {"ks": []}, r"ks=\[\] is no"),
        ("x", {"ks": [1, 2.5]}, r"ks=\[1, 2.5\] is no"),
        ("x", {"batch_size": 0}, "batch_size=0 is no"),
    ],
)
def test_evaluate_refuses_what_asks_nothing(models: Any, more: dict[str, Any], said: str, root: Path) -> None:
    with pytest.raises(UserError, match=said):
        cytoclip.evaluate(models, root, **more)


def test_what_was_compared_shows_as_its_table(base: Path, root: Path) -> None:
    one = cytoclip.evaluate(base, root, ks=5, quiet=True)
    assert repr(one) == one.text([5])
    assert "hit@5" in repr(one)
    assert repr(cytoclip.evaluate(base, root, ks=[1, 10], quiet=True)).count("hit@") >= 2


def test_quiet_says_nothing(done: Done, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cytoclip.evaluate(done[1].run, root, ks=[1], quiet=True)
    assert capsys.readouterr() == ("", "")
    cytoclip.evaluate(done[1].run, root, ks=[1])
    assert "20 pairs" in capsys.readouterr().err
