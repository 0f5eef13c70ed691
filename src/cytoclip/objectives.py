"""The losses of a global batch, from embeddings alone: value and gradient in closed form, in blocks of rows.

Letters: B pairs of the global batch, b pairs of this process, R rows of a block, D embedding.

r_ij = 1 where text j is right for image i, and C = I Tᵀ the cosines of unit embeddings. r is symmetric, so image and
text i have the same count n_i = Σ_j r_ij. The gradient at the embeddings is computed without a graph and without an
N×N matrix; what processes exchange is their embeddings and a few numbers a row.

InfoNCE (CLIP, arXiv 2103.00020) with several right answers, on S = e^t · C. Each row's and each column's target q is
uniform over its right answers; label smoothing ε moves that share of it to all m_i candidates alike:

    q_ij = (1 − ε) r_ij / n_i + ε / m_i
    L = 1/2B · Σ_i [ lse_j S_ij − Σ_j q_ij S_ij ]  +  1/2B · Σ_j [ lse_i S_ij − Σ_i q_ji S_ij ]
    ∂L/∂S_ij = 1/2B · ( e^(S_ij − lse row i) + e^(S_ij − lse column j) − q_ij − q_ji )

Sigmoid (SigLIP, arXiv 2303.15343, algorithm 1), on S = e^t · C + β, with z_ij = +1 where r_ij = 1 and −1 elsewhere:

    L = −1/B · Σ_ij ln σ(z_ij S_ij)
    ∂L/∂S_ij = −1/B · z_ij σ(−z_ij S_ij)

The anchor pulls toward the starting model's embeddings I⁰, T⁰ of the same pairs, with weights u and v:

    L = u/2B · Σ_i ( |I_i − I⁰_i|² + |T_i − T⁰_i|² )  +  v/B² · Σ_ij ( C_ij − C⁰_ij )²
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional

from cytoclip.device import World
from cytoclip.pairs import Identity, right_answers

# Scores held at once, rows × B; a handful of such blocks live at a time. On a CPU one of them (2 MB) stays in the
# cache, a GPU wants larger products.
BLOCK_SCORES = {"cpu": 2**19, "cuda": 2**25}

Kind = Literal["infonce", "sigmoid"]
Positives = Literal["groups", "pairs", "ignore"]
Embeddings = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Parameters
    ----------
    kind
        Softmax over the batch, or each pair by itself.
    positives
        What the right answers beside the pair itself are: right too (`groups`), wrong (`pairs`), or neither (`ignore`).
    smoothing
        ε: the share of each InfoNCE target that is spread over all candidates.
    anchor_embeddings, anchor_similarities
        u and v of the anchor; 0 where there is none.
    """

    kind: Kind = "infonce"
    positives: Positives = "groups"
    smoothing: float = 0.0
    anchor_embeddings: float = 0.0
    anchor_similarities: float = 0.0

    @property
    def anchored(self) -> bool:
        return self.anchor_embeddings > 0 or self.anchor_similarities > 0

    @property
    def chance_name(self) -> str:
        return "ln(batch)" if self.kind == "infonce" else "knowing nothing"

    def chance_loss(self, batch_size: int) -> float:
        """The loss, without the anchor's part, of a model that knows nothing: equal scores for all, at the best bias.

        ln B for InfoNCE. Sigmoid: B pairs of B² are right, so B times the entropy of 1/B, about ln B + 1.
        """
        if self.kind == "infonce":
            return math.log(batch_size)
        return batch_size * binary_entropy(1 / batch_size)


