"""How well pictures are told apart by class: metrics from scores, exact under ties, with bootstrap intervals; pure.

Where several classes score highest, each is predicted by an equal share: the expectation over a random choice among
them. A model that scores all classes the same then has exactly chance in every metric.

Letters: N pictures, C classes, D embedding, G clusters, R resamples, r of them in a block, E predictions (one a
picture, more where classes tie).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc")
BY_CLASS = ("recall", "precision", "f1", "auroc")
CELLS = 50  # classes up to which each cell of the confusion matrix has an interval: nobody reads 2,500 of them
_BLOCK = 1_000_000  # weights of pictures held at once: 4 MB, which a CPU's cache about holds
_CELLS_AT_ONCE = 8_000_000  # of confusion matrices: 64 MB

_TAILS = (0.025, 0.975)

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
Weights = NDArray[np.int32]  # their sums are at most N


@dataclass(frozen=True)
class Truth:
    """What the pictures are, and how they are drawn anew for intervals.

    Parameters
    ----------
    label_N
        int64: the class of each picture.
    cluster_N
        int64, 0 to G - 1: pictures that are drawn together, such as those of one patient.
    classes
        The names of all C classes; some may have no picture.
    resamples, seed
        Equal seeds draw equal resamples, so that the intervals of two classifiers belong together.
    """

    label_N: Whole
    cluster_N: Whole
    classes: Sequence[str]
    resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """Metrics of one classifier; NaN where one is undefined.

    Parameters
    ----------
    confusion_CC
        Expected counts: row is the true class, column the predicted one.
    values
        Of each of `METRICS`.
    by_class
        Of each of `BY_CLASS`, (C,).
    resampled, resampled_by_class
        The same in each resample, (R,) and (R, C); R is 0 where there is one cluster, which cannot vary.
    shares_RCC
        Rows of the confusion matrix as shares, in each resample; of no more than `CELLS` classes.
    """

    confusion_CC: Floats
    values: Mapping[str, float]
    by_class: Mapping[str, Floats]
    resampled: Mapping[str, Floats]
    resampled_by_class: Mapping[str, Floats]
    shares_RCC: Floats | None


def class_scores(image_ND: NDArray[Any], class_CD: NDArray[Any]) -> Floats:
    """Cosine of each picture with each class, (N, C), of unit embeddings.

    Products of different shapes, and two columns of one product, may differ in their last bits; equal pictures and
    equal classes are therefore scored once, so that their ties are exact.
    """
    image_UD, image_N = _distinct(image_ND)
    class_UD, class_C = _distinct(class_CD)
    scores_UU: Floats = image_UD @ class_UD.T
    scores_NC: Floats = scores_UU[image_N[:, None], class_C]
    return scores_NC


def margins(logits_NC: NDArray[Any]) -> Floats:
    """Log odds of each class under a softmax of the logits, (N, C): what one against the rest is ranked by.

    They rank as the probabilities do, and unlike those they do not become equal near 0 and 1. Of two classes they are
    the difference of the logits. A logit of -inf (a class that a classifier does not know) stays that.
    """
    if logits_NC.shape[1] == 2:
        ahead_N = logits_NC[:, 1].astype(np.float64) - logits_NC[:, 0]
        return np.stack([-ahead_N, ahead_N], axis=1)
    shifted_NC = logits_NC.astype(np.float64) - logits_NC.max(axis=1, keepdims=True)
    powers_NC = np.exp(shifted_NC)
    rest_NC = powers_NC.sum(axis=1, keepdims=True) - powers_NC  # cancels for the best class alone
    rows_N, best_N = np.arange(len(shifted_NC)), shifted_NC.argmax(axis=1)
    rest_NC[rows_N, best_N] = 1
    odds_NC: Floats = shifted_NC - np.log(rest_NC)
    shifted_NC[rows_N, best_N] = -np.inf
    second_N = shifted_NC.max(axis=1)
    odds_NC[rows_N, best_N] = -second_N - np.log(np.exp(shifted_NC - second_N[:, None]).sum(axis=1))
    return odds_NC


def measure(scores_NC: NDArray[Any], margin_NC: NDArray[Any], truth: Truth) -> Measured:
    """All metrics and their resamples: clusters are drawn with replacement, as many as there are.

    Balanced accuracy, macro F1 and macro AUROC are means over the classes that have a picture; AUROC is one class
    against the rest. The AUROC of a resample is exact: with integer weights, from ranks sorted once. Its cost is
    R × C × N, that of all else R × N.

    Parameters
    ----------
    scores_NC
        The highest is the prediction.
    margin_NC
        What each class is ranked by, against the rest.
    """
    entries, rankings = _predictions(scores_NC, truth), _rankings(margin_NC, truth)
    ones_1N = np.ones((1, len(truth.label_N)), np.int32)
    confusion_1CC, auroc_1C = _confusions(entries, ones_1N), _aurocs(rankings, ones_1N)
    by_class, values = _metrics(confusion_1CC, auroc_1C)
    few = len(truth.classes) <= CELLS
    parts, shares = [], []
    for weight_rN in _weights(truth):
        confusion_rCC = _confusions(entries, weight_rN)
        parts.append(_metrics(confusion_rCC, _aurocs(rankings, weight_rN)))
        shares += [_shares(confusion_rCC)] if few else []
    return Measured(
        confusion_1CC[0],
        {name: float(values[name][0]) for name in METRICS},
        {name: by_class[name][0] for name in BY_CLASS},
        {name: _joined([part[1][name] for part in parts], ()) for name in METRICS},
        {name: _joined([part[0][name] for part in parts], (len(truth.classes),)) for name in BY_CLASS},
        _joined(shares, confusion_1CC.shape[1:]) if few else None,
    )


def document(measured: Measured, chance: Measured, truth: Truth) -> dict[str, Any]:
    """Plain data for JSON: each metric with its 95 % interval and chance, the confusion matrix, and every class.

    A metric that is undefined is None, and `why` says what it lacks; an interval is None where there is one cluster.
    """
    support_C = np.bincount(truth.label_N, minlength=len(truth.classes))
    metrics = {
        name: {
            "value": _plain(measured.values[name]),
            "interval": interval(measured.resampled[name]),
            "chance": _plain(chance.values[name]),
            **({"why": "only one class has pictures"} if np.isnan(measured.values[name]) else {}),
        }
        for name in METRICS
    }
    shares, places = measured.shares_RCC, range(len(truth.classes))
    bounds = None if shares is None else [[interval(shares[:, c, guess]) for guess in places] for c in places]
    return {
        **metrics,
        "confusion": measured.confusion_CC.tolist(),
        "confusion_interval": bounds,
        "by_class": {
            name: {
                "pictures": int(support_C[c]),
                **{
                    key: {
                        "value": _plain(measured.by_class[key][c]),
                        "interval": interval(measured.resampled_by_class[key][:, c]),
                        **_undefined(key, measured.by_class[key][c], int(support_C[c])),
                    }
                    for key in BY_CLASS
                },
            }
            for c, name in enumerate(truth.classes)
        },
    }


def knowing_nothing(truth: Truth) -> Measured:
    """What equal scores for everything measure: chance."""
    equal_NC = np.zeros((len(truth.label_N), len(truth.classes)))
    return measure(equal_NC, equal_NC, replace(truth, resamples=0))


def interval(values_R: Floats) -> list[float] | None:
    """The middle 95 % of the resamples in which a metric is defined (the percentile bootstrap)."""
    defined = values_R[~np.isnan(values_R)]
    return [float(bound) for bound in np.quantile(defined, _TAILS)] if len(defined) else None


def _undefined(key: str, value: float, support: int) -> dict[str, str]:
    if not np.isnan(value):
        return {}
    if key == "precision":
        return {"why": "no picture is predicted as it"}
    return {"why": "no picture has it" if not support else "every picture has it"}


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _distinct(rows_ND: NDArray[Any]) -> tuple[Floats, Whole]:
    """The different rows, and which of them each row is."""
    plain_ND = np.ascontiguousarray(rows_ND, np.float64) + 0.0  # -0 becomes 0: they are compared as bytes
    as_one = plain_ND.view(np.dtype((np.void, plain_ND.shape[1] * 8))).ravel()
    _, first, of = np.unique(as_one, return_index=True, return_inverse=True)
    return plain_ND[first], of


@dataclass(frozen=True)
class _Entries:
    """Predictions: their picture's cell of the confusion matrix, their share, and their picture, each (E,)."""

    cell_E: Whole
    share_E: Floats
    picture_E: Whole
    classes: int


