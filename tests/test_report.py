"""Numbers on paper: which they are, out of how many, and what knowing nothing would score."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cytoclip import report
from cytoclip.intervals import Clusters
from cytoclip.retrieval import Ranked

KS = (1, 10)


def ranked(strict: tuple[float, float], groups: tuple[float, float]) -> Ranked:
    """50 queries that all have these numbers."""
    parts = []
    for one, ten in (strict, groups):
        part = {"hit@1": one, "hit@10": ten, "mrr": one, "rank": 1 / max(one, 0.01)}
        if strict != groups and (one, ten) == groups:
            part |= {"recall@1": one / 2, "recall@10": ten / 2, "map": one / 2}
        parts.append({name: np.full(50, value) for name, value in part.items()})
    return Ranked(*parts)


def rates(strict: float, groups: float, extra: float = 0.1) -> Ranked:
    return ranked((strict, strict + extra), (groups, groups + extra))


CHANCE = ranked((0.02, 0.2), (0.04, 0.3))
NO_GROUPS = ranked((0.02, 0.2), (0.02, 0.2))


BEFORE = report.scores({"image_to_text": rates(0.1, 0.2), "text_to_image": rates(0.3, 0.4)}, CHANCE)
AFTER = report.scores({"image_to_text": rates(0.5, 0.6), "text_to_image": rates(0.7, 0.8)}, CHANCE)


def test_scores_are_flat_json_with_both_counts_and_chance() -> None:
    assert json.loads(json.dumps(BEFORE)) == BEFORE
    assert list(BEFORE) == ["pairs", "image_to_text", "text_to_image", "chance"]
    assert BEFORE["pairs"] == 50
    chance = {"hit@1": 0.02, "hit@10": 0.2, "hit@1_groups": 0.04, "hit@10_groups": 0.3}
    assert {key: BEFORE["chance"][key] for key in chance} == chance
    assert list(BEFORE["image_to_text"]) == [
        "hit@1", "hit@10", "mrr", "median_rank", "mean_rank", "hit@1_groups", "hit@10_groups", "mrr_groups",
        "recall@1_groups", "recall@10_groups", "map_groups", "median_rank_groups", "mean_rank_groups",
    ]  # fmt: skip
    assert BEFORE["image_to_text"]["hit@1"] == 0.1
    assert BEFORE["image_to_text"]["hit@1_groups"] == 0.2
    assert BEFORE["text_to_image"]["hit@10_groups"] == pytest.approx(0.5)


def test_one_direction_alone_has_no_other() -> None:
    assert list(report.scores({"text_to_image": rates(0.1, 0.1)}, CHANCE)) == ["pairs", "text_to_image", "chance"]


def test_the_table_to_the_letter() -> None:
    assert report.table({"before": BEFORE, "after": AFTER}, KS) == "\n".join(
        [
            "image → text: each of 50 images ranks all 50 texts",
            "                        before   after  chance",
            "  hit@1                 0.1000  0.5000  0.0200",
            "  hit@10                0.2000  0.6000  0.2000",
            "  MRR                   0.1000  0.5000  0.0200",
            "  median rank             10.0     2.0    50.0",
            "  hit@1 by group        0.2000  0.6000  0.0400",
            "  hit@10 by group       0.3000  0.7000  0.3000",
            "  recall@1 by group     0.1000  0.3000  0.0200",
            "  recall@10 by group    0.1500  0.3500  0.1500",
            "  MRR by group          0.2000  0.6000  0.0400",
            "  mAP by group          0.1000  0.3000  0.0200",
            "  median rank by group     5.0     1.7    25.0",
            "",
            "text → image: each of 50 texts ranks all 50 images",
            "                        before   after  chance",
            "  hit@1                 0.3000  0.7000  0.0200",
            "  hit@10                0.4000  0.8000  0.2000",
            "  MRR                   0.3000  0.7000  0.0200",
            "  median rank              3.3     1.4    50.0",
            "  hit@1 by group        0.4000  0.8000  0.0400",
            "  hit@10 by group       0.5000  0.9000  0.3000",
            "  recall@1 by group     0.2000  0.4000  0.0200",
            "  recall@10 by group    0.2500  0.4500  0.1500",
            "  MRR by group          0.4000  0.8000  0.0400",
            "  mAP by group          0.2000  0.4000  0.0200",
            "  median rank by group     2.5     1.2    25.0",
        ]
    )


def test_rows_by_group_stand_only_where_they_differ() -> None:
    equal = report.scores({"image_to_text": rates(0.1, 0.1), "text_to_image": rates(0.2, 0.2)}, NO_GROUPS)
    assert "by group" not in report.table({"m": equal}, KS)
    assert report.table({"m": BEFORE}, KS).count("by group") == 2 * (2 * len(KS) + 3)


def test_rows_by_group_stand_where_only_chance_differs() -> None:
    equal = report.scores({"image_to_text": rates(0.1, 0.1)}, CHANCE)
    assert report.table({"m": equal}, KS).count("by group") == len(KS) + 2


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


def halves() -> Ranked:
    """Of 50 queries the first 25 find their answer first, the others last; groups are single pairs."""
    found = np.arange(50) < 25
    part = {
        "hit@1": found * 1.0,
        "hit@10": found * 1.0,
        "mrr": np.where(found, 1, 0.02),
        "rank": np.where(found, 1.0, 50.0),
    }
    return Ranked(part, part)


PAIRWISE = Clusters("picture", np.arange(50), 50)


def test_intervals_stand_beside_the_numbers() -> None:
    both = {"image_to_text": halves()}
    scored = report.with_intervals(report.scores(both, NO_GROUPS), both, PAIRWISE)
    assert json.loads(json.dumps(scored)) == scored
    assert scored["clusters"] == {"by": "picture", "count": 50}
    assert set(scored["intervals"]["image_to_text"]) == set(scored["image_to_text"])
    low, high = scored["intervals"]["image_to_text"]["hit@1"]
    assert 0.34 <= low < 0.42  # 0.5 ± 1.96 · √(0.25 / 50) is 0.36 to 0.64
    assert 0.58 < high <= 0.66
    assert f"0.5000 [{low:.4f}, {high:.4f}]" in report.table({"m": scored}, KS)


def test_a_slice_has_its_own_numbers() -> None:
    first = report.slice_of({"image_to_text": halves()}, np.arange(50) < 30, PAIRWISE)
    assert first["pairs"] == 30
    assert first["image_to_text"]["hit@1"] == pytest.approx(25 / 30)
    assert first["intervals"]["image_to_text"]["hit@1"][0] > 0.6


def test_a_difference_says_whether_it_is_beyond_noise() -> None:
    better = {"image_to_text": halves()}
    part = {name: column.copy() for name, column in halves().strict.items()}
    for name, column in part.items():
        column[:24] = halves().strict[name][49]  # all but one of those that are found
    worse = {"image_to_text": Ranked(part, part)}
    of = {id(one): (report.scores(one, NO_GROUPS), one) for one in (better, worse)}
    found = report.difference(of[id(better)], of[id(worse)], PAIRWISE)["image_to_text"]
    assert found["hit@1"]["by"] == pytest.approx(0.48)
    assert found["hit@1"]["beyond_noise"]
    assert found["median_rank"]["by"] == pytest.approx(25.5 - 50)
    back = report.difference(of[id(worse)], of[id(better)], PAIRWISE)["image_to_text"]
    assert back["hit@1"]["beyond_noise"], "worse is no less told than better"
    nothing = report.difference(of[id(worse)], of[id(worse)], PAIRWISE)["image_to_text"]
    assert nothing["hit@1"] == {"by": 0, "interval": [0, 0], "beyond_noise": False}
    lines = report.difference_lines({"image_to_text": found}, KS)
    assert lines[1].startswith("  image → text hit@1 ")
    assert "+0.4800" in lines[1]
    assert lines[1].endswith("beyond noise")
    assert "−24.5" in lines[4]


def test_one_cluster_has_no_intervals() -> None:
    both, alone = {"image_to_text": halves()}, Clusters("source", np.zeros(50, np.int64), 1)
    scored = report.with_intervals(report.scores(both, NO_GROUPS), both, alone)
    assert scored["intervals"] == {"image_to_text": {}}
    assert "[" not in report.table({"m": scored}, KS)
    one = (report.scores(both, NO_GROUPS), both)
    found = report.difference(one, one, alone)
    assert found["image_to_text"]["hit@1"]["interval"] is None
    assert report.difference_lines(found, KS)[1].split()[-2:] == ["not", "known"]
