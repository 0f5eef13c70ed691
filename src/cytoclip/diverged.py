"""A loss or gradient that is not finite: the run stops before the optimizer moves, and says which pairs it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from cytoclip.device import World
from cytoclip.errors import ExitCode, UserError, first_few

Chunk = tuple[torch.Tensor, ...]
Encoder = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def refuse_non_finite(
    step: int,
    loss: float,
    norm: float,
    encoder: Encoder,
    chunks: Sequence[Chunk],
    names: Sequence[str],
    world: World,
) -> None:
    """Raise before the optimizer moves: one bad step would make every weight NaN.

    Called in all processes with the same `loss` and `norm`. Only where one of them is not finite, each process embeds
    its chunks once more, to name the pictures of the pairs with an embedding that is not finite.

    Parameters
    ----------
    step
        Which step it is, counted from 1.
    loss, norm
        Of the global batch.
    encoder
        From the tensors of a chunk to two embeddings (pairs, D).
    chunks, names
        This process's b pairs, as the encoder's arguments, and the names of their pictures.

    Raises
    ------
    UserError
        In all processes, with the names of all.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    pairs = world.listed(list(zip(names, _are_finite(encoder, chunks, world).tolist(), strict=True)))
    broken = [name for name, finite in pairs if not finite]
    if not broken:
        whose = f"every embedding of the batch is finite ({first_few([name for name, _ in pairs])})"
    elif len(broken) == len(pairs):
        whose = f"no pair of the batch has finite embeddings ({first_few(broken)})"
    else:
        whose = f"{len(broken)} of {len(pairs)} pairs have embeddings that are not: {first_few(broken)}"
    few = 0 < len(broken) < len(pairs)
    raise UserError(
        f"step {step}: the loss is {loss} and the gradient's norm {norm}; {whose}; nothing was updated",
        ("look at these pairs, " if few else "")
        + "lower train.learning_rate, or set train.precision=bf16 or no; the last checkpoint is whole",
        ExitCode.DIVERGED,
    )


@torch.no_grad()
def _are_finite(encoder: Encoder, chunks: Sequence[Chunk], world: World) -> torch.Tensor:
    """Whether both embeddings of each pair are finite: bool (b,)."""
    found = []
    for chunk in chunks:
        with world.autocast():
            image_cD, text_cD = encoder(*(part.to(world.device) for part in chunk))
        found.append(image_cD.isfinite().all(dim=1) & text_cD.isfinite().all(dim=1))
    return torch.cat(found)
