"""Metrics by class equal scikit-learn's and an enumeration; ties are expectations; intervals equal a slow bootstrap."""

from __future__ import annotations

import itertools
import json
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn import metrics

from cytoclip import classification
from cytoclip.classification import METRICS, Truth

Array = NDArray[Any]


def truth(labels: Array, classes: int, clusters: Array | None = None, resamples: int = 0, seed: int = 0) -> Truth:
    own = np.arange(len(labels)) if clusters is None else clusters
    return Truth(np.asarray(labels), own, [f"class {c}" for c in range(classes)], resamples, seed)


def drawn(pictures: int, classes: int, seed: int, whole: bool = False) -> tuple[Array, Array]:
    """Scores that know a little, and labels; whole numbers tie often."""
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=pictures)
    scores = random.normal(size=(pictures, classes)) + 0.8 * np.eye(classes)[labels]
    return (np.round(scores) if whole else scores), labels


def by_enumeration(scores: Array, labels: Array, classes: int) -> dict[str, float]:
    """Every metric in the plainest words: all choices among tied classes, all pairs of an own and another picture."""
    confusion = np.zeros((classes, classes))
    for row, label in zip(scores, labels, strict=True):
        best = [c for c in range(classes) if row[c] == max(row)]
        for c in best:
            confusion[label, c] += 1 / len(best)
    recalls, f1s, aurocs = [], [], []
    for c in range(classes):
        if c not in labels:
            continue
        recalls.append(confusion[c, c] / confusion[c].sum())
        f1s.append(2 * confusion[c, c] / (confusion[c].sum() + confusion[:, c].sum()))
        own, other = scores[labels == c, c], scores[labels != c, c]
        won = [1.0 if a > b else 0.5 if a == b else 0.0 for a in own for b in other]
        if won:
            aurocs.append(sum(won) / len(won))
    return {
        "accuracy": float(np.trace(confusion)) / len(labels),
        "balanced_accuracy": float(np.mean(recalls)),
        "macro_f1": float(np.mean(f1s)),
        "auroc": float(np.mean(aurocs)) if aurocs else math.nan,
    }


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_every_metric_equals_scikit_learns(classes: int, seed: int) -> None:
    scores, labels = drawn(150, classes, seed)
    margin = classification.margins(scores)
    found = classification.measure(scores, margin, truth(labels, classes))
    guess = scores.argmax(axis=1)
    powers = np.exp(scores)
    chances = powers / powers.sum(axis=1, keepdims=True)
    area = {"y_score": chances[:, 1]} if classes == 2 else {"y_score": chances, "multi_class": "ovr"}
    assert found.values == {
        "accuracy": pytest.approx(metrics.accuracy_score(labels, guess)),
        "balanced_accuracy": pytest.approx(metrics.balanced_accuracy_score(labels, guess)),
        "macro_f1": pytest.approx(metrics.f1_score(labels, guess, average="macro")),
        "auroc": pytest.approx(metrics.roc_auc_score(labels, **area)),
    }
    assert (found.confusion_CC == metrics.confusion_matrix(labels, guess)).all()
    report = metrics.precision_recall_fscore_support(labels, guess)
    for name, column in zip(("precision", "recall", "f1"), report[:3], strict=True):
        assert found.by_class[name] == pytest.approx(column)


@pytest.mark.parametrize(("classes", "seed"), list(itertools.product([2, 4], range(4))))
def test_ties_are_expectations(classes: int, seed: int) -> None:
    scores, labels = drawn(40, classes, seed, whole=True)
    assert sum(len(set(row)) < classes for row in scores) >= 5
    found = classification.measure(scores, scores, truth(labels, classes)).values
    assert found == pytest.approx(by_enumeration(scores, labels, classes))


