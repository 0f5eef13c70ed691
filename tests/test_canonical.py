"""Canonical correlations against a slow twin, and against what is known of drawn features."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray

from cytoclip import canonical
from cytoclip.canonical import Correlated, Side
from cytoclip.errors import UserError
from cytoclip.pairs import Identity

Features = tuple[torch.Tensor, torch.Tensor]


def drawn(pairs: int, seed: int = 0, widths: tuple[int, int] = (12, 9), shared: int = 4) -> Features:
    """Two sides that hear of the same `shared` numbers, in noise, far from the origin."""
    random = np.random.default_rng(seed)
    maps = np.random.default_rng(99)  # the same for every draw
    known = random.normal(size=(pairs, shared))
    sides = [known @ maps.normal(size=(shared, width)) + random.normal(size=(pairs, width)) for width in widths]
    means = [maps.normal(size=width) * 20 for width in widths]
    return torch.from_numpy(sides[0] + means[0]), torch.from_numpy(sides[1] + means[1])


def apart(pairs: int) -> Identity:
    each = np.arange(pairs)
    return Identity(each, each, -np.ones(pairs, np.int64))


def halves(pairs: int) -> list[canonical.Round]:
    return canonical.rounds(np.arange(pairs) % 2)


def given(dimensions: int, widths: tuple[int, int] = (12, 9)) -> Features:
    torch.manual_seed(3)
    return torch.randn(dimensions, widths[0]) * 0.02, torch.randn(dimensions, widths[1]) * 0.05


def cosines(features: Features, projections: Features) -> NDArray[np.float64]:
    sides = [
        torch.nn.functional.normalize(rows.double() @ weights.double().T, dim=1)
        for rows, weights in zip(features, projections, strict=True)
    ]
    return (sides[0] @ sides[1].T).numpy()


def twin(features: Features, new: Features, ridges: tuple[float, float], most: int) -> NDArray[np.float64]:
    """Cosines of `new` by the generalised eigenvalue problem, as textbooks have it, on rows without their mean."""
    rows, other = ([side.numpy() for side in some] for some in (features, new))
    levels = []
    for side in rows:
        unit = side.mean(0) / np.linalg.norm(side.mean(0))
        levels.append(np.eye(len(unit)) - np.outer(unit, unit))
    rows, other = ([side @ level for side, level in zip(some, levels, strict=True)] for some in (rows, other))
    covariances = []
    for side, ridge in zip(rows, ridges, strict=True):
        covariance = side.T @ side / len(side)
        covariances.append(covariance + ridge * np.trace(covariance) / len(covariance) * np.eye(len(covariance)))
    across = rows[0].T @ rows[1] / len(rows[0])
    squared, left = scipy.linalg.eigh(across @ np.linalg.inv(covariances[1]) @ across.T, covariances[0])
    best = np.argsort(-squared)[:most]
    correlation = np.sqrt(squared[best].clip(1e-30))
    right = np.linalg.inv(covariances[1]) @ across.T @ left[:, best] / correlation
    weight = correlation**canonical.POWER
    images, texts = other[0] @ left[:, best] * weight, other[1] @ right * weight
    images, texts = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (images, texts))
    found: NDArray[np.float64] = images @ texts.T
    return found


@pytest.mark.parametrize("dimensions", [3, 9, 32])
@pytest.mark.parametrize("ridges", [(0.1, 0.1), (1.0, 0.01)])
def test_cosines_are_those_of_the_twin(
    dimensions: int, ridges: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer dimensions than components, as many, and more."""
    monkeypatch.setattr(canonical, "EVERY", [ridges])
    features, new = drawn(200), drawn(30, seed=1)
    found = canonical.fit(features, given(dimensions), apart(200), halves(200))
    assert found.image_DP.shape == (dimensions, 12)
    assert found.text_DQ.shape == (dimensions, 9)
    # The direction of the mean counts for nothing, so that 8 of 9 components are left.
    assert np.allclose(cosines(new, (found.image_DP, found.text_DQ)), twin(features, new, ridges, min(dimensions, 8)))


def test_each_projection_has_the_norm_of_the_one_that_it_replaces() -> None:
    old = given(16)
    found = canonical.fit(drawn(100), old, apart(100), halves(100))
    for new, before in zip((found.image_DP, found.text_DQ), old, strict=True):
        assert float(new.norm()) == pytest.approx(float(before.norm()), rel=1e-6)
    assert (found.image_DP.norm(dim=1) > 0).all(), "no dimension is empty"


