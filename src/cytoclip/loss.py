"""The exact contrastive step: the loss of the whole batch and its gradient, on any number of processes.

Letters: B pairs of the global batch, b pairs of this process, R rows of a block, D embedding.

Symmetric InfoNCE (CLIP, arXiv 2103.00020) with several right answers. With cosines times the scale,
S = e^t · I Tᵀ, and r_ij = 1 where text j is right for image i (symmetric, so image and text i have the same count
n_i = Σ_j r_ij), each row's and each column's target is uniform over its right answers:

    L = 1/2B · Σ_i [ lse_j S_ij − Σ_j r_ij S_ij / n_i ]  +  1/2B · Σ_j [ lse_i S_ij − Σ_i r_ij S_ij / n_j ]

    ∂L/∂S_ij = 1/2B · ( e^(S_ij − lse row i) + e^(S_ij − lse column j) − r_ij/n_i − r_ij/n_j )

The gradient at the embeddings follows from that in closed form, so it is computed in blocks of rows, without a graph
and without an N×N matrix; what processes exchange is their embeddings and their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from cytoclip.device import World
from cytoclip.pairs import Identity, right_answers

BLOCK = 1024  # rows of scores at once: 1024 × 65,536 float32 is 256 MiB

Encoder = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class LossAndGradient:
    """The loss of the global batch, and this process's part of its gradient.

    Parameters
    ----------
    loss
        0-dim: equal in all processes.
    images, texts
        (b, D): ∂loss/∂embedding of this process's pairs, whole.
    logit_scale
        0-dim: this process's share of ∂loss/∂t; the sum over processes is the gradient.
    hit_at_1
        0-dim: share of this batch's images whose best text is right; equal in all processes.
    """

    loss: torch.Tensor
    images: torch.Tensor
    texts: torch.Tensor
    logit_scale: torch.Tensor
    hit_at_1: torch.Tensor


def contrastive_step(
    encoder: Encoder,
    logit_scale: torch.nn.Parameter,
    batch: tuple[torch.Tensor, torch.Tensor],
    identity: Identity,
    world: World,
    factor: torch.Tensor | float = 1.0,
) -> LossAndGradient:
    """Add the gradient of the global batch's loss to `.grad` of every parameter; the sum over processes is exact.

    Parameters
    ----------
    encoder
        From (pixels, tokens) of this process to two (b, D) unit embeddings.
    logit_scale
        0-dim; its gradient is added too.
    batch
        Pixels and tokens of this process's b pairs.
    identity
        Of the global batch, tensors (B,); this process's pairs stand at its rank's place.
    factor
        Multiplies every gradient (fp16's loss scale).
    """
    with world.autocast():
        image_bD, text_bD = encoder(*batch)
    result = info_nce(image_bD.detach(), text_bD.detach(), logit_scale.detach(), identity, world)
    reached = [(e, g * factor) for e, g in ((image_bD, result.images), (text_bD, result.texts)) if e.requires_grad]
    if reached:  # with both towers and projections frozen only the scale moves
        torch.autograd.backward([e for e, _ in reached], [g for _, g in reached])
    share = result.logit_scale * factor
    logit_scale.grad = share if logit_scale.grad is None else logit_scale.grad + share
    return result


@torch.no_grad()
def info_nce(
    image_bD: torch.Tensor,
    text_bD: torch.Tensor,
    logit_scale: torch.Tensor,
    identity: Identity,
    world: World,
) -> LossAndGradient:
    """Loss and gradient of the formula above from this process's embeddings, in their own precision."""
    image_BD, text_BD = world.gather(image_bD), world.gather(text_bD)
    scale = logit_scale.to(image_bD.dtype).exp()
    own = identity.take(slice(world.rank * len(image_bD), (world.rank + 1) * len(image_bD)))
    rows = _Half(image_bD, text_BD, scale, own, identity)
    columns = _Half(text_bD, image_BD, scale, own, identity)
    row_sums, column_sums = rows.reduce(), columns.reduce()
    counts_B = world.gather(row_sums.counts)

    weight = 0.5 / len(image_BD)
    image_gradient, scale_gradient = rows.gradient(row_sums, world.gather(column_sums.lse), counts_B, weight)
    text_gradient, _ = columns.gradient(column_sums, world.gather(row_sums.lse), counts_B, weight)
    terms = (row_sums.lse - row_sums.right + column_sums.lse - column_sums.right).sum() * weight
    loss, hit_at_1 = world.sum_(torch.stack([terms, row_sums.hits / len(image_BD)]))
    return LossAndGradient(loss, image_gradient, text_gradient, scale_gradient, hit_at_1)


@dataclass(frozen=True)
class _Sums:
    """Of each of this process's b rows of scores."""

    lse: torch.Tensor  # (b,) log-sum-exp
    right: torch.Tensor  # (b,) mean score of the right answers
    counts: torch.Tensor  # (b,) how many right answers, in the dtype of the scores
    hits: torch.Tensor  # 0-dim: rows whose best answer is right


@dataclass(frozen=True)
class _Half:
    """One direction: this process's b queries against all B answers."""

    query_bD: torch.Tensor
    answer_BD: torch.Tensor
    scale: torch.Tensor
    own: Identity
    everyone: Identity

    def reduce(self) -> _Sums:
        lse, right, counts, hits = [], [], [], []
        for rows in self._blocks():
            scores_RB, right_RB = self._scores(rows), self._right(rows)
            lse.append(scores_RB.logsumexp(dim=1))
            counts.append(right_RB.sum(dim=1, dtype=scores_RB.dtype))  # bool ÷ int64 would be float32 in a float64 run
            right.append((scores_RB * right_RB).sum(dim=1) / counts[-1])
            hits.append(right_RB.gather(1, scores_RB.argmax(dim=1, keepdim=True)).sum())
        return _Sums(torch.cat(lse), torch.cat(right), torch.cat(counts), torch.stack(hits).sum())

    def gradient(
        self, own: _Sums, other_lse_B: torch.Tensor, counts_B: torch.Tensor, weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """∂L/∂query (b, D), and Σ S · ∂L/∂S over these rows, which over all processes is ∂L/∂t."""
        gradient_bD = torch.empty_like(self.query_bD)
        by_scale = torch.zeros((), dtype=self.query_bD.dtype, device=self.query_bD.device)
        for rows in self._blocks():
            scores_RB, right_RB = self._scores(rows), self._right(rows)
            pull_RB = right_RB / own.counts[rows, None] + right_RB / counts_B
            push_RB = (scores_RB - own.lse[rows, None]).exp_() + (scores_RB - other_lse_B).exp_()
            by_score_RB = (push_RB - pull_RB) * weight
            gradient_bD[rows] = by_score_RB @ self.answer_BD * self.scale
            by_scale += (by_score_RB * scores_RB).sum()
        return gradient_bD, by_scale

    def _blocks(self) -> Iterator[slice]:
        return (slice(begin, begin + BLOCK) for begin in range(0, len(self.query_bD), BLOCK))

    def _scores(self, rows: slice) -> torch.Tensor:
        return self.query_bD[rows] @ self.answer_BD.T * self.scale

    def _right(self, rows: slice) -> torch.Tensor:
        right_RB: torch.Tensor = right_answers(self.own.take(rows), self.everyone)
        return right_RB