def test_a_constant_model_has_exactly_chance() -> None:
    labels = np.array([0] * 5 + [1] * 3 + [2] * 9)
    random = np.random.default_rng(0)
    picture = np.tile(random.normal(size=(1, 24)), (17, 1))
    same_class = np.tile(random.normal(size=(1, 24)), (3, 1))
    scores = classification.class_scores(picture, same_class)
    wanted = truth(labels, 3)
    chance = classification.knowing_nothing(wanted)
    found = classification.measure(scores, classification.margins(scores), wanted)
    assert found.values == chance.values
    assert (found.confusion_CC == chance.confusion_CC).all()
    assert found.values["accuracy"] == pytest.approx(1 / 3, abs=1e-15)
    assert found.values["balanced_accuracy"] == pytest.approx(1 / 3, abs=1e-15)
    assert found.values["auroc"] == 0.5
    one_picture = classification.class_scores(picture, random.normal(size=(3, 24)))
    ranked = classification.measure(one_picture, classification.margins(one_picture), wanted)
    assert ranked.values["auroc"] == 0.5
    assert ranked.values["balanced_accuracy"] == pytest.approx(1 / 3)


def test_equal_rows_score_equal_wherever_they_stand() -> None:
    """Columns and rows of one product may differ in their last bits by where they stand."""
    random = np.random.default_rng(1)
    pictures, classes = random.normal(size=(37, 129)).astype(np.float32), random.normal(size=(5, 129))
    doubled, columns = pictures[[*range(37), *range(37)]], classes[[0, 1, 2, 3, 4, 0, 1]]
    scores = classification.class_scores(doubled, columns)
    assert (scores[:37] == scores[37:]).all()
    assert (scores[:, :2] == scores[:, 5:]).all()
    assert scores == pytest.approx(doubled.astype(float) @ columns.T)


def test_margins_rank_as_probabilities_and_further() -> None:
    scores, _ = drawn(200, 5, 0)
    powers = np.exp(scores)
    chances = powers / powers.sum(axis=1, keepdims=True)
    assert classification.margins(scores) == pytest.approx(np.log(chances / (1 - chances)))
    far = classification.margins(np.array([[900.0, 0.0, 1.0], [901.0, 0.0, 1.0], [0.0, -np.inf, 3.0]]))
    assert np.isfinite(far[:2]).all()
    assert far[1, 0] > far[0, 0]
    assert far[2, 1] == -np.inf
    assert classification.margins(np.array([[1.0, 4.0]])).tolist() == [[-3.0, 3.0]]


@pytest.mark.parametrize("whole", [False, True])
def test_resamples_equal_a_slow_bootstrap(whole: bool) -> None:
    """Each resample is a list of pictures, measured by enumeration as if it were a set of its own."""
    scores, labels = drawn(30, 3, 5, whole)
    clusters = np.random.default_rng(2).integers(8, size=30)
    clusters = np.unique(clusters, return_inverse=True)[1]
    count = clusters.max() + 1
    found = classification.measure(scores, scores, truth(labels, 3, clusters, resamples=40, seed=9))
    random = np.random.default_rng(9)
    for r in range(40):
        rows = np.concatenate([np.flatnonzero(clusters == g) for g in random.integers(count, size=count)])
        twin = by_enumeration(scores[rows], labels[rows], 3)
        assert {name: found.resampled[name][r] for name in METRICS} == pytest.approx(twin, nan_ok=True)
    low, high = classification.interval(found.resampled["accuracy"]) or (0, 0)
    assert [low, high] == pytest.approx(np.percentile(found.resampled["accuracy"], [2.5, 97.5]))
    shares = found.shares_RCC
    assert shares is not None
    assert np.diagonal(shares, axis1=1, axis2=2) == pytest.approx(found.resampled_by_class["recall"], nan_ok=True)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels = drawn(50, 3, 0)
    wanted = truth(labels, 3, resamples=30)
    whole = classification.measure(scores, scores, wanted)
    monkeypatch.setattr(classification, "_BLOCK", 350)
    parts = classification.measure(scores, scores, wanted)
    assert all((whole.resampled[name] == parts.resampled[name]).all() for name in METRICS)


