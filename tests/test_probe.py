"""Classifiers on features: equal to scikit-learn's in plain words, chosen without a look at what they are tried on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from cytoclip import probe
from cytoclip.probe import Known

Array = NDArray[Any]


def drawn(pictures: int, classes: int, seed: int = 0, clarity: float = 1.0, width: int = 12) -> tuple[Array, Array]:
    """Unit features whose mean tells the class."""
    random = np.random.default_rng(seed)
    middles = np.random.default_rng(99).normal(size=(classes, width))
    labels = random.permutation(np.arange(pictures) % classes)
    rows = random.normal(size=(pictures, width)) + clarity * middles[labels] + 1
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def known(rows: Array, labels: Array, classes: int | None = None, clusters: Array | None = None) -> Known:
    return Known(rows, labels, np.arange(len(rows)) if clusters is None else clusters, classes or labels.max() + 1)


@pytest.mark.parametrize("classes", [2, 4])
def test_a_probe_is_logistic_regression_on_standardised_features(classes: int) -> None:
    rows, labels = drawn(120, classes)
    tried, _ = drawn(50, classes, seed=1)
    found = probe.fitted(known(rows, labels), probe.Scaling.of(rows), tried, 0.1, "given")
    scaler = StandardScaler().fit(rows)
    twin = LogisticRegression(C=0.1, max_iter=1000, tol=1e-6).fit(scaler.transform(rows).astype(np.float64), labels)
    powers = np.exp(found.logits_NC - found.logits_NC.max(axis=1, keepdims=True))
    assert powers / powers.sum(axis=1, keepdims=True) == pytest.approx(
        twin.predict_proba(scaler.transform(tried)), abs=2e-3
    )
    assert found.converged


def test_a_class_that_was_not_seen_is_never_said() -> None:
    rows, labels = drawn(60, 3)
    found = probe.linear(known(rows, labels * 2, classes=6), rows, seed=0)
    assert np.isneginf(found.logits_NC[:, [1, 3, 5]]).all()
    assert np.isfinite(found.logits_NC[:, [0, 2, 4]]).all()
    assert np.mean(found.logits_NC.argmax(axis=1) == labels * 2) > 0.9


def test_a_constant_feature_is_nothing() -> None:
    rows, _ = drawn(60, 2)
    jitter = np.where(np.arange(60) % 2, np.float32(0.3), np.nextafter(np.float32(0.3), np.float32(1)))
    padded = np.concatenate([rows, jitter[:, None]], axis=1)
    assert probe.Scaling.of(padded).of_rows(padded)[:, -1] == pytest.approx(0, abs=1e-6)


def test_the_strength_is_chosen_by_clusters() -> None:
    """Each cluster has a mark of its own and noise for labels: only folds that cut clusters see what to learn."""
    random = np.random.default_rng(0)
    clusters = np.repeat(np.arange(30), 8)
    marks = random.normal(size=(30, 40))
    rows = (marks[clusters] + 0.01 * random.normal(size=(240, 40))).astype(np.float32)
    labels = random.integers(2, size=30)[clusters]
    seen = known(rows, labels, clusters=clusters)
    for rest, held_out in probe._folds(seen, seed=0):
        assert not set(clusters[rest]) & set(clusters[held_out])
    assert len(probe._folds(seen, seed=0)) == 3
    apart = known(rows, labels)
    by_cluster, by_picture = probe.linear(seen, rows, 0).strength, probe.linear(apart, rows, 0).strength
    assert by_cluster != by_picture


def test_what_cannot_be_chosen_is_given() -> None:
    rows, labels = drawn(4, 2)
    for some in (known(rows, labels), known(*drawn(40, 2), clusters=np.arange(40) % 2)):
        found = probe.linear(some, rows, seed=0)
        assert found.strength == probe.PLAIN
        assert found.chosen_by.startswith("given")


def test_rare_classes_and_many_pictures_do_not_stop_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CHOOSE_ON", 50)
    rows, labels = drawn(200, 2)
    labels[0] = 2
    clusters = np.arange(200) // 4
    found = probe.linear(known(rows, labels, clusters=clusters), rows, seed=0)
    assert found.chosen_by == "3 folds of 48 pictures"
    chosen = probe._whole_clusters(clusters, 50, seed=1)
    assert len(chosen) == 48
    assert all(np.isin(np.flatnonzero(clusters == clusters[row]), chosen).all() for row in chosen)
    assert (chosen != probe._whole_clusters(clusters, 50, seed=2)).any()


def test_a_probe_that_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_STEPS", 5)
    rows, labels = drawn(200, 3, clarity=0.2)
    assert not probe.fitted(known(rows, labels), probe.Scaling.of(rows), rows, 10.0, "given").converged


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_neighbours_equal_scikit_learns(block: int) -> None:
    rows, labels = drawn(90, 3, clarity=0.3)
    tried, _ = drawn(40, 3, seed=1, clarity=0.3)
    twin = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / probe.TEMPERATURE)
    ).fit(rows, labels)
    assert probe.neighbours(known(rows, labels), tried, block) == pytest.approx(twin.predict_proba(tried), abs=1e-4)


def test_fewer_pictures_than_neighbours_all_vote() -> None:
    rows, labels = drawn(6, 2)
    assert probe.neighbours(known(rows, labels, classes=3), rows).sum(axis=1) == pytest.approx(1)
    assert (probe.neighbours(known(rows, labels, classes=3), rows)[:, 2] == 0).all()


def test_few_takes_as_many_of_each_class() -> None:
    labels = np.array([0] * 10 + [3] * 2 + [1] * 5)
    rows = probe.few(labels, 4, seed=0)
    assert np.bincount(labels[rows]).tolist() == [4, 4, 0, 2]
    assert len(set(rows)) == len(rows)
    assert (rows == probe.few(labels, 4, seed=0)).all()
    assert any((rows != probe.few(labels, 4, seed)).any() for seed in range(1, 4))


def test_mean_and_spread() -> None:
    assert probe.mean_and_spread([0.25, 0.75]) == (0.5, pytest.approx(0.5 / 2**0.5))
    assert probe.mean_and_spread([0.25]) == (0.25, None)


def test_neighbours_that_are_equally_near_share_a_place_in_any_order() -> None:
    """Trap 21: of a hundred equal pictures the first twenty would vote."""
    rows = np.zeros((100, 8), np.float32)
    rows[:, 0] = 1
    rows[:4] = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0][:4]
    rows[0] = (0.8, 0.6, 0, 0, 0, 0, 0, 0)
    labels = np.arange(100) % 2
    for order in (np.arange(100), np.arange(100)[::-1], np.random.default_rng(1).permutation(100)):
        of_all = known(rows[order], labels[order])
        equal, near = probe.neighbours(of_all, np.stack([rows[50], rows[0]]))
        assert equal == pytest.approx([0.5, 0.5])
        itself, others = math.exp(1 / probe.TEMPERATURE), 19 * math.exp(0.8 / probe.TEMPERATURE)
        assert near == pytest.approx(np.array([itself + others / 2, others / 2]) / (itself + others))