@dataclass(frozen=True)
class _Ranking:
    """Pictures by their margin for one class, and its own among them.

    Parameters
    ----------
    order_N
        Of the pictures, the lowest margin first.
    own_n
        Where in that order the class's own pictures are.
    begin_n, end_n
        Where the pictures begin and end that tie with each of them.
    own_begin_n, own_end_n
        The same among its own pictures only.
    """

    order_N: Whole
    own_n: Whole
    begin_n: Whole
    end_n: Whole
    own_begin_n: Whole
    own_end_n: Whole


def _predictions(scores_NC: NDArray[Any], truth: Truth) -> _Entries:
    best_NC = scores_NC == scores_NC.max(axis=1, keepdims=True)
    picture_E, guess_E = np.nonzero(best_NC)
    share_E = 1 / best_NC.sum(axis=1)[picture_E]
    classes = len(truth.classes)
    return _Entries(truth.label_N[picture_E] * classes + guess_E, share_E, picture_E, classes)


def _rankings(margin_NC: NDArray[Any], truth: Truth) -> list[_Ranking]:
    found = []
    for c in range(len(truth.classes)):
        order = np.argsort(margin_NC[:, c], kind="stable")
        sorted_N = margin_NC[order, c]
        own = np.flatnonzero(truth.label_N[order] == c)
        values = sorted_N[own]
        found.append(
            _Ranking(
                order,
                own,
                *(np.searchsorted(where, values, side) for where in (sorted_N, values) for side in ("left", "right")),
            )
        )
    return found


