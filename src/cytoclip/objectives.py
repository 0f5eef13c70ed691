"""The losses of a global batch, from embeddings alone: value and gradient in closed form, tile by tile.

Letters: B pairs of the global batch, b pairs of this process, D embedding; R rows and C columns of a tile.

r_ij = 1 where text j is right for image i, and C = I Tᵀ the cosines of unit embeddings. r is symmetric, so image and
text i have the same count n_i = Σ_j r_ij. The gradient at the embeddings is computed without a graph and without an
N×N matrix. A process has the rows of its own images against the texts of all: a tile of it is computed twice, once for
the sums of its rows and of its columns, once for the gradient of either side. What processes exchange is the texts, a
few numbers a pair, and what each found for the others' texts.

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
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from cytoclip.device import World
from cytoclip.pairs import NO_GROUP, Identity, right_answers

# Rows and columns of scores held at once; a handful of such tiles live at a time. On a CPU one of them (2 MB) stays in
# the cache, a GPU wants larger products.
TILE = {"cpu": (512, 1024), "cuda": (4096, 8192)}

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
    scale = logit_scale.to(image_bD.dtype).reshape(()).exp()
    first = world.rank * len(image_bD)
    scores = _Scores(image_bD, world.gather(text_bD), scale, identity, first, objective.positives)
    into = _Gradients(torch.zeros_like(scores.image_bD), torch.zeros_like(scores.text_BD))
    if objective.kind == "infonce":
        parts = _info_nce(scores, into, objective.smoothing, world)
    else:
        assert logit_bias is not None  # noqa: S101 - refused before the first step
        parts = _sigmoid(scores, into, logit_bias.to(image_bD.dtype).reshape(()))
    anchor, towards = torch.zeros_like(scale), None
    if objective.anchored:
        assert start is not None  # noqa: S101 - the caller makes it where there is an anchor
        anchor, towards = _anchor(scores, text_bD.detach(), into, start, objective, world)
    loss, hit_at_1, anchor = world.sum_(torch.stack([parts.loss + anchor, parts.hits / len(scores.text_BD), anchor]))
    images, texts = into.image_bD, world.sum_to_own(into.text_BD)
    if towards is not None:
        images, texts = images + towards[0], texts + towards[1]
    return LossAndGradient(loss, images, texts, parts.by_scale, parts.by_bias, hit_at_1, anchor)


def binary_entropy(share: float) -> float:
    """−p ln p − (1 − p) ln(1 − p), in nats; 0 at both ends."""
    return -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)


@dataclass(frozen=True)
class _Parts:
    """Of this process's rows, all 0-dim: the loss, its derivatives by t and β, and rows whose best answer is right."""

    loss: torch.Tensor
    by_scale: torch.Tensor
    by_bias: torch.Tensor
    hits: torch.Tensor


def _info_nce(scores: _Scores, into: _Gradients, smoothing: float, world: World) -> _Parts:
    sums = _sums(scores, world)
    place = scores.own(slice(0, len(scores.image_bD)))
    counts_B, candidates_B = world.gather(sums.counts_b), world.gather(sums.candidates_b)
    sure_B, spread_B = (1 - smoothing) / counts_B, smoothing / candidates_B
    weight = 0.5 / len(scores.text_BD)
    target_b, by_scale = torch.zeros_like(counts_B[place]), torch.zeros_like(scores.scale)
    for rows, columns, scores_RC in scores.tiles():
        right_RC, out_RC = scores.targets(rows, columns)
        own, target_RC = scores.own(rows), None
        by_score_RC = (scores_RC - sums.row_lse_b[rows, None]).exp_()
        by_score_RC += (scores_RC - sums.column_lse_B[columns]).exp_()
        if right_RC is not None:
            target_RC = right_RC * (sure_B[own, None] + sure_B[columns])
        if smoothing:
            spread_RC = spread_B[own, None] + spread_B[columns]
            target_RC = spread_RC if target_RC is None else target_RC + spread_RC
        if target_RC is not None:
            if out_RC is not None:
                target_RC.masked_fill_(out_RC, 0)
            by_score_RC -= target_RC
            target_b[rows] += target_RC.mul_(scores_RC).sum(dim=1)
        if out_RC is not None:
            by_score_RC.masked_fill_(out_RC, 0)
        by_score_RC *= weight
        by_scale += scores_RC.mul_(by_score_RC).sum()
        into.add(scores, rows, columns, by_score_RC.mul_(scores.scale))
    # row by row: between what is large and nearly equal
    loss = (sums.row_lse_b + sums.column_lse_B[place] - target_b).sum() * weight
    return _Parts(loss, by_scale, torch.zeros_like(loss), sums.hits)


