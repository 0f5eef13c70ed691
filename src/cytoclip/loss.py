"""The exact contrastive step: the gradient of the whole batch's loss, in any chunks, on any number of processes.

Letters: B pairs of the global batch, b pairs of this process, D embedding.

The gradient at the embeddings comes in closed form from `objectives.contrast`. With it known, each chunk of pairs can
be embedded again with its graph and sent back alone: memory for one chunk, gradient of the whole batch (GradCache,
arXiv 2101.06983). Of a few chunks the last has its graph from the first time, since that of one fits anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cytoclip.device import RandomState, World
from cytoclip.objectives import Embeddings, LossAndGradient, Objective, contrast
from cytoclip.pairs import Identity

Chunk = Sequence[torch.Tensor]
Encoder = Callable[..., Embeddings]
# Chunks up to which the last one's graph is kept while the loss is computed: a pass in 4·8 or more is saved.
FEW = 8


@dataclass(frozen=True)
class Logits:
    """What makes logits of cosines, e^scale · cosine + bias: parameters of one element each, bias None for InfoNCE."""

    scale: torch.nn.Parameter
    bias: torch.nn.Parameter | None = None


def contrastive_step(
    encoder: Encoder,
    logits: Logits,
    chunks: Sequence[Chunk],
    identity: Identity,
    world: World,
    objective: Objective | None = None,
    factor: float = 1.0,
    start: Encoder | None = None,
) -> LossAndGradient:
    """Add the gradient of the global batch's loss to `.grad` of every parameter; the sum over processes is exact.

    Parameters
    ----------
    encoder
        From the tensors of a chunk to two unit embeddings (pairs, D).
    logits
        Their gradient is added too, from the loss: they are no part of the encoder's forward.
    chunks
        This process's b pairs in pieces of which one fits in memory, each as the encoder's arguments; on any device.
        The number of chunks decides what is held at once and nothing else: one is embedded once; of several all, or
        all but the last, are embedded again with the random state of the first time, so that dropout falls on the
        same places.
    identity
        Of the global batch, tensors (B,); this process's pairs stand at its rank's place.
    objective
        InfoNCE over groups where None.
    factor
        Multiplies every gradient (fp16's loss scale).
    start
        The starting model, where the objective is anchored to it.
    """
    wanted = objective or Objective()
    start_rows = _joined(_cached(start, chunks, world)[0]) if start is not None and wanted.anchored else None

    twice = len(chunks) - 1 if len(chunks) <= FEW else len(chunks)
    kept, states = _cached(encoder, chunks[:twice], world)
    embedded = [_embed(encoder, chunk, world) for chunk in chunks[twice:]]  # with its graph
    after = RandomState.of(world.device)
    bias = None if logits.bias is None else logits.bias.detach()
    result = contrast(_joined([*kept, *embedded]), logits.scale.detach(), bias, identity, world, wanted, start_rows)
    sizes = [len(chunk[0]) for chunk in chunks]
    gradients = list(zip(torch.split(result.images, sizes), torch.split(result.texts, sizes), strict=True))
    while embedded:  # one at most, whose graph is let go of before the next one is made
        _send_back(embedded.pop(), gradients.pop(), factor)
    for chunk, state, gradient in zip(chunks[:twice], states, gradients, strict=True):
        state.restore(world.device)
        _send_back(_embed(encoder, chunk, world), gradient, factor)
    if twice:
        after.restore(world.device)  # or the next step's dropout would repeat what this one drew
    _add(logits.scale, result.logit_scale * factor)
    if logits.bias is not None and logits.bias.requires_grad:
        _add(logits.bias, result.logit_bias * factor)
    return result


@torch.no_grad()
def _cached(encoder: Encoder, chunks: Sequence[Chunk], world: World) -> tuple[list[Embeddings], list[RandomState]]:
    """Chunks embedded without a graph, and the random state before each."""
    states, kept = [], []
    for chunk in chunks:
        states.append(RandomState.of(world.device))
        kept.append(_embed(encoder, chunk, world))
    return kept, states


def _joined(parts: Sequence[Embeddings]) -> Embeddings:
    images, texts = (torch.cat(side).detach() for side in zip(*parts, strict=True))
    return images, texts


def _embed(encoder: Encoder, chunk: Chunk, world: World) -> Embeddings:
    here = [part.to(world.device, non_blocking=True) for part in chunk]
    with world.autocast():
        return encoder(*here)


def _send_back(embedded: Embeddings, gradients: Embeddings, factor: float) -> None:
    """Gradients at the embeddings into the towers; neither embedding needs one where all but the scale is frozen."""
    reached = [(e, g * factor) for e, g in zip(embedded, gradients, strict=True) if e.requires_grad]
    if reached:
        torch.autograd.backward([e for e, _ in reached], [g for _, g in reached])


def _add(parameter: torch.nn.Parameter, share: torch.Tensor) -> None:
    shaped = share.to(parameter.dtype).view_as(parameter)
    parameter.grad = shaped if parameter.grad is None else parameter.grad + shaped