def _weights(truth: Truth) -> Iterator[Weights]:
    """How often each picture is in each resample, a block (r, N) at a time."""
    clusters = int(truth.cluster_N.max()) + 1
    if clusters < 2:
        return
    random = np.random.default_rng(truth.seed)
    block = max(1, min(_BLOCK // len(truth.label_N), _CELLS_AT_ONCE // len(truth.classes) ** 2))
    for begin in range(0, truth.resamples, block):
        rows = range(min(block, truth.resamples - begin))
        drawn_rG = np.stack([np.bincount(random.integers(clusters, size=clusters), minlength=clusters) for _ in rows])
        yield drawn_rG.astype(np.int32).take(truth.cluster_N, axis=1)


def _confusions(entries: _Entries, weight_rN: Weights) -> Floats:
    cells = entries.classes**2
    flat_rX = np.empty((len(weight_rN), cells))
    for row, weight_N in zip(flat_rX, weight_rN, strict=True):
        row[:] = np.bincount(entries.cell_E, weight_N[entries.picture_E] * entries.share_E, cells)
    return flat_rX.reshape(-1, entries.classes, entries.classes)


def _aurocs(rankings: Sequence[_Ranking], weight_rN: Weights) -> Floats:
    """P(own > other) + P(own = other) / 2 with every picture counted as often as its weight says, (r, C)."""
    found = np.full((len(weight_rN), len(rankings)), np.nan)
    for c, ranking in enumerate(rankings):
        if not len(ranking.own_n):
            continue
        sorted_rN = weight_rN.take(ranking.order_N, axis=1)  # twice as fast as [:, …]
        own_rn = sorted_rN.take(ranking.own_n, axis=1)
        below_rN, own_below_rn = _sums_before(sorted_rN), _sums_before(own_rn)
        beaten_rn = below_rN.take(ranking.begin_n, axis=1) + below_rN.take(
            ranking.end_n, axis=1
        )  # twice: ties count half
        beaten_rn -= own_below_rn.take(ranking.own_begin_n, axis=1) + own_below_rn.take(ranking.own_end_n, axis=1)
        own_r, all_r = own_below_rn[:, -1], below_rN[:, -1]
        pairs_r = (2.0 * own_r) * (all_r - own_r)
        won_r = np.einsum("rn,rn->r", own_rn, beaten_rn, dtype=np.float64)
        np.divide(won_r, pairs_r, out=found[:, c], where=pairs_r > 0)
    return found


def _sums_before(weight_rN: Weights) -> Weights:
    """Cumulative sums with a 0 before the first, (r, N + 1)."""
    sums = np.zeros((weight_rN.shape[0], weight_rN.shape[1] + 1), np.int32)
    np.cumsum(weight_rN, axis=1, dtype=np.int32, out=sums[:, 1:])
    return sums


def _metrics(confusion_rCC: Floats, auroc_rC: Floats) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """By class (r, C), and over all classes (r,)."""
    right_rC = np.diagonal(confusion_rCC, axis1=1, axis2=2)
    support_rC, guessed_rC = confusion_rCC.sum(axis=2), confusion_rCC.sum(axis=1)
    known = support_rC > 0
    by_class = {
        "recall": _ratio(right_rC, support_rC, known),
        "precision": _ratio(right_rC, guessed_rC, guessed_rC > 0),
        "f1": _ratio(2 * right_rC, support_rC + guessed_rC, known),
        "auroc": auroc_rC,
    }
    return by_class, {
        "accuracy": right_rC.sum(axis=1) / support_rC.sum(axis=1),
        "balanced_accuracy": _mean(by_class["recall"]),
        "macro_f1": _mean(by_class["f1"]),
        "auroc": _mean(auroc_rC),
    }


def _ratio(above: Floats, below: Floats, where: NDArray[np.bool_]) -> Floats:
    found: Floats = np.divide(above, below, out=np.full(above.shape, np.nan), where=where)
    return found


def _mean(values_rC: Floats) -> Floats:
    """Over the classes for which it is defined."""
    defined = ~np.isnan(values_rC)
    counts = defined.sum(axis=1)
    return _ratio(np.where(defined, values_rC, 0).sum(axis=1), counts, counts > 0)


def _shares(confusion_rCC: Floats) -> Floats:
    support = confusion_rCC.sum(axis=2, keepdims=True)
    return _ratio(
        confusion_rCC, np.broadcast_to(support, confusion_rCC.shape), np.broadcast_to(support > 0, confusion_rCC.shape)
    )


def _joined(parts: Sequence[Floats], shape: tuple[int, ...]) -> Floats:
    return np.concatenate(parts) if parts else np.zeros((0, *shape))