def _sigmoid(scores: _Scores, into: _Gradients, bias: torch.Tensor) -> _Parts:
    total, nothing = len(scores.text_BD), torch.zeros_like(scores.scale)
    loss, by_scale, by_bias = (nothing.clone() for _ in range(3))
    best = _Best.of(scores)
    for rows, columns, scores_RC in scores.tiles():
        right_RC, out_RC = scores.targets(rows, columns)
        best.see(rows, scores_RC if out_RC is None else scores_RC.masked_fill(out_RC, _lowest(scores_RC)), right_RC)
        sign_RC = -torch.ones_like(scores_RC)
        if right_RC is not None:
            sign_RC.masked_fill_(right_RC, 1)
        logits_RC = sign_RC * (scores_RC + bias)
        each_RC, by_score_RC = functional.logsigmoid(logits_RC), sign_RC.mul_((-logits_RC).sigmoid_())
        if out_RC is not None:
            each_RC.masked_fill_(out_RC, 0)
            by_score_RC.masked_fill_(out_RC, 0)
        by_score_RC /= -total
        loss -= each_RC.sum() / total
        by_bias += by_score_RC.sum()
        by_scale += scores_RC.mul_(by_score_RC).sum()
        into.add(scores, rows, columns, by_score_RC.mul_(scores.scale))
    return _Parts(loss, by_scale, by_bias, best.hits())


def _anchor(
    scores: _Scores, text_bD: torch.Tensor, into: _Gradients, start: Embeddings, objective: Objective, world: World
) -> tuple[torch.Tensor, Embeddings]:
    """This process's share of the anchor, and the gradient of its first term; that of the second goes `into`."""
    total = len(scores.text_BD)
    u, v = objective.anchor_embeddings / total, objective.anchor_similarities / total**2
    start_image_bD, start_text_bD = (side.to(text_bD.dtype) for side in start)
    away = scores.image_bD - start_image_bD, text_bD - start_text_bD
    anchor: torch.Tensor = sum(side.square().sum() for side in away) * (u / 2)  # type: ignore[assignment]
    start_text_BD = world.gather(start_text_bD)
    for rows, columns in scores.places() if v else ():
        away_RC = scores.image_bD[rows] @ scores.text_BD[columns].T - start_image_bD[rows] @ start_text_BD[columns].T
        anchor += away_RC.square().sum() * v
        into.add(scores, rows, columns, away_RC.mul_(2 * v))
    return anchor, (away[0] * u, away[1] * u)


