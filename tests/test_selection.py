"""The number that the best checkpoint, patience and the soup go by."""

from __future__ import annotations

import pytest

from cytoclip import selection

NUMBERS = {
    "hit@1": 0.9, "hit@10": 0.9, "hit@1_groups": 0.2, "hit@10_groups": 0.4, "recall@1_groups": 0.95,
    "mrr": 0.9, "mrr_groups": 0.3, "map_groups": 0.25, "median_rank_groups": 7.0,
}  # fmt: skip
OTHER = {**NUMBERS, "hit@1_groups": 0.4, "hit@10_groups": 0.6, "mrr_groups": 0.5, "map_groups": 0.75}
CHANCE = {"hit@1": 0.1, "hit@10": 0.5, "hit@1_groups": 0.2, "hit@10_groups": 0.6, "mrr_groups": 0.05}
SCORED = {"pairs": 50, "image_to_text": NUMBERS, "text_to_image": OTHER, "chance": CHANCE}


@pytest.mark.parametrize(
    ("by", "expected"), [("hits", 0.4), ("hit@1", 0.3), ("hit@10", 0.5), ("mrr", 0.4), ("map", 0.5)]
)
def test_it_is_the_mean_of_both_directions_every_right_answer_counted(by: str, expected: float) -> None:
    """Strict hits count a second picture with the same caption as a miss; chance is no score, nor is a rank."""
    assert selection.score(SCORED, by) == pytest.approx(expected)


def test_a_metric_without_groups_is_taken_by_pair_and_chance_is_read_the_same_way() -> None:
    bare = {**SCORED, "image_to_text": {"mrr": 0.5}, "text_to_image": {"mrr": 0.1}}
    assert selection.score(bare, "mrr") == pytest.approx(0.3)
    assert selection.chance(SCORED) == pytest.approx(0.4)
    assert selection.chance(SCORED, "hit@1") == 0.2


def test_what_is_not_measured_is_named_with_the_nearest_that_is() -> None:
    assert [selection.problem(by, [10, 1]) for by in selection.choices([10, 1])] == [None] * 5
    assert selection.choices([10, 1, 10]) == ["hits", "hit@1", "hit@10", "mrr", "map"]
    what, hint = selection.problem("hit@5", [1, 10]) or ("", "")
    assert what == "hit@5 is not measured: validate.ks is [1, 10]"
    assert hint == "add 5 to validate.ks, or choose hits, hit@1, hit@10, mrr, map"
    for wrong, near in (("hit", "hits"), ("MAP", "map"), ("mrr_groups", "mrr"), ("hit@0", "hit@10"), ("loss", None)):
        what, hint = selection.problem(wrong, [1, 10]) or ("", "")
        assert what == f"{wrong!r} is not measured"
        assert hint.endswith("hits, hit@1, hit@10, mrr, map")
        assert (f"did you mean {near}?" in hint) == (near is not None), (wrong, hint)
