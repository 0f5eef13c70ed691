"""What is shown of a split is what a slow and obvious look at all scores finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cytoclip import evidence, retrieval
from cytoclip.evidence import Gallery
from cytoclip.pairs import Identity, right_answers
from tests import runs


def identity(pairs: int, captions: int | None = None, pictures: int | None = None) -> Identity:
    number = np.arange(pairs)
    return Identity(number % (captions or pairs), number % (pictures or pairs), np.full(pairs, -1))


def rows_of(gallery: Gallery) -> dict[str, list[int]]:
    return {kind: [case.row for case in cases] for kind, cases in gallery.cases.items()}


@pytest.mark.parametrize(("captions", "pictures"), [(None, None), (7, None), (7, 11)])
def test_ranks_are_those_of_a_sorted_row(captions: int | None, pictures: int | None) -> None:
    image, text = runs.random_embeddings(40, 1.0)
    who = identity(40, captions, pictures)
    right = right_answers(who, who)
    scores = (image @ text.T).numpy()
    for row, rank in enumerate(evidence.ranks(image, text, who, range(40))):
        order = np.argsort(-scores[row], kind="stable")
        assert rank == 1 + int(np.flatnonzero(right[row][order])[0])


def test_ranks_agree_with_the_metric() -> None:
    """To the last bit."""
    image, text = runs.random_embeddings(60, 0.8)
    ranks = np.array(evidence.ranks(image, text, identity(60), range(60)))
    found = retrieval.rank(image, text, identity(60), [1])["image_to_text"].groups["rank"]
    assert ranks.tolist() == found.tolist()


def test_ties_stand_in_their_middle() -> None:
    """A constant model: each of 9 places is as likely, so the right one stands at 5 on average; two, at 10/3."""
    same = torch.ones(9, 4)
    assert evidence.ranks(same, same, identity(9), [0, 4]) == [5.0, 5.0]
    assert evidence.ranks(same, same, identity(9, captions=5), [1]) == pytest.approx([10 / 3])


def test_cases_are_the_worst_the_middle_and_the_best() -> None:
    image, text = runs.random_embeddings(50, 0.7, seed=3)
    found = evidence.gallery(image, text, identity(50), "image")
    ranks = np.array(evidence.ranks(image, text, identity(50), range(50)))
    scores = (image @ text.T).numpy()
    lead = scores.diagonal() - (scores - 9 * np.eye(50)).max(axis=1)
    cases = rows_of(found)
    assert found.looked_at == 50
    assert sorted(ranks[cases["hardest misses"]]) == sorted(ranks)[-3:]
    assert all(abs(ranks[row] - np.median(ranks)) <= 2 for row in cases["median cases"])
    assert cases["best hits"] == np.argsort(-np.where(ranks == 1, lead, -9), kind="stable")[:3].tolist()
    for kind in found.cases.values():
        for case in kind:
            assert [one.row for one in case.top] == np.argsort(-scores[case.row], kind="stable")[:5].tolist()
            assert [one.right for one in case.top] == [one.row == case.row for one in case.top]
            assert case.score == pytest.approx(scores[case.row, case.row], abs=1e-6)
            assert case.rank == ranks[case.row]


def test_equal_captions_stand_once_and_equal_pictures_ask_once() -> None:
    """20 pairs of 4 captions, whose embeddings are equal, and 10 pictures."""
    image, text = runs.random_embeddings(20, 1.0)
    image, text = image[np.arange(20) % 10], text[np.arange(20) % 4]
    who = identity(20, captions=4, pictures=10)
    found = evidence.gallery(image, text, who, "image")
    asked = [who.image[case.row] for kind in found.cases.values() for case in kind]
    assert len(asked) == len(set(asked))
    for kind in found.cases.values():
        for case in kind:
            assert [one.copies for one in case.top] == [5] * 4
            assert len({who.caption[one.row] for one in case.top}) == 4
            for one in case.top:
                assert one.right == bool(right_answers(who.take([case.row]), who.take([one.row]))[0, 0])


def test_right_and_wrong_similarities_are_all_pairs() -> None:
    image, text = runs.random_embeddings(30, 1.0)
    who = identity(30, captions=6)
    found = evidence.similarities(image, text, who)
    scores, right = (image @ text.T).double().numpy(), right_answers(who, who)
    assert found is not None
    assert found.drawn is None
    assert found.right.sum() == 30
    assert found.wrong.sum() == (~right).sum()
    assert found.right_mean == pytest.approx(scores.diagonal().mean())
    assert found.wrong_mean == pytest.approx(scores[~right].mean())
    assert (np.histogram(scores[~right], found.edges)[0] == found.wrong).sum() >= 38  # but for the last bit at an edge


def test_no_wrong_pair_no_histogram() -> None:
    image, text = runs.random_embeddings(5, 1.0)
    assert evidence.similarities(image, text, identity(5, captions=1)) is None


def test_a_sample_says_so_and_is_near_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = runs.random_embeddings(300, 1.0)
    whole = evidence.similarities(image, text, identity(300))
    monkeypatch.setattr(evidence, "MOST_WRONG", 5_000)
    monkeypatch.setattr(evidence, "MOST_SCORES", 100 * 300)
    monkeypatch.setattr(evidence, "MOST_POINTS", 50)
    drawn, again = (evidence.similarities(image, text, identity(300)) for _ in range(2))
    assert whole
    assert drawn
    assert again
    assert drawn.drawn is not None
    assert 4_900 < drawn.drawn <= 5_000
    assert drawn.wrong_mean == pytest.approx(whole.wrong_mean, abs=0.02)
    assert (drawn.wrong == again.wrong).all()
    found = evidence.gallery(image, text, identity(300), "text")
    assert found.looked_at == 100
    assert rows_of(found) == rows_of(evidence.gallery(image, text, identity(300), "text"))
    placed = evidence.mapped(image, text)
    assert placed is not None
    assert len(placed.rows) == 50


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = runs.random_embeddings(70, 1.0)
    whole = evidence.ranks(image, text, identity(70), range(70))
    monkeypatch.setattr(evidence, "_SCORES", 70 * 9)
    assert evidence.ranks(image, text, identity(70), range(70)) == whole


def test_the_map_is_the_leading_components_of_each_side_about_its_mean() -> None:
    image, text = runs.random_embeddings(40, 1.0)
    placed = evidence.mapped(image, text)
    assert placed is not None
    both = torch.cat([image - image.mean(0), text - text.mean(0)]).double().numpy()
    values = np.linalg.eigvalsh(both.T @ both)[::-1]
    mapped = np.concatenate([placed.image_P2, placed.text_P2])
    assert (mapped**2).sum(axis=0) == pytest.approx(values[:2])
    assert placed.explained == pytest.approx(values[:2].sum() / values.sum())
    assert placed.gap == pytest.approx(float((image.mean(0) - text.mean(0)).norm()), abs=1e-6)
    again = evidence.mapped(image, text)
    assert again is not None
    assert (again.image_P2 == placed.image_P2).all()


def test_maps_of_next_to_nothing() -> None:
    assert evidence.mapped(*runs.random_embeddings(2, 1.0)) is None
    same = torch.ones(5, 8)
    placed = evidence.mapped(same, same)
    assert placed is not None
    assert np.isfinite(placed.image_P2).all()
    narrow = evidence.mapped(torch.ones(5, 1), torch.ones(5, 1))
    assert narrow is not None
    assert narrow.image_P2.shape == (5, 2)
