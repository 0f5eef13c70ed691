"""Two projections in closed form: regularised canonical correlations of what two towers say of the same pairs.

Letters: N pairs, P and Q the towers' widths, D embedding, R ≤ D components.

Where a picture's features x and a caption's features t are jointly normal, the directions along which they correlate
most (Hotelling 1936, doi 10.2307/2333955) carry all that one says of the other. A ridge on each side's covariance holds
down directions that few pairs have shown (Vinod 1976, doi 10.1016/0304-4076(76)90010-5), and each component is weighted
by a power of its correlation, as arXiv 1212.4522 does for retrieval. The ridges are chosen by how well pairs that a fit
has not seen are told apart.

A linear projection has no bias to take the mean away with, and cosines suffer from a common mean (docs/log.md: it
cost two thirds of the score). So the whole direction of the mean is taken away, one of P.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from cytoclip import retrieval
from cytoclip.errors import ExitCode, UserError
from cytoclip.pairs import Identity

RIDGES = (0.004, 0.012, 0.035, 0.1, 0.3, 1.0)  # tried on each side, times the mean variance of a direction
EVERY = list(product(RIDGES, RIDGES))
ENOUGH = 2_000  # pairs that are held out in all, half of them at once: an MRR is known to .01 by then
POWER = 2  # of a component's correlation, its weight on each side; 1, 3 and 4 were worse there (docs/log.md)

Round = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Fit:
    """Two projections, and how far they are to be trusted.

    Parameters
    ----------
    image_DP, text_DQ
        float64, each with the norm of the projection that it replaces, so that a learning rate means the same.
    ridges
        Of the image side and the text side.
    mrr, mrr_given
        Mean reciprocal rank of pairs held out of the fit, both directions and every right answer counted: by the fit,
        of which it is the best of `EVERY`, and by the projections that were there.
    """

    image_DP: torch.Tensor
    text_DQ: torch.Tensor
    ridges: tuple[float, float]
    mrr: float
    mrr_given: float

    @property
    def better(self) -> bool:
        """Whether it tells pairs that it has not seen apart better than what was there."""
        return self.mrr > self.mrr_given


def rounds(fold_N: NDArray[np.int64]) -> list[Round]:
    """Rows that are fitted and rows that are held out, fold by fold, until enough were held out."""
    found: list[Round] = []
    for fold in np.unique(fold_N):
        held = np.flatnonzero(fold_N == fold)
        if sum(len(rows) for _, rows in found) < ENOUGH:
            found.append((np.flatnonzero(fold_N != fold), held[:: -(-2 * len(held) // ENOUGH)]))
    return found


def fit(
    features: tuple[torch.Tensor, torch.Tensor],
    given: tuple[torch.Tensor, torch.Tensor],
    identity: Identity,
    rounds: Sequence[Round],
    advance: Callable[[], None] = lambda: None,
) -> Fit:
    """Projections for `features` (N, P) and (N, Q), in place of those `given`, (D, P) and (D, Q).

    Parameters
    ----------
    identity
        Of the N pairs, as numpy arrays.
    rounds
        In which ridges are compared: one or more (`rounds`).
    advance
        Called after each of `EVERY` in each round.

    Raises
    ------
    UserError
        Where a tower says the same of all pairs.
    """
    image_NP, text_NQ, given_DP, given_DQ = (each.double().cpu() for each in (*features, *given))
    whole = Correlated.of(image_NP, text_NQ)
    ridges, mrr, before = _chosen(image_NP, text_NQ, (given_DP, given_DQ), identity, rounds, advance)
    image_PR, text_QR = whole.weighted(ridges, len(given_DP))
    return Fit(_spread_out(image_PR, given_DP), _spread_out(text_QR, given_DQ), ridges, mrr, before)


@dataclass(frozen=True)
class Side:
    """Second moments of one side in the basis of its own variance, the direction of its mean taken away.

    Parameters
    ----------
    basis_PP
        The directions, as columns, each at a right angle to the mean.
    variance_P
        Along each of them.
    """

    basis_PP: torch.Tensor
    variance_P: torch.Tensor

    @classmethod
    def of(cls, rows_NP: torch.Tensor, tower: str) -> Side:
        mean_P = rows_NP.mean(0)
        unit_P = mean_P / mean_P.norm().clamp_min(torch.finfo(mean_P.dtype).tiny)
        level_PP = torch.eye(len(mean_P), dtype=mean_P.dtype) - torch.outer(unit_P, unit_P)
        level_NP = rows_NP @ level_PP
        variance_P, basis_PP = torch.linalg.eigh(level_NP.T @ level_NP / len(rows_NP))
        if variance_P.sum() <= 1e-12 * rows_NP.square().sum() / len(rows_NP):
            raise UserError(
                f"model.projections: fitted: the {tower} tower says the same of all {len(rows_NP)} pairs",
                "`cytoclip check` shows what the pairs are; or set model.projections=full",
                ExitCode.DATA,
            )
        return cls(level_PP @ basis_PP, variance_P.clamp_min(0))

    def shrunk(self, ridge: float) -> torch.Tensor:
        """What whitens each direction, (P,): 1 / √(variance + ridge · mean variance)."""
        return (self.variance_P + ridge * self.variance_P.mean()).rsqrt()


@dataclass(frozen=True)
class Correlated:
    """Both sides, and how their directions go together, (P, Q): all that a fit knows of its pairs."""

    image: Side
    text: Side
    together_PQ: torch.Tensor

    @classmethod
    def of(cls, image_NP: torch.Tensor, text_NQ: torch.Tensor) -> Correlated:
        image, text = Side.of(image_NP, "image"), Side.of(text_NQ, "text")
        together_PQ = (image_NP @ image.basis_PP).T @ (text_NQ @ text.basis_PP) / len(image_NP)
        return cls(image, text, together_PQ)

    def weighted(self, ridges: tuple[float, float], most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `most` canonical directions of each side as columns, (P, R) and (Q, R), weighted."""
        image_P, text_Q = self.image.shrunk(ridges[0]), self.text.shrunk(ridges[1])
        white_PQ = image_P[:, None] * self.together_PQ * text_Q
        # Eigenvectors of one side's product take a fifth of the time of singular vectors. What they lose, correlations
        # below 1e-8, weighs nothing; and a left vector is white · right ÷ ρ, of which ρ² leaves white · right · ρ.
        squared_Q, right_QQ = torch.linalg.eigh(white_PQ.T @ white_PQ)
        best_R = squared_Q.argsort(descending=True)[: min(most, *white_PQ.shape)]
        correlation_R, right_QR = squared_Q[best_R].clamp_min(0).sqrt(), right_QQ[:, best_R]
        image_PR = self.image.basis_PP @ (image_P[:, None] * (white_PQ @ right_QR)) * correlation_R ** (POWER - 1)
        text_QR = self.text.basis_PP @ (text_Q[:, None] * right_QR) * correlation_R**POWER
        # A pair of directions has no sign of its own: without this it would hang on the last bit of a feature.
        sign_R = image_PR.gather(0, image_PR.abs().argmax(0, keepdim=True)).sign()
        return image_PR * sign_R, text_QR * sign_R