@dataclass(frozen=True)
class LossAndGradient:
    """The loss of the global batch, and this process's part of its gradient.

    Parameters
    ----------
    loss
        0-dim: equal in all processes.
    images, texts
        (b, D): ∂loss/∂embedding of this process's pairs, whole.
    logit_scale, logit_bias
        0-dim: this process's share of ∂loss/∂t and ∂loss/∂β; the sum over processes is the gradient.
    hit_at_1
        0-dim: share of this batch's images whose best text is right; equal in all processes.
    anchor
        0-dim: the anchor's part of the loss.
    """

    loss: torch.Tensor
    images: torch.Tensor
    texts: torch.Tensor
    logit_scale: torch.Tensor
    logit_bias: torch.Tensor
    hit_at_1: torch.Tensor
    anchor: torch.Tensor


@torch.no_grad()
def contrast(
    own: Embeddings,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor | None,
    identity: Identity,
    world: World,
    objective: Objective,
    start: Embeddings | None = None,
) -> LossAndGradient:
    """Loss and gradient of `objective` from this process's embeddings, in their own precision.

    Parameters
    ----------
    own, start
        Images and texts, each (b, D), of the model and of the starting model; the latter where there is an anchor.
    logit_scale, logit_bias
        t and β, of one element each; InfoNCE has no use for β (a constant on all scores changes no softmax).
    identity
        Of the global batch, tensors (B,); this process's pairs stand at its rank's place.
    """
    image_bD, text_bD = own
    image_BD, text_BD = world.gather(image_bD), world.gather(text_bD)
    scale = logit_scale.to(image_bD.dtype).reshape(()).exp()
    shared = identity, world.rank * len(image_bD), objective.positives
    rows, columns = _Half(image_bD, text_BD, scale, *shared), _Half(text_bD, image_BD, scale, *shared)
    if objective.kind == "infonce":
        result = _info_nce(rows, columns, objective.smoothing, world)
    else:
        assert logit_bias is not None  # noqa: S101 - refused before the first step
        result = _sigmoid(rows, columns, logit_bias.to(image_bD.dtype).reshape(()), world)
    if not objective.anchored:
        return result
    assert start is not None  # noqa: S101 - the caller makes it where there is an anchor
    return _anchored(result, rows, columns, start, objective, world)


def binary_entropy(share: float) -> float:
    """−p ln p − (1 − p) ln(1 − p), in nats; 0 at both ends."""
    return -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)


def _info_nce(rows: _Half, columns: _Half, smoothing: float, world: World) -> LossAndGradient:
    row_sums, column_sums = rows.reduce(smoothing), columns.reduce(smoothing)
    counts_B, candidates_B = world.gather(row_sums.counts), world.gather(row_sums.candidates)
    total = len(rows.answer_BD)
    weight = 0.5 / total
    image_gradient, by_scale = rows.gradient(
        row_sums, world.gather(column_sums.lse), counts_B, candidates_B, weight, smoothing
    )
    text_gradient, _ = columns.gradient(
        column_sums, world.gather(row_sums.lse), counts_B, candidates_B, weight, smoothing
    )
    terms = (row_sums.lse - row_sums.target + column_sums.lse - column_sums.target).sum() * weight
    loss, hit_at_1 = world.sum_(torch.stack([terms, row_sums.hits / total]))
    nothing = torch.zeros_like(loss)
    return LossAndGradient(loss, image_gradient, text_gradient, by_scale, nothing, hit_at_1, nothing)


def _sigmoid(rows: _Half, columns: _Half, bias: torch.Tensor, world: World) -> LossAndGradient:
    total = len(rows.answer_BD)
    image_gradient, (terms, by_scale, by_bias, hits) = rows.sigmoid(bias, total)
    text_gradient, _ = columns.sigmoid(bias, total)
    loss, hit_at_1 = world.sum_(torch.stack([terms, hits / total]))
    return LossAndGradient(
        loss, image_gradient, text_gradient, by_scale, by_bias, hit_at_1, anchor=torch.zeros_like(loss)
    )


