"""Numbers on paper: which they are, out of how many, and what knowing nothing would score."""

from __future__ import annotations

import json

import pytest

from cytoclip import report
from cytoclip.retrieval import HitRates

KS = (1, 10)
CHANCE = HitRates(KS, {1: 0.02, 10: 0.2}, {1: 0.04, 10: 0.3}, queries=50, gallery=50)
NO_GROUPS = HitRates(KS, {1: 0.02, 10: 0.2}, {1: 0.02, 10: 0.2}, queries=50, gallery=50)


def rates(strict: float, groups: float, extra: float = 0.1) -> HitRates:
    return HitRates(KS, {1: strict, 10: strict + extra}, {1: groups, 10: groups + extra}, queries=50, gallery=50)


BEFORE = report.scores({"image_to_text": rates(0.1, 0.2), "text_to_image": rates(0.3, 0.4)}, CHANCE)
AFTER = report.scores({"image_to_text": rates(0.5, 0.6), "text_to_image": rates(0.7, 0.8)}, CHANCE)


def test_scores_are_flat_json_with_both_counts_and_chance() -> None:
    assert json.loads(json.dumps(BEFORE)) == BEFORE
    assert list(BEFORE) == ["pairs", "image_to_text", "text_to_image", "chance"]
    assert BEFORE["pairs"] == 50
    assert BEFORE["chance"] == {"hit@1": 0.02, "hit@10": 0.2, "hit@1_groups": 0.04, "hit@10_groups": 0.3}
    assert BEFORE["image_to_text"]["hit@1"] == 0.1
    assert BEFORE["image_to_text"]["hit@1_groups"] == 0.2
    assert BEFORE["text_to_image"]["hit@10_groups"] == pytest.approx(0.5)


def test_one_direction_alone_has_no_other() -> None:
    assert list(report.scores({"text_to_image": rates(0.1, 0.1)}, CHANCE)) == ["pairs", "text_to_image", "chance"]


def test_the_table_to_the_letter() -> None:
    assert report.table({"before": BEFORE, "after": AFTER}, KS) == "\n".join(
        [
            "image → text: each of 50 images ranks all 50 texts",
            "                   before   after  chance",
            "  hit@1            0.1000  0.5000  0.0200",
            "  hit@10           0.2000  0.6000  0.2000",
            "  hit@1 by group   0.2000  0.6000  0.0400",
            "  hit@10 by group  0.3000  0.7000  0.3000",
            "",
            "text → image: each of 50 texts ranks all 50 images",
            "                   before   after  chance",
            "  hit@1            0.3000  0.7000  0.0200",
            "  hit@10           0.4000  0.8000  0.2000",
            "  hit@1 by group   0.4000  0.8000  0.0400",
            "  hit@10 by group  0.5000  0.9000  0.3000",
        ]
    )


def test_rows_by_group_stand_only_where_they_differ() -> None:
    equal = report.scores({"image_to_text": rates(0.1, 0.1), "text_to_image": rates(0.1, 0.2)}, NO_GROUPS)
    first, second = report.table({"m": equal}, KS).split("\n\n")
    assert "by group" not in first
    assert second.count("by group") == len(KS)


def test_rows_by_group_stand_where_only_chance_differs() -> None:
    equal = report.scores({"image_to_text": rates(0.1, 0.1)}, CHANCE)
    assert report.table({"m": equal}, KS).count("by group") == len(KS)


def test_the_table_has_the_rows_that_were_asked_for() -> None:
    table = report.table({"m": BEFORE}, [10])
    assert "hit@10 " in table
    assert "hit@1 " not in table


def test_a_long_model_name_keeps_the_columns_aligned() -> None:
    one = report.scores({"image_to_text": rates(0.1, 0.1)}, NO_GROUPS)
    lines = report.table({"openai/clip-vit-base-patch16": one}, KS).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1
    assert "text → image" not in "\n".join(lines)


def test_one_line_names_directions_and_k() -> None:
    assert report.one_line(BEFORE, KS) == (
        "image → text hit@1 0.1000 hit@10 0.2000; text → image hit@1 0.3000 hit@10 0.4000"
    )
