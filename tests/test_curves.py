"""Which curves a run has, and what stands beside them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cytoclip import curves, record


@pytest.fixture(scope="module")
def read(told: Path) -> record.Record:
    return record.read(told)


def titles(read: record.Record) -> list[str]:
    return [chart.title for chart in curves.drawn(read, "hit@10")]


def test_every_curve_of_a_whole_run(read: record.Record) -> None:
    assert titles(read) == [
        "validation, image → text", "validation, text → image", "hit@10 (%) here and on the data to keep",
        "the trade: hit@10 (%) here, over that on the data to keep", "loss", "hit@1 in the batch", "learning rate",
        "temperature, exp(−logit scale)", "pairs a second",
    ]  # fmt: skip


def test_none_of_an_old_one(read: record.Record) -> None:
    assert titles(replace(read, losses={}, curves={}, validations=[])) == []
    assert titles(replace(read, curves={}, validations=[])) == [
        "loss",
        "learning rate",
        "temperature, exp(−logit scale)",
    ]


def test_validations_are_in_percent_beside_chance(read: record.Record) -> None:
    chart = curves.drawn(read, "hit@10")[0]
    assert chart.key == ("hit@1 (%)", "hit@10 (%)")
    last = read.validations[-1]["val"]["image_to_text"]
    assert chart.rows[-1] == ("40", f"{100 * last['hit@1']:.4g}", f"{100 * last['hit@10']:.4g}")
    assert "chance of hit@10 50</text>" in chart.svg
    by_group = curves.drawn(read, "hit@10_groups")[0]
    assert by_group.key == ("hit@1 by group (%)", "hit@10 by group (%)")


def test_the_loss_stands_between_knowing_nothing_and_its_floor(read: record.Record) -> None:
    with_floor = replace(read, results={**read.results, "floor": 0.4})
    (chart,) = (chart for chart in curves.drawn(with_floor, "hit@10") if chart.title == "loss")
    assert f"knowing nothing {math.log(16):.4g}" in chart.svg
    assert "floor 0.4" in chart.svg
    (guessed,) = (chart for chart in curves.drawn(replace(read, curves={}), "hit@10") if chart.title == "loss")
    assert f"knowing nothing {math.log(16):.4g}" in guessed.svg


def test_the_trade_is_the_mean_of_both_directions(read: record.Record) -> None:
    (chart,) = (chart for chart in curves.drawn(read, "hit@10") if chart.title.startswith("the trade"))
    first = read.validations[0]
    means = [50 * sum(first[name][side]["hit@10"] for side in ("image_to_text", "text_to_image"))
             for name in ("keep", "val")]  # fmt: skip
    assert chart.rows[0] == tuple(f"{mean:.4g}" for mean in means)
    assert len(chart.rows) == 5


def test_a_soup_is_drawn_over_alpha(read: record.Record) -> None:
    mixed = [{"alpha": share, "val": row["val"], "keep": row["keep"]}
             for share, row in zip((1.0, 0.5, 0.0), read.validations, strict=False)]  # fmt: skip
    soup = {"chosen": "alpha 0.5", "mixtures": [*mixed, {"steps": [1, 2], "val": read.validations[0]["val"]}]}
    chart = curves.drawn(replace(read, soup=soup), "hit@10")[-1]
    assert chart.title.startswith("soup")
    assert [row[0] for row in chart.rows] == ["0", "0.5", "1"]
    assert chart.key == ("this data", "what is kept")
    assert len(titles(replace(read, soup={"mixtures": []}))) == 9


def test_two_hundred_thousand_steps_stay_small(read: record.Record) -> None:
    steps = np.arange(1.0, 200_001)
    noise = np.random.default_rng(0).normal(size=200_000)
    long = replace(
        read,
        losses={"step": steps, "loss": noise, "lr": noise, "logit_scale": noise},
        curves={"step": steps, "hit_at_1": noise, "pairs_per_second": noise, "chance_loss": noise},
    )
    assert sum(len(chart.svg) for chart in curves.drawn(long, "hit@10")) < 60_000
