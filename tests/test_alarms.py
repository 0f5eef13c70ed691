"""Each alarm rings on what it is for, and is silent on a run that learns (traps 1 and 37)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cytoclip import alarms, pictures, training
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.data_options import Augment, Data

Experiment = Callable[..., Config]


def test_a_loss_that_stays_at_ln_batch() -> None:
    stuck = [math.log(64) + 0.01 * (-1) ** i for i in range(100)]
    assert "stays at ln(batch)" in (alarms.flat_loss(stuck, math.log(64), "ln(batch)") or "")
    assert alarms.flat_loss(stuck[:99], math.log(64), "ln(batch)") is None
    assert alarms.flat_loss([*stuck, *[3.9] * 50], math.log(64), "ln(batch)") is None
    assert alarms.flat_loss([6.0] * 100, math.log(64), "ln(batch)") is not None, "above ln(batch) is no better"


@pytest.mark.parametrize(("hits", "rings"), [((1, 10), True), ((3, 12), True), ((4, 10), False), ((1, 30), False)])
def test_hits_within_three_deviations_of_chance(hits: tuple[int, int], rings: bool) -> None:
    """Of 100 pairs: chance is 1 and 10 of them, three deviations above it 3.98 and 19."""
    measured = {"hit@1": hits[0] / 100, "hit@10": hits[1] / 100, "hit@1_groups": 0.9, "hit@10_groups": 0.9}
    chance = {"hit@1": 0.01, "hit@10": 0.1, "hit@1_groups": 0.01, "hit@10_groups": 0.1}
    scored = {"pairs": 100, "image_to_text": measured, "chance": chance}
    assert (alarms.at_chance(scored) is not None) == rings


def test_pictures_divided_by_255_twice() -> None:
    """Trap 1: noise over the whole range, once divided, has contrast; twice divided it has none."""
    noise = torch.rand(4, 3, 8, 8)
    assert alarms.no_contrast((noise - 0.48) / 0.27) is None
    assert "nearly no contrast" in (alarms.no_contrast((noise / 255 - 0.48) / 0.27) or "")


def test_a_run_rings_once_each_and_only_where_it_should(
    root: Path, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarms, "WINDOW", 3)
    for split in ("train", "val"):
        (tmp_path / "grey" / split / "imgs").mkdir(parents=True)
        for file in (root / split / "imgs").iterdir():
            Image.new("RGB", (40, 40), (90, 90, 90)).save(tmp_path / "grey" / split / "imgs" / file.name)
        listed = (root / split / "img_text_pair.json").read_text()
        (tmp_path / "grey" / split / "img_text_pair.json").write_text(listed)
    steps = {"steps": 12, "learning_rate": 1e-9, "warmup_steps": 0}
    grey = experiment(data={"root": str(tmp_path / "grey")}, train=steps, validate={"every": 6, "ks": [1]})
    training.fit(grey, Console())
    said = (Path(grey.output) / "train.log").read_text()
    assert said.count("nearly no contrast") == 1
    assert said.count("no better than chance") == 2  # once a validation
    assert said.count("stays at ln(batch)") == 1
    assert said.count(", as before training\n") == 1
    assert "the best so far" not in said, "no score moved"
    monkeypatch.undo()
    well = experiment(train={"steps": 12, "learning_rate": 3e-3}, output=str(tmp_path / "well"))
    training.fit(well, Console())
    said = (tmp_path / "well" / "train.log").read_text()
    assert "contrast" not in said
    assert "stays at" not in said
    assert "the best so far" in said


def said(shares: list[float], first: int = 0, workers: int = 64, **options: Any) -> list[tuple[int, str]]:
    """(step, line) of all that is said."""
    waiting = alarms.Waiting(Data(root="x", **options), workers, first)
    lines = [waiting.line(share) for share in shares]
    return [(step, line) for step, line in enumerate(lines) if line]


def test_waiting_for_pictures_is_said_once_with_what_mends_it() -> None:
    ((step, line),) = said([0.2] * 300)
    assert step == 49
    assert line == (
        "20% of the time of the last 50 steps was spent waiting for pictures; set data.cache=true: each is decoded once"
    )
    assert said([0.2] * 300, first=30)[0][0] == 79
    assert "or raise data.workers, which is 0" in said([0.2] * 50, workers=0)[0][1]
    augment = Augment(preset="microscopy")
    assert "or set data.reduced_decode=true" in said([0.2] * 50, augment=augment)[0][1]
    assert "reduced_decode" not in said([0.2] * 50, augment=augment, reduced_decode=True)[0][1]
    kept = said([0.2] * 50, workers=0, cache=True, augment=augment)[0][1]
    assert kept == "20% of the time of the last 50 steps was spent waiting for pictures: the disk gives no more"


def test_a_tenth_of_the_time_or_one_long_wait_is_no_sign() -> None:
    assert said([0.1] * 300) == []
    assert said([1.0, 1.0, *[0.05] * 300]) == []
    assert said([0.05] * 200 + [0.3] * 50)[0][0] > 205


def test_a_run_that_waits_says_so_unless_it_fills_its_cache(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = pictures.prepare

    def slow(*given: Any, **named: Any) -> Any:
        time.sleep(0.01)
        return prepare(*given, **named)

    monkeypatch.setattr(alarms, "WINDOW", 2)
    monkeypatch.setattr(pictures, "prepare", slow)
    for name, options, steps, expected in (
        ("slow", {}, 4, 1),
        ("warming up", {}, 3, 0),
        ("filling", {"cache": True}, 4, 0),
    ):
        output = tmp_path / name
        training.fit(experiment(data=options, train={"steps": steps, "warmup_steps": 2}, output=str(output)), Console())
        log = (output / "train.log").read_text()
        assert log.count("was spent waiting for pictures; set data.cache=true") == expected, name
        assert log.count("waiting for pictures") == expected, name
