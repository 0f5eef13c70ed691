"""How much of a batch repeats, and the floor of the loss: against counting, and against embeddings that reach it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from cytoclip import repeats
from cytoclip.device import World
from cytoclip.objectives import Objective, contrast
from cytoclip.pairs import Identity, right_answers
from cytoclip.repeats import Repeats

B = 12
EACH, NOTHING = np.arange(B), np.full(B, -1)
DIFFERENT = Identity(EACH, EACH, NOTHING)
CAPTIONS = Identity(EACH // 3, EACH, NOTHING)


def drawn(seed: int) -> Identity:
    generator = np.random.default_rng(seed)
    caption, image = generator.integers(0, 7, B), generator.integers(0, 7, B)
    return Identity(caption, image, generator.integers(-1, 4, B))


def test_right_answers_are_counted_as_the_relation_counts_them() -> None:
    seen = set()
    for seed in range(200):
        batch = drawn(seed)
        expected = right_answers(batch, batch).sum(axis=1)
        assert repeats.right_counts(batch).tolist() == expected.tolist()
        seen |= set(expected.tolist())
    assert len(seen) >= 8


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("positives", ["groups", "pairs", "ignore"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_no_scores_go_below_the_floor(kind: Any, positives: Any, smoothing: float) -> None:
    """Gradient descent on the embeddings themselves, equal ones shared: it comes near and never below."""
    objective = Objective(kind, positives, smoothing if kind == "infonce" else 0.0)
    for seed in range(3):
        batch = drawn(seed)
        floor = repeats.floor(batch, objective)
        assert floor <= descended(batch, objective) + 1e-9


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Objective(), math.log(3)),
        (Objective("infonce", "pairs"), math.log(3)),
        (Objective("infonce", "ignore"), 0.0),
        (Objective("sigmoid"), 0.0),
        (Objective("sigmoid", "ignore"), 0.0),
        (Objective("sigmoid", "pairs"), 3 * (math.log(3) - 2 / 3 * math.log(2))),
    ],
    ids=str,
)
def test_three_pairs_of_one_caption(objective: Objective, expected: float) -> None:
    """By hand: a third for each of three texts; for the sigmoid three equal scores of which one is right."""
    assert repeats.floor(CAPTIONS, objective) == pytest.approx(expected, abs=1e-12)
    assert descended(CAPTIONS, objective) == pytest.approx(expected, abs=0.02), "the bound is reached"
    assert repeats.floor(DIFFERENT, objective) == pytest.approx(0, abs=1e-12)


def test_smoothing_has_an_entropy_of_its_own() -> None:
    high, low = 0.9 + 0.1 / B, 0.1 / B
    expected = -high * math.log(high) - (B - 1) * low * math.log(low)
    assert repeats.floor(DIFFERENT, Objective(smoothing=0.1)) == pytest.approx(expected)


def test_the_line_of_the_log() -> None:
    found = repeats.typical([CAPTIONS, DIFFERENT], Objective())
    assert (found.pairs, found.floor) == (6.0, pytest.approx(math.log(3) / 2))
    said = repeats.line(found, B, Objective())
    assert said.startswith("about 6.0 of the 12 pairs of a batch share")
    assert "below 0.5493 (groups; ln(batch): 2.485)" in said


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("positives", ["groups", "pairs", "ignore"])
@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_what_the_pairs_do_not_tell_is_a_share_of_ln_batch(kind: Any, positives: Any, smoothing: float) -> None:
    """Of one caption all, of different ones nothing, of three pairs each ln 3, whatever is minimised."""
    objective = Objective(kind, positives, smoothing)
    same = Identity(np.zeros_like(EACH), EACH, NOTHING)
    assert repeats.untold(same, objective) == pytest.approx(1)
    assert repeats.untold(DIFFERENT, objective) == pytest.approx(0)
    assert repeats.untold(CAPTIONS, objective) == pytest.approx(math.log(3) / math.log(B))
    assert repeats.untold(same.take(np.array([0])), objective) == 0
    grouped = repeats.untold(Identity(EACH, EACH, np.zeros_like(EACH)), objective)
    assert grouped == pytest.approx(0 if positives == "pairs" else 1), "pairs of a group are told apart by `pairs`"


@pytest.mark.parametrize(
    ("untold", "kind"),
    [(0.0, None), (0.49, None), (0.5, "little-to-learn"), (0.94, "little-to-learn"), (0.95, "nothing-to-learn")],
)
def test_too_little_to_learn_is_named_and_says_what_to_do(untold: float, kind: str | None) -> None:
    found = Repeats(12, 1.0, untold)
    assert found.kind == kind
    said = repeats.warning(found, 64)
    assert (said is None) == (kind is None)
    if said:
        assert f"repeats take {untold:.0%} of what a batch of 64 could teach; write captions" in said
        assert "cytoclip classify" in said


def descended(batch: Identity, objective: Objective) -> float:
    """The loss of free scores, which only equal captions and equal pictures share, after gradient descent."""
    torch.manual_seed(0)
    pictures = torch.nn.functional.one_hot(torch.from_numpy(batch.image)).double()
    texts = torch.nn.functional.one_hot(torch.from_numpy(batch.caption)).double()
    table = torch.zeros(pictures.shape[1], texts.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64)
    identity = batch.map(torch.from_numpy)
    optimizer = torch.optim.Adam([table], lr=0.3)
    for _ in range(400):
        # scores = pictures @ table @ textsᵀ: the images' "embeddings" are rows of the table, free of any norm
        own = (pictures @ table).detach(), texts
        found = contrast(own, torch.zeros(()).double(), bias, identity, World(torch.device("cpu")), objective)
        table.grad = pictures.T @ found.images
        optimizer.step()
    return float(found.loss)