def _anchored(
    result: LossAndGradient, rows: _Half, columns: _Half, start: Embeddings, objective: Objective, world: World
) -> LossAndGradient:
    total = len(rows.answer_BD)
    start_image_bD, start_text_bD = (side.to(rows.query_bD.dtype) for side in start)
    start_image_BD, start_text_BD = world.gather(start_image_bD), world.gather(start_text_bD)
    gradients, terms = [], torch.zeros_like(result.loss)
    for half, start_bD, start_BD in (
        (rows, start_image_bD, start_text_BD),
        (columns, start_text_bD, start_image_BD),
    ):
        away_bD = half.query_bD - start_bD
        gradient_bD, distance = half.similarities(start_bD, start_BD, objective.anchor_similarities / total**2)
        gradients.append(gradient_bD + away_bD * (objective.anchor_embeddings / total))
        # each entry of the matrix of cosines is met twice, once from either side
        terms = terms + away_bD.square().sum() * (objective.anchor_embeddings / total / 2) + distance / 2
    anchor = world.sum_(terms)
    return replace(
        result,
        loss=result.loss + anchor,
        images=result.images + gradients[0],
        texts=result.texts + gradients[1],
        anchor=anchor,
    )


@dataclass(frozen=True)
class _Sums:
    """Of each of this process's b rows of scores."""

    lse: torch.Tensor  # (b,) log-sum-exp
    target: torch.Tensor  # (b,) mean score under the target
    counts: torch.Tensor  # (b,) how many right answers, in the dtype of the scores
    candidates: torch.Tensor  # (b,) how many answers that are right or wrong
    hits: torch.Tensor  # 0-dim: rows whose best answer is right