@dataclass(frozen=True)
class _Scores:
    """This process's b rows of the batch's scores, which begin at row `first`, in tiles."""

    image_bD: torch.Tensor
    text_BD: torch.Tensor
    scale: torch.Tensor
    identity: Identity
    first: int
    positives: Positives

    def own(self, rows: slice) -> slice:
        """Where these rows stand in the batch."""
        return slice(self.first + rows.start, self.first + rows.stop)

    def places(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of every tile, in the order of the rows."""
        high, wide = TILE.get(self.image_bD.device.type, TILE["cpu"])
        for rows in _cut(len(self.image_bD), high):
            for columns in _cut(len(self.text_BD), wide):
                yield rows, columns

    def tiles(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Each place with its scores (R, C), which the caller may change."""
        for rows, columns in self.places():
            yield rows, columns, (self.image_bD[rows] * self.scale) @ self.text_BD[columns].T

    def targets(self, rows: slice, columns: slice) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which answers are right (R, C), and which are neither right nor wrong; None where none is known to be."""
        own = self.own(rows)
        if self.positives == "pairs":
            return self._pairs(own, columns), None
        if not self._meet(own, columns):
            return None, None
        right_RC: torch.Tensor = right_answers(self.identity.take(own), self.identity.take(columns))
        if self.positives == "groups":
            return right_RC, None
        pair_RC = self._pairs(own, columns)
        return pair_RC, right_RC if pair_RC is None else right_RC & ~pair_RC

    def _pairs(self, own: slice, columns: slice) -> torch.Tensor | None:
        if own.start >= columns.stop or columns.start >= own.stop:
            return None
        row_R, column_C = (torch.arange(s.start, s.stop, device=self.text_BD.device) for s in (own, columns))
        return row_R[:, None] == column_C

    def _meet(self, own: slice, columns: slice) -> bool:
        """Whether a right answer may be in that tile; looked for on a CPU only, a GPU would be waited for."""
        if self.text_BD.device.type != "cpu":
            return True
        here, there = self.identity.take(own), self.identity.take(columns)
        grouped = here.group[here.group != NO_GROUP]
        some = (here.caption, there.caption), (here.image, there.image), (grouped, there.group)
        return any(bool(torch.isin(one, other).any()) for one, other in some)


@dataclass(frozen=True)
class _Gradients:
    """Of the loss by this process's images (b, D), and what its rows say of all texts (B, D)."""

    image_bD: torch.Tensor
    text_BD: torch.Tensor

    def add(self, scores: _Scores, rows: slice, columns: slice, by_cosine_RC: torch.Tensor) -> None:
        self.image_bD[rows].addmm_(by_cosine_RC, scores.text_BD[columns])
        self.text_BD[columns].addmm_(by_cosine_RC.T, scores.image_bD[rows])


@dataclass(frozen=True)
class _Sums:
    row_lse_b: torch.Tensor  # (b,) log-sum-exp of this process's rows
    column_lse_B: torch.Tensor  # (B,) and of all columns, over the rows of all processes
    counts_b: torch.Tensor  # (b,) how many right answers, in the dtype of the scores
    candidates_b: torch.Tensor  # (b,) how many answers that are right or wrong
    hits: torch.Tensor  # 0-dim: rows whose best answer is right


def _sums(scores: _Scores, world: World) -> _Sums:
    # Filled in place: small tensors that stay between large ones that go would scatter glibc's heap (docs/log.md).
    b, B = len(scores.image_bD), len(scores.text_BD)
    row_sum_b, counts_b, out_b = scores.image_bD.new_zeros(3, b)
    column_sum_B, column_top_B = scores.image_bD.new_zeros(2, B)
    column_top_B.fill_(_lowest(column_top_B))
    best = _Best.of(scores)
    for rows, columns, scores_RC in scores.tiles():
        right_RC, out_RC = scores.targets(rows, columns)
        if right_RC is not None:
            counts_b[rows] += right_RC.sum(dim=1, dtype=scores_RC.dtype)  # bool ÷ int64 is float32 in a float64 run
        if out_RC is not None:
            out_b[rows] += out_RC.sum(dim=1, dtype=scores_RC.dtype)
            scores_RC.masked_fill_(out_RC, _lowest(scores_RC))  # its share is gone with the first that is higher
        before_R = best.score_b[rows].clone()
        best.see(rows, scores_RC, right_RC)
        top_R, top_C = best.score_b[rows], column_top_B[columns]
        row_sum_b[rows] *= (before_R - top_R).exp_()
        row_sum_b[rows] += (scores_RC - top_R[:, None]).exp_().sum(dim=1)
        new_C = torch.maximum(top_C, scores_RC.amax(dim=0))
        column_sum_B[columns] *= (top_C - new_C).exp_()
        top_C.copy_(new_C)
        column_sum_B[columns] += (scores_RC - new_C).exp_().sum(dim=0)
    over_all_B = world.max_(column_top_B.clone())
    column_sum_B = world.sum_(column_sum_B * (column_top_B - over_all_B).exp_())
    return _Sums(best.score_b + row_sum_b.log(), over_all_B + column_sum_B.log(), counts_b, B - out_b, best.hits())


@dataclass(frozen=True)
class _Best:
    """The highest score of each of this process's rows (b,) so far, and whether the first that has it is right."""

    score_b: torch.Tensor
    right_b: torch.Tensor

    @staticmethod
    def of(scores: _Scores) -> _Best:
        score_b = scores.image_bD.new_full((len(scores.image_bD),), _lowest(scores.image_bD))
        return _Best(score_b, torch.zeros_like(score_b, dtype=torch.bool))

    def see(self, rows: slice, scores_RC: torch.Tensor, right_RC: torch.Tensor | None) -> None:
        top_R, at_R = scores_RC.max(dim=1)
        higher_R, hit_R = top_R > self.score_b[rows], torch.zeros_like(self.right_b[rows])
        if right_RC is not None:
            hit_R = right_RC.gather(1, at_R[:, None])[:, 0]
        self.right_b[rows] = torch.where(higher_R, hit_R, self.right_b[rows])
        self.score_b[rows] = torch.maximum(top_R, self.score_b[rows])

    def hits(self) -> torch.Tensor:
        return self.right_b.sum(dtype=self.score_b.dtype)


def _lowest(like: torch.Tensor) -> float:
    return torch.finfo(like.dtype).min


def _cut(length: int, each: int) -> Iterator[slice]:
    return (slice(begin, min(begin + each, length)) for begin in range(0, length, each))
