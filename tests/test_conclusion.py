"""The sentence says what the numbers say: rose, fell, within noise, at chance, not measured."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from cytoclip import conclusion
from cytoclip.conclusion import Judged


def scores(hit: float, groups: float | None = None, interval: tuple[float, float] | None = None) -> dict[str, Any]:
    one = {"hit@1": hit / 4, "hit@10": hit, "hit@1_groups": hit / 4, "hit@10_groups": hit if groups is None else groups,
           "median_rank": 3.0, "median_rank_groups": 3.0}  # fmt: skip
    chance = {"hit@1": 0.004, "hit@10": 0.04, "hit@1_groups": 0.004, "hit@10_groups": 0.04,
              "median_rank": 125.5, "median_rank_groups": 125.5}  # fmt: skip
    found = {"pairs": 250, "image_to_text": one, "text_to_image": dict(one), "chance": chance}
    if interval:
        both = {side: {"hit@10": list(interval), "hit@10_groups": list(interval)} for side in conclusion.DIRECTIONS}
        found["intervals"] = both
    return found


def change(by: float, low: float, high: float) -> dict[str, Any]:
    one = {"by": by, "interval": [low, high], "beyond_noise": not low <= 0 <= high}
    return {side: {"hit@10": one, "hit@10_groups": one} for side in conclusion.DIRECTIONS}


def said(before: float, best: float, interval: tuple[float, float] | None, told: dict[str, Any]) -> tuple[str, str]:
    one = Judged("val", scores(before), scores(best, interval=interval), told)
    found = conclusion.verdict(one)
    return found.text, found.colour


def stood(best: float, interval: tuple[float, float] | None, before: float | None = None, **told: Any) -> Any:
    held = None if before is None else scores(before)
    found = conclusion.standing(Judged("val", held, scores(best, interval=interval), told))
    return found.text.removeprefix("hit@10 (image → text, 250 pairs of val) is "), found.colour


def test_alone_a_model_stands_against_chance() -> None:
    assert stood(0.312, (0.289, 0.335)) == ("31.2 % [28.9, 33.5], better than chance (4.0 %).", "good")
    assert stood(0.05, (0.02, 0.08)) == ("5.0 % [2.0, 8.0], not shown to be better than chance (4.0 %).", "error")
    assert stood(0.5, None) == ("50.0 %, chance 4.0 %; whether that is beyond noise was not measured.", "warning")


def test_a_model_stands_against_its_base() -> None:
    against, of_chance = "31.2 % [28.9, 33.5] against {} of the base (chance 4.0 %)", (0.289, 0.335)
    text, colour = stood(0.312, of_chance, 0.3, **change(0.012, -0.01, 0.03))
    assert text.startswith(against.format("30.0 %") + ", a difference within noise (+1.2 [−1.0, +3.0]): neither")
    assert colour == "warning"
    text, colour = stood(0.312, of_chance, 0.2, **change(0.112, 0.1, 0.12))
    assert text == against.format("20.0 %") + ", beyond noise (+11.2 [+10.0, +12.0]): the model is the better one."
    assert colour == "good"
    text, colour = stood(0.312, of_chance, 0.5, **change(-0.188, -0.2, -0.1))
    assert text == against.format("50.0 %") + ", beyond noise (−18.8 [−20.0, −10.0]): the base is the better one."
    assert colour == "error"
    text, colour = stood(0.312, of_chance, 0.2, image_to_text={"hit@10": {"by": 0.1, "interval": None,
                                                                          "beyond_noise": False}})  # fmt: skip
    assert text == against.format("20.0 %") + "; whether that is beyond noise was not measured."
    assert colour == "warning"
    text, colour = stood(0.05, (0.02, 0.08), 0.04, **change(0.01, 0.005, 0.02))
    assert text.endswith("of the base (chance 4.0 %): the model is not shown to be better than chance.")
    assert colour == "error"


def test_it_rose() -> None:
    assert said(0.04, 0.312, (0.289, 0.335), change(0.272, 0.25, 0.3)) == (
        "hit@10 (image → text, 250 pairs of val) rose from 4.0 % (chance 4.0 %) to 31.2 % [28.9, 33.5].", "good",
    )  # fmt: skip


def test_it_fell() -> None:
    text, colour = said(0.4, 0.3, (0.27, 0.33), change(-0.1, -0.13, -0.07))
    assert text == (
        "hit@10 (image → text, 250 pairs of val) fell from 40.0 % (chance 4.0 %) to 30.0 % [27.0, 33.0]: "
        "the starting model is the better one."
    )
    assert colour == "error"


def test_within_noise() -> None:
    text, colour = said(0.3, 0.32, (0.29, 0.35), change(0.02, -0.01, 0.05))
    assert text == (
        "hit@10 (image → text, 250 pairs of val) went from 30.0 % (chance 4.0 %) to 32.0 % [29.0, 35.0], a difference "
        "within noise (+2.0 [−1.0, +5.0]): no gain is shown."
    )
    assert colour == "warning"


@pytest.mark.parametrize("told", [{}, change(0.02, 0.01, 0.03)])
def test_at_chance_whatever_it_was_before(told: dict[str, Any]) -> None:
    text, colour = said(0.02, 0.04, (0.03, 0.05), told)
    assert text.endswith("is 4.0 % [3.0, 5.0], not shown to be better than chance (4.0 %).")
    assert colour == "error"


def test_an_older_run_says_that_noise_was_not_measured() -> None:
    text, colour = said(0.04, 0.312, None, {})
    assert text.endswith("went from 4.0 % (chance 4.0 %) to 31.2 %; whether that is beyond noise was not measured.")
    assert colour == "warning"


def test_test_comes_before_val_and_flat_scores_serve_an_older_run() -> None:
    both = {"before": scores(0.1), "best": scores(0.2)}
    assert [one.split for one in conclusion.judged({"val": both, "test": both, **both})] == ["test", "val"]
    assert [one.split for one in conclusion.judged(both)] == ["val"]
    assert conclusion.judged({}) == []


def test_by_group_where_it_differs() -> None:
    one = Judged("val", scores(0.1), scores(0.2), {})
    assert conclusion.headline(one) == ("image_to_text", "hit@10")
    assert [row.name for row in conclusion.rows(one, "image_to_text")] == ["hit@1", "hit@10", "median rank"]
    other = Judged("val", scores(0.1), scores(0.2, groups=0.3), {})
    assert conclusion.headline(other) == ("image_to_text", "hit@10_groups")
    assert [row.name for row in conclusion.rows(other, "text_to_image")] == [
        "hit@1", "hit@10", "median rank", "hit@1 by group", "hit@10 by group", "median rank by group",
    ]  # fmt: skip


def test_without_ten_the_middle_k_speaks() -> None:
    best = scores(0.2)
    for side in ("image_to_text", "text_to_image", "chance"):
        best[side] = {"hit@1": 0.1, "hit@5": 0.2, "hit@50": 0.3}
    assert conclusion.headline(Judged("val", best, best, {}))[1] == "hit@5"


def test_what_intervals_were_drawn_from() -> None:
    of = [conclusion.drawn_from({"clusters": {"by": "source", "count": n}}) for n in (1, 19, 20)]
    assert of == ["none: 1 source says nothing of others",
                  "19 sources, drawn 1,000 times: with so few they are too narrow",
                  "20 sources, drawn 1,000 times"]  # fmt: skip
    assert conclusion.drawn_from(scores(0.1)) == ""


def test_few_clusters_are_doubted_in_the_words_of_evaluate() -> None:
    def one(split: str, count: int) -> Judged:
        return Judged(split, None, {**scores(0.1), "clusters": {"by": "source", "count": count}}, {})

    assert conclusion.doubts([one("test", 3), one("val", 20), Judged("val", None, scores(0.1), {}), one("val", 1)]) == [
        "On test, intervals are drawn from 3 sources: with so few they are too narrow.",
        "On val, intervals are drawn from 1 source: one says nothing of others.",
    ]


def test_lower_ranks_are_better() -> None:
    told = {"image_to_text": {"median_rank": {"by": -5.0, "interval": [-7, -3], "beyond_noise": True},
                              "hit@10": {"by": -0.1, "interval": [-0.2, -0.05], "beyond_noise": True},
                              "hit@1": {"by": 0.1, "interval": [-0.2, 0.3], "beyond_noise": False}}}  # fmt: skip
    rows = {row.name: row for row in conclusion.rows(Judged("val", scores(0.1), scores(0.2), told), "image_to_text")}
    assert {name: row.change for name, row in rows.items()} == {
        "median rank": "better", "hit@10": "worse", "hit@1": "noise",
    }  # fmt: skip
    assert rows["median rank"].difference == "−5.0 [−7.0, −3.0]"
    assert rows["hit@10"].difference == "−10.0 [−20.0, −5.0]"
    assert rows["median rank"].chance == "125.5"


def test_slices_by_size_and_what_is_left_out() -> None:
    best = scores(0.2)
    best["slices"] = {"label": {str(i): {**scores(0.3), "pairs": i + 1} for i in range(50)},
                      "caption length": {"short": {**scores(0.1), "pairs": 1}, "long": {**scores(0.2), "pairs": 9}}
                      }  # fmt: skip
    before = copy.deepcopy(best)
    del before["slices"]["label"]["49"]
    (name, counted, values, more), (_, _, lengths, _) = conclusion.slices(Judged("val", before, best, {}))
    assert (name, counted, len(values), more) == ("label", "hit@10, image → text", 40, 10)
    assert (values[0].value, values[0].pairs, values[0].before, values[0].best) == ("49", 50, "–", "30.0 %")
    assert [value.value for value in lengths] == ["short", "long"]