@dataclass(frozen=True)
class _Half:
    """One direction: this process's b queries, which begin at row `first` of the batch, against all B answers."""

    query_bD: torch.Tensor
    answer_BD: torch.Tensor
    scale: torch.Tensor
    identity: Identity
    first: int
    positives: Positives

    def reduce(self, smoothing: float) -> _Sums:
        # Filled in place: small tensors that stay between large ones that go would scatter glibc's heap (docs/log.md).
        lse, target, counts, candidates = self.query_bD.new_empty(4, len(self.query_bD))
        found = _Sums(lse, target, counts, candidates, self._nothing()[1])
        for rows in self._blocks():
            scores_RB, (right_RB, out_RB) = self._scores(rows), self._targets(rows)
            counts_R, candidates_R = found.counts[rows], found.candidates[rows]
            counts_R.copy_(right_RB.sum(dim=1, dtype=scores_RB.dtype))  # bool ÷ int64 is float32 in a float64 run
            candidates_R.copy_(len(self.answer_BD) - _row_sums(out_RB, counts_R))
            mean = (scores_RB * right_RB).sum(dim=1) / counts_R
            if smoothing:
                kept_RB = scores_RB if out_RB is None else scores_RB.masked_fill(out_RB, 0)
                mean = (1 - smoothing) * mean + smoothing * kept_RB.sum(dim=1) / candidates_R
            found.target[rows] = mean
            if out_RB is not None:
                scores_RB.masked_fill_(out_RB, -math.inf)
            found.lse[rows] = scores_RB.logsumexp(dim=1)
            found.hits.add_(_hits(scores_RB, right_RB))
        return found

    def gradient(
        self,
        own: _Sums,
        other_lse_B: torch.Tensor,
        counts_B: torch.Tensor,
        candidates_B: torch.Tensor,
        weight: float,
        smoothing: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """∂L/∂query (b, D), and Σ S · ∂L/∂S over these rows, which over all processes is ∂L/∂t."""
        gradient_bD, by_scale = self._nothing()
        for rows in self._blocks():
            scores_RB, (right_RB, out_RB) = self._scores(rows), self._targets(rows)
            by_score_RB = (scores_RB - own.lse[rows, None]).exp_()
            by_score_RB += (scores_RB - other_lse_B).exp_()
            if smoothing:
                by_score_RB -= smoothing / own.candidates[rows, None] + smoothing / candidates_B
            if out_RB is not None:
                by_score_RB.masked_fill_(out_RB, 0)
            by_score_RB -= right_RB * ((1 - smoothing) / own.counts[rows, None])
            by_score_RB -= right_RB * ((1 - smoothing) / counts_B)
            by_score_RB *= weight
            gradient_bD[rows] = by_score_RB @ self.answer_BD * self.scale
            by_scale += by_score_RB.mul_(scores_RB).sum()
        return gradient_bD, by_scale

    def sigmoid(self, bias: torch.Tensor, total: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """∂L/∂query (b, D); and over these rows L, ∂L/∂t, ∂L/∂β and how many best answers are right."""
        gradient_bD, nothing = self._nothing()
        terms, by_scale, by_bias, hits = (nothing.clone() for _ in range(4))
        for rows in self._blocks():
            scores_RB, (right_RB, out_RB) = self._scores(rows), self._targets(rows)
            hits += _hits(scores_RB if out_RB is None else scores_RB.masked_fill(out_RB, -math.inf), right_RB)
            sign_RB = torch.where(right_RB, 1.0, -1.0).to(scores_RB.dtype)
            logits_RB = sign_RB * (scores_RB + bias)
            each_RB, by_score_RB = functional.logsigmoid(logits_RB), sign_RB.mul_((-logits_RB).sigmoid_())
            if out_RB is not None:
                each_RB.masked_fill_(out_RB, 0)
                by_score_RB.masked_fill_(out_RB, 0)
            by_score_RB /= -total
            terms -= each_RB.sum() / total
            by_bias += by_score_RB.sum()
            gradient_bD[rows] = by_score_RB @ self.answer_BD * self.scale
            by_scale += by_score_RB.mul_(scores_RB).sum()
        return gradient_bD, (terms, by_scale, by_bias, hits)

    def similarities(
        self, start_bD: torch.Tensor, start_BD: torch.Tensor, weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """∂/∂query (b, D) of weight · Σ (C − C⁰)², and that sum over these rows."""
        gradient_bD, distance = self._nothing()
        for rows in self._blocks() if weight else ():
            away_RB = self.query_bD[rows] @ self.answer_BD.T - start_bD[rows] @ start_BD.T
            gradient_bD[rows] = away_RB @ self.answer_BD * (2 * weight)
            distance += away_RB.square_().sum() * weight
        return gradient_bD, distance

    def _nothing(self) -> tuple[torch.Tensor, torch.Tensor]:
        like = self.query_bD
        return torch.zeros_like(like), torch.zeros((), dtype=like.dtype, device=like.device)

    def _blocks(self) -> Iterator[slice]:
        """Slices of this process's rows, each of as many scores as are held at once."""
        held = BLOCK_SCORES.get(self.query_bD.device.type, BLOCK_SCORES["cpu"])
        each, queries = max(1, held // len(self.answer_BD)), len(self.query_bD)
        return (slice(begin, min(begin + each, queries)) for begin in range(0, queries, each))

    def _scores(self, rows: slice) -> torch.Tensor:
        return (self.query_bD[rows] @ self.answer_BD.T).mul_(self.scale)

    def _targets(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Which answers are right (R, B), and which are neither right nor wrong, if any are."""
        place = slice(self.first + rows.start, self.first + rows.stop)
        if self.positives != "pairs":
            right_RB: torch.Tensor = right_answers(self.identity.take(place), self.identity)
            if self.positives == "groups":
                return right_RB, None
        columns_B = torch.arange(len(self.answer_BD), device=self.query_bD.device)
        pair_RB = columns_B[place, None] == columns_B
        return pair_RB, right_RB & ~pair_RB if self.positives == "ignore" else None


def _row_sums(out_RB: torch.Tensor | None, like_R: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like_R) if out_RB is None else out_RB.sum(dim=1, dtype=like_R.dtype)


def _hits(scores_RB: torch.Tensor, right_RB: torch.Tensor) -> torch.Tensor:
    return right_RB.gather(1, scores_RB.argmax(dim=1, keepdim=True)).sum()