def _chosen(
    image_NP: torch.Tensor,
    text_NQ: torch.Tensor,
    given: tuple[torch.Tensor, torch.Tensor],
    identity: Identity,
    rounds: Sequence[Round],
    advance: Callable[[], None],
) -> tuple[tuple[float, float], float, float]:
    """The ridges that are best on average over the rounds, their score, and that of the projections as they were."""
    scores_FK: list[list[float]] = []
    before: list[float] = []
    for seen, held in rounds:
        known, answers = Correlated.of(image_NP[seen], text_NQ[seen]), identity.take(held)
        sides = image_NP[held], text_NQ[held]
        scores_FK.append([])
        for ridges in EVERY:
            scores_FK[-1].append(_mrr(*sides, *known.weighted(ridges, len(given[0])), answers))
            advance()
        before.append(_mrr(*sides, given[0].T, given[1].T, answers))
    mean_K = np.mean(scores_FK, axis=0)
    best = int(mean_K.argmax())
    return EVERY[best], float(mean_K[best]), float(np.mean(before))


def _mrr(
    image_NP: torch.Tensor, text_NQ: torch.Tensor, image_PR: torch.Tensor, text_QR: torch.Tensor, identity: Identity
) -> float:
    ranked = retrieval.rank((image_NP @ image_PR).float(), (text_NQ @ text_QR).float(), identity, [1])
    return float(np.mean([each.groups["mrr"].mean() for each in ranked.values()]))


def _spread_out(columns_PR: torch.Tensor, given_DP: torch.Tensor) -> torch.Tensor:
    """(D, P) with the norm of `given_DP`: R components turned at random into D dimensions, the same for both sides.

    Cosines stay what they are; no dimension is left empty, and none holds most of an embedding.
    """
    drawn_DR = torch.randn(
        len(given_DP), columns_PR.shape[1], dtype=columns_PR.dtype, generator=torch.Generator().manual_seed(0)
    )
    turned_DP: torch.Tensor = torch.linalg.qr(drawn_DR)[0] @ columns_PR.T
    scaled_DP: torch.Tensor = turned_DP * (given_DP.norm() / turned_DP.norm())
    return scaled_DP
