"""What image features are worth to a simple classifier: a linear probe, nearest neighbours, and few labels a class.

Letters: N pictures to classify, M pictures to learn from, C classes, D embedding.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of LogisticRegression: the inverse of the regularisation
PLAIN = 1.0  # where there is too little to choose by
FOLDS = 3
CHOOSE_ON = 10_000  # pictures at most, to choose by: all 40,000 would take four times as long for the same choice
NEIGHBOURS = 20
_ALIKE = 1e-6  # apart in cosine, in float32, and no nearer than each other
TEMPERATURE = 0.07  # of the neighbours' votes, as Wu et al. (arXiv 1805.01978) and DINO (arXiv 2104.14294) have both
_STEPS = 1000  # of L-BFGS; those to choose a strength may stop after a fifth

Floats = NDArray[np.float32]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class Known:
    """Pictures with a label to learn from.

    Parameters
    ----------
    image_MD
        Unit embeddings, float32.
    label_M
        int64, 0 to `classes` - 1; some classes may have no picture.
    cluster_M
        int64: pictures of one source, which are never on both sides of a fold.
    """

    image_MD: Floats
    label_M: Whole
    cluster_M: Whole
    classes: int

    def take(self, rows: Whole) -> Known:
        return Known(self.image_MD[rows], self.label_M[rows], self.cluster_M[rows], self.classes)


@dataclass(frozen=True)
class Scaling:
    """Features moved and scaled to mean 0 and variance 1, as of the pictures it was made of."""

    mean_D: Floats
    scale_D: Floats

    @classmethod
    def of(cls, image_MD: Floats) -> Scaling:
        scale_D = image_MD.std(axis=0, dtype=np.float64)
        constant = scale_D < 1e-7  # of unit rows: rounding, which division would make a feature
        return cls(
            image_MD.mean(axis=0, dtype=np.float64).astype(np.float32),
            np.where(constant, 1, scale_D).astype(np.float32),
        )

    def of_rows(self, image_ND: Floats) -> Floats:
        return (image_ND - self.mean_D) / self.scale_D


@dataclass(frozen=True)
class Probed:
    """Logits of a linear probe (N, C), -inf for a class that it has not seen; how it was fitted."""

    logits_NC: NDArray[np.float64]
    strength: float
    chosen_by: str
    converged: bool


def linear(known: Known, image_ND: Floats, seed: int) -> Probed:
    """Multinomial logistic regression on standardised features, its strength chosen on the known pictures alone.

    By the balanced accuracy of 3 folds that keep clusters whole; of equal ones the strongest regularisation.
    """
    scaling = Scaling.of(known.image_MD)
    strength, chosen_by = _choose(known, seed)
    return fitted(known, scaling, image_ND, strength, chosen_by)


def fitted(known: Known, scaling: Scaling, image_ND: Floats, strength: float, chosen_by: str) -> Probed:
    """The same with a strength that is given; at least two classes are known."""
    model = _model(strength, _STEPS)
    converged = _fit(model, scaling.of_rows(known.image_MD), known.label_M)
    logits_NC = np.full((len(image_ND), known.classes), -np.inf)
    decided = model.decision_function(scaling.of_rows(image_ND)).astype(np.float64)
    two = decided.ndim == 1
    logits_NC[:, model.classes_] = np.stack([np.zeros_like(decided), decided], axis=1) if two else decided
    return Probed(logits_NC, strength, chosen_by, converged)


def neighbours(known: Known, image_ND: Floats, block: int = 1024) -> NDArray[np.float64]:
    """Each class's share (N, C) of the votes of the 20 nearest known pictures, by cosine.

    A vote weighs exp(cosine / 0.07); pictures as near as the 20th share its place, however many and in whatever order.
    Exact; with torch, since scikit-learn's brute search takes five times as long.
    """
    count = min(NEIGHBOURS, len(known.image_MD))
    known_MD, label_M = torch.from_numpy(known.image_MD), torch.from_numpy(known.label_M)
    shares = []
    for some_bD in torch.split(torch.from_numpy(image_ND), block):
        cosine_bM = some_bD @ known_MD.T
        near_bk, rows_bk = cosine_bM.topk(count, dim=1)
        votes_bk = torch.softmax(near_bk.double() / TEMPERATURE, dim=1)
        shares.append(
            torch.zeros(len(some_bD), known.classes, dtype=torch.float64).scatter_add_(1, label_M[rows_bk], votes_bk)
        )
        tied_b = (cosine_bM >= near_bk[:, -1:] - _ALIKE).sum(dim=1) > count
        for row in tied_b.nonzero()[:, 0].tolist():
            shares[-1][row] = _tied(cosine_bM[row].double(), label_M, count, known.classes)
    return torch.cat(shares).numpy()


def _tied(cosine_M: torch.Tensor, label_M: torch.Tensor, count: int, classes: int) -> torch.Tensor:
    """The shares (C,) where more known pictures than are left to vote are as near as the last that does."""
    away_M = cosine_M - cosine_M.topk(count).values[-1]
    within_M, at_M = away_M > _ALIKE, away_M.abs() <= _ALIKE
    places = (count - within_M.sum()) / at_M.sum()
    votes_M = (away_M / TEMPERATURE).exp() * (within_M + at_M * places)
    return torch.zeros(classes, dtype=torch.float64).scatter_add_(0, label_M, votes_M / votes_M.sum())


def few(label_M: Whole, shots: int, seed: int) -> Whole:
    """Rows of `shots` pictures of each class, or all where it has fewer, drawn by the seed."""
    random = np.random.default_rng([seed, shots])
    rows = [random.permutation(np.flatnonzero(label_M == label))[:shots] for label in np.unique(label_M)]
    return np.sort(np.concatenate(rows))


def _choose(known: Known, seed: int) -> tuple[float, str]:
    from sklearn.metrics import recall_score

    some = known.take(_whole_clusters(known.cluster_M, CHOOSE_ON, seed))
    folds = _folds(some, seed)
    if not folds:
        return PLAIN, "given: too few sources or pictures of a class to choose by"
    sums = np.zeros(len(STRENGTHS))
    for rest, held_out in folds:
        scaling = Scaling.of(some.image_MD[rest])
        learned, tried = scaling.of_rows(some.image_MD[rest]), scaling.of_rows(some.image_MD[held_out])
        model = _model(STRENGTHS[0], _STEPS // 5)
        for i, strength in enumerate(STRENGTHS):  # each goes on from the one before
            model.set_params(C=strength)
            _fit(model, learned, some.label_M[rest])
            truth = some.label_M[held_out]
            sums[i] += recall_score(
                truth, model.predict(tried), labels=np.unique(truth), average="macro", zero_division=0
            )
    return STRENGTHS[int(sums.argmax())], f"{len(folds)} folds of {len(some.label_M)} pictures"


def _folds(known: Known, seed: int) -> list[tuple[Whole, Whole]]:
    """(rest, held out) of each fold; those whose rest has fewer than two classes fall out."""
    from sklearn.model_selection import StratifiedGroupKFold

    counts = np.bincount(known.label_M)
    if len(np.unique(known.cluster_M)) < FOLDS or counts.max() < FOLDS:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer pictures than folds
        cut = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed % 2**32)
        folds = list(cut.split(known.image_MD, known.label_M, known.cluster_M))
    return [(rest, out) for rest, out in folds if len(out) and len(np.unique(known.label_M[rest])) > 1]


def _whole_clusters(cluster_M: Whole, most: int, seed: int) -> Whole:
    """Rows of clusters drawn by the seed until there are `most`; all of them where there are no more."""
    if len(cluster_M) <= most:
        return np.arange(len(cluster_M))
    clusters, sizes = np.unique(cluster_M, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(clusters))
    count = max(FOLDS, int(np.searchsorted(np.cumsum(sizes[order]), most, side="right")))
    return np.flatnonzero(np.isin(cluster_M, clusters[order[:count]]))


def _model(strength: float, steps: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=steps, warm_start=True)


def _fit(model: Any, features: Floats, labels: Whole) -> bool:
    """Whether it came to an end by itself."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # One thread: threads that wait for each other in many small products took 40 times as long on a busy machine.
    with warnings.catch_warnings(record=True) as said, threadpool_limits(1):
        warnings.simplefilter("always")
        model.fit(features, labels)
    return not any(issubclass(one.category, ConvergenceWarning) for one in said)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (of a sample) over seeds."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
