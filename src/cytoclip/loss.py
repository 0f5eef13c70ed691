"""The exact contrastive step: the loss of the whole batch and its gradient, in any chunks, on any number of processes.

Letters: B pairs of the global batch, b pairs of this process, R rows of a block, D embedding.

Symmetric InfoNCE (CLIP, arXiv 2103.00020) with several right answers. With cosines times the scale,
S = e^t · I Tᵀ, and r_ij = 1 where text j is right for image i (symmetric, so image and text i have the same count
n_i = Σ_j r_ij), each row's and each column's target is uniform over its right answers:

    L = 1/2B · Σ_i [ lse_j S_ij − Σ_j r_ij S_ij / n_i ]  +  1/2B · Σ_j [ lse_i S_ij − Σ_i r_ij S_ij / n_j ]

    ∂L/∂S_ij = 1/2B · ( e^(S_ij − lse row i) + e^(S_ij − lse column j) − r_ij/n_i − r_ij/n_j )

The gradient at the embeddings follows from that in closed form, so it is computed in blocks of rows, without a graph
and without an N×N matrix; what processes exchange is their embeddings and their log-sum-exps. With the gradient at
the embeddings known, each chunk of pairs can be embedded again with its graph and sent back alone: memory for one
chunk, gradient of the whole batch (GradCache, arXiv 2101.06983).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cytoclip.device import RandomState, World
from cytoclip.pairs import Identity, right_answers

# Scores held at once, rows × B; a handful of such blocks live at a time. On a CPU one of them (2 MB) stays in the
# cache, a GPU wants larger products.
BLOCK_SCORES = {"cpu": 2**19, "cuda": 2**25}

Positives = Literal["groups", "pairs", "ignore"]
Embeddings = tuple[torch.Tensor, torch.Tensor]
Encoder = Callable[[torch.Tensor, torch.Tensor], Embeddings]


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
    chunks: Sequence[tuple[torch.Tensor, torch.Tensor]],
    identity: Identity,
    world: World,
    positives: Positives = "groups",
    factor: float = 1.0,
) -> LossAndGradient:
    """Add the gradient of the global batch's loss to `.grad` of every parameter; the sum over processes is exact.

    Parameters
    ----------
    encoder
        From (pixels, tokens) of some pairs to two unit embeddings (pairs, D).
    logit_scale
        0-dim; its gradient is added too.
    chunks
        Pixels and tokens of this process's b pairs, in pieces of which one fits in memory; on any device. The number
        of chunks decides what is held at once and nothing else: one is embedded once, several are embedded twice, the
        second time with the random state of the first, so that dropout falls on the same places.
    identity
        Of the global batch, tensors (B,); this process's pairs stand at its rank's place.
    positives
        What the right answers beside the pair itself are: right too, wrong, or neither.
    factor
        Multiplies every gradient (fp16's loss scale).
    """

    def contrast(image_bD: torch.Tensor, text_bD: torch.Tensor) -> LossAndGradient:
        return info_nce(image_bD.detach(), text_bD.detach(), logit_scale.detach(), identity, world, positives)

    if len(chunks) == 1:
        embedded = _embed(encoder, chunks[0], world)
        result = contrast(*embedded)
        _send_back(embedded, (result.images, result.texts), factor)
    else:
        states, kept = [], []
        with torch.no_grad():
            for chunk in chunks:
                states.append(RandomState.of(world.device))
                kept.append(_embed(encoder, chunk, world))
        images, texts = (torch.cat(side) for side in zip(*kept, strict=True))
        result = contrast(images, texts)
        sizes = [len(image) for image, _ in kept]
        gradients = zip(torch.split(result.images, sizes), torch.split(result.texts, sizes), strict=True)
        for chunk, state, gradient in zip(chunks, states, gradients, strict=True):
            state.restore(world.device)
            _send_back(_embed(encoder, chunk, world), gradient, factor)
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
    positives: Positives = "groups",
) -> LossAndGradient:
    """Loss and gradient of the formula above from this process's embeddings, in their own precision.

    With `pairs` r is the identity; with `ignore` too, and other right answers are left out of the log-sum-exps.
    """
    image_BD, text_BD = world.gather(image_bD), world.gather(text_bD)
    scale = logit_scale.to(image_bD.dtype).exp()
    first = world.rank * len(image_bD)
    rows = _Half(image_bD, text_BD, scale, identity, first, positives)
    columns = _Half(text_bD, image_BD, scale, identity, first, positives)
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
    """One direction: this process's b queries, which begin at row `first` of the batch, against all B answers."""

    query_bD: torch.Tensor
    answer_BD: torch.Tensor
    scale: torch.Tensor
    identity: Identity
    first: int
    positives: Positives

    def reduce(self) -> _Sums:
        lse, right, counts, hits = [], [], [], []
        for rows in self._blocks():
            scores_RB, (right_RB, out_RB) = self._scores(rows), self._targets(rows)
            counts.append(right_RB.sum(dim=1, dtype=scores_RB.dtype))  # bool ÷ int64 would be float32 in a float64 run
            right.append((scores_RB * right_RB).sum(dim=1) / counts[-1])
            if out_RB is not None:
                scores_RB.masked_fill_(out_RB, -math.inf)
            lse.append(scores_RB.logsumexp(dim=1))
            hits.append(right_RB.gather(1, scores_RB.argmax(dim=1, keepdim=True)).sum())
        return _Sums(torch.cat(lse), torch.cat(right), torch.cat(counts), torch.stack(hits).sum())

    def gradient(
        self, own: _Sums, other_lse_B: torch.Tensor, counts_B: torch.Tensor, weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """∂L/∂query (b, D), and Σ S · ∂L/∂S over these rows, which over all processes is ∂L/∂t."""
        gradient_bD = torch.empty_like(self.query_bD)
        by_scale = torch.zeros((), dtype=self.query_bD.dtype, device=self.query_bD.device)
        for rows in self._blocks():
            scores_RB, (right_RB, out_RB) = self._scores(rows), self._targets(rows)
            by_score_RB = (scores_RB - own.lse[rows, None]).exp_()
            by_score_RB += (scores_RB - other_lse_B).exp_()
            if out_RB is not None:
                by_score_RB.masked_fill_(out_RB, 0)
            by_score_RB -= right_RB / own.counts[rows, None]
            by_score_RB -= right_RB / counts_B
            by_score_RB *= weight
            gradient_bD[rows] = by_score_RB @ self.answer_BD * self.scale
            by_scale += by_score_RB.mul_(scores_RB).sum()
        return gradient_bD, by_scale

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


def _embed(encoder: Encoder, chunk: tuple[torch.Tensor, torch.Tensor], world: World) -> Embeddings:
    pixels, tokens = (part.to(world.device, non_blocking=True) for part in chunk)
    with world.autocast():
        return encoder(pixels, tokens)


def _send_back(embedded: Embeddings, gradients: Embeddings, factor: float) -> None:
    """Gradients at the embeddings into the towers; neither embedding needs one where all but the scale is frozen."""
    reached = [(e, g * factor) for e, g in zip(embedded, gradients, strict=True) if e.requires_grad]
    if reached:
        torch.autograd.backward([e for e, _ in reached], [g for _, g in reached])