def test_what_all_rows_have_in_common_counts_for_nothing() -> None:
    """Not the mean, nor how far it is from the origin."""
    features = drawn(200)
    found = canonical.fit(features, given(16), apart(200), halves(200))
    for rows, weights in zip(features, (found.image_DP, found.text_DQ), strict=True):
        assert float((weights @ rows.mean(0)).norm()) < 1e-9 * float((weights @ (rows - rows.mean(0)).T).norm())


def test_correlations_are_those_that_were_drawn() -> None:
    """One shared number z in noise of the same size on each side: x = z + e, t = z + f correlate by 1/2."""
    random = np.random.default_rng(5)
    shared = random.normal(size=(50_000, 1))
    rows = [np.hstack([shared, np.zeros((50_000, 2))]) + random.normal(size=(50_000, 3)) for _ in range(2)]
    for side in rows:
        side[:, 2] += 100  # the direction of the mean, which is not the one that is shared
    both = Correlated.of(*(torch.from_numpy(side) for side in rows))
    image_P, text_Q = both.image.shrunk(0), both.text.shrunk(0)
    level = torch.linalg.svdvals((image_P[:, None] * both.together_PQ * text_Q)[1:, 1:])
    assert level.numpy() == pytest.approx([0.5, 0.0], abs=0.02)


def test_ridges_are_those_that_serve_pairs_which_were_not_seen() -> None:
    """Few pairs of many features need a large one, where many of few need none; and their score is stated."""
    fold_N = np.arange(60) % 3
    few = canonical.fit(drawn(60, widths=(40, 40)), given(16, (40, 40)), apart(60), canonical.rounds(fold_N))
    many = canonical.fit(drawn(3000), given(16), apart(3000), canonical.rounds(np.arange(3000) % 3))
    assert min(few.ridges) > max(many.ridges)
    assert few.mrr is not None
    assert few.mrr_given is not None
    assert few.mrr > 2 * few.mrr_given
    held = [np.flatnonzero(fold_N == fold) for fold in range(3)]
    again = []
    for rows in held:
        rest = np.setdiff1d(np.arange(60), rows)
        side = drawn(60, widths=(40, 40))
        cos = twin((side[0][rest], side[1][rest]), (side[0][rows], side[1][rows]), few.ridges, 16)
        for each in (cos, cos.T):
            again.append((1 / (1 + (each > np.diag(each)[:, None]).sum(1))).mean())
    assert few.mrr == pytest.approx(np.mean(again), abs=1e-6)


def test_a_tower_that_says_the_same_of_all_is_refused() -> None:
    image, text = drawn(30)
    with pytest.raises(UserError, match="the text tower says the same of all 30 pairs"):
        canonical.fit((image, text[:1].expand(30, 9)), given(8), apart(30), halves(30))


def test_the_first_and_the_last_bit_do_not_depend_on_who_asks() -> None:
    """A run that is stopped before its first checkpoint begins with the same projections again."""
    one, two = (canonical.fit(drawn(90), given(16), apart(90), canonical.rounds(np.arange(90) % 3)) for _ in range(2))
    assert one.ridges == two.ridges
    assert torch.equal(one.image_DP, two.image_DP)
    assert torch.equal(one.text_DQ, two.text_DQ)


def test_the_basis_is_at_a_right_angle_to_the_mean() -> None:
    image, _ = drawn(50)
    side = Side.of(image, "image")
    assert float((side.basis_PP.T @ image.mean(0)).abs().max()) < 1e-10
    assert float(side.variance_P.min()) >= 0


def test_rounds_hold_out_each_fold_until_it_is_enough() -> None:
    few = canonical.rounds(np.arange(900) % 5)
    assert [len(held) for _, held in few] == [180] * 5
    assert sorted(np.concatenate([held for _, held in few])) == list(range(900))
    many = canonical.rounds(np.arange(20_000) % 5)
    assert [len(held) for _, held in many] == [canonical.ENOUGH // 2] * 2
    for seen, held in (*few, *many):
        assert not set(seen % 5) & set(held % 5)
        assert len(seen) == (720 if len(held) == 180 else 16_000)