def test_clusters_widen_the_interval() -> None:
    """Twenty copies of each picture in one cluster say no more than the picture alone."""
    scores, labels = drawn(40, 2, 3)
    copies = np.repeat(np.arange(40), 20)
    alone = classification.measure(scores, scores, truth(labels, 2, resamples=300))
    together = classification.measure(scores[copies], scores[copies], truth(labels[copies], 2, copies, 300))
    apart = classification.measure(scores[copies], scores[copies], truth(labels[copies], 2, resamples=300))
    widths = [np.subtract(*(classification.interval(one.resampled["accuracy"]) or (0, 0))[::-1])
              for one in (alone, together, apart)]  # fmt: skip
    assert widths[0] == pytest.approx(widths[1])
    assert widths[2] < widths[0] / 3


def test_the_interval_covers_the_truth() -> None:
    """Of 200 sets from a classifier that is right 7 times in 10, about 95 % of intervals hold 0.7."""
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        labels = random.integers(2, size=120)
        right = random.random(120) < 0.7
        scores = np.eye(2)[np.where(right, labels, 1 - labels)]
        found = classification.measure(scores, scores, truth(labels, 2, resamples=200, seed=seed))
        low, high = classification.interval(found.resampled["accuracy"]) or (0, 0)
        covered += low <= 0.7 <= high
    assert 180 <= covered <= 198


def test_what_is_undefined_is_null_and_says_why() -> None:
    scores, labels = drawn(20, 3, 0)
    labels = np.where(labels == 2, 1, labels)
    scores[:, 2] = -9
    wanted = truth(labels, 3, resamples=20)
    written = classification.document(
        classification.measure(scores, scores, wanted), classification.knowing_nothing(wanted), wanted
    )
    json.dumps(written, allow_nan=False)
    assert written["auroc"]["value"] is not None
    absent = written["by_class"]["class 2"]
    assert absent["pictures"] == 0
    assert absent["auroc"] == {"value": None, "interval": None, "why": "no picture has it"}
    assert absent["recall"]["why"] == "no picture has it"
    assert absent["precision"]["why"] == "no picture is predicted as it"
    assert written["confusion_interval"][2] == [None, None, None]
    alone = truth(np.zeros(20, int), 3, np.zeros(20, int), resamples=20)
    written = classification.document(
        classification.measure(scores, scores, alone), classification.knowing_nothing(alone), alone
    )
    assert written["auroc"] == {"value": None, "interval": None, "chance": None, "why": "only one class has pictures"}
    assert written["accuracy"]["interval"] is None, "one cluster cannot vary"
    assert written["by_class"]["class 0"]["auroc"]["why"] == "every picture has it"


def test_absent_classes_are_left_out_of_means_as_the_enumeration_says() -> None:
    scores, labels = drawn(30, 5, 4)
    labels = labels % 3
    found = classification.measure(scores, scores, truth(labels, 5)).values
    assert found == pytest.approx(by_enumeration(scores, labels, 5))


def test_matrices_of_many_classes_are_not_held_for_every_resample() -> None:
    """1,000 resamples of 700 x 700 would be 3.9 GB."""
    scores, labels = drawn(100, 700, 0)
    wanted = truth(labels, 700, resamples=100)
    tracemalloc.start()
    found = classification.measure(scores, scores, wanted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.resampled["accuracy"]) == 100
    assert peak < 250_000_000


def test_many_classes_have_no_intervals_of_cells() -> None:
    scores, labels = drawn(120, classification.CELLS + 1, 0)
    wanted = truth(labels, classification.CELLS + 1, resamples=5)
    found = classification.measure(scores, scores, wanted)
    assert found.shares_RCC is None
    assert classification.document(found, found, wanted)["confusion_interval"] is None
