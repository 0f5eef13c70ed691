"""AdamW over matrices and the rest, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from cytoclip.config import Train
from cytoclip.errors import UserError
from cytoclip.model import DualEncoder, layers


def build(encoder: DualEncoder, wanted: Train) -> torch.optim.AdamW:
    """AdamW over what moves, fused where the device has it, in groups of one peak rate and one decay.

    Biases, norms, class embeddings, the logit scale and bias (all below two dimensions) are not decayed: decay would
    pull gains and the temperature toward zero, which is no prior for either. Each group holds its "factor" on
    `learning_rate`: that of its tower or the projections, times `layer_decay` for every layer between it and the
    tower's output.
    """
    _refuse_idle(encoder, wanted)
    factors = rate_factors(encoder, wanted)
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    moving = encoder.moving()
    for name, parameter in moving.items():
        groups.setdefault((parameter.ndim < 2, -factors[name]), []).append(parameter)
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in moving.values())
    return torch.optim.AdamW(
        [
            {"params": groups[small, less], "weight_decay": 0.0 if small else wanted.weight_decay, "factor": -less}
            for small, less in sorted(groups)  # matrices first, high rates first
        ],
        lr=wanted.learning_rate,
        fused=fused,
    )


def set_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group its share of the step's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def rate_factors(encoder: DualEncoder, wanted: Train) -> dict[str, float]:
    """Of each moving parameter: its peak rate as a multiple of `learning_rate`.

    In a tower of n layers, layer i (from 0) has `layer_decay` to the power n − 1 − i, the embeddings below it n, and
    what comes after the last layer 0 (BEiT, arXiv 2106.08254, and CLIP's fine-tuning since).
    """
    family = encoder.family
    rates = {
        family.image_tower: wanted.image_learning_rate,
        family.text_tower: wanted.text_learning_rate,
        **dict.fromkeys(family.projections, wanted.projection_learning_rate),
    }
    depths = {id(p): d for tower in (encoder.image_tower, encoder.text_tower) for p, d in _depths(tower)}
    return {
        name: (rates.get(name.partition(".")[0]) or wanted.learning_rate)
        / wanted.learning_rate
        * wanted.layer_decay ** depths.get(id(parameter), 0)
        for name, parameter in encoder.moving().items()
    }


def _depths(tower: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, int]]:
    """Each parameter of a tower, and how many layers stand between it and what comes after the last one."""
    stacked = layers(tower)
    for index, layer in enumerate(stacked):
        yield from ((parameter, len(stacked) - 1 - index) for parameter in layer.parameters())
    embeddings = getattr(tower, "embeddings", None)
    if isinstance(embeddings, torch.nn.Module):
        yield from ((parameter, len(stacked)) for parameter in embeddings.parameters())


def _refuse_idle(encoder: DualEncoder, wanted: Train) -> None:
    """Raise for a learning rate of something that does not move."""
    places = {
        "image_learning_rate": (encoder.family.image_tower,),
        "text_learning_rate": (encoder.family.text_tower,),
        "projection_learning_rate": encoder.family.projections,
    }
    moving = {name.partition(".")[0] for name in encoder.moving()}
    for option, parts in places.items():
        if getattr(wanted, option) is not None and not moving & set(parts):
            why = "is frozen" if parts else f"does not stand apart from the towers of {encoder.family.title}"
            raise UserError(
                f"train.{option}: nothing has that rate: {' and '.join(parts) or 'a projection'} {why}",
                f"delete train.{option}",
            )
    towers = {encoder.family.image_tower, encoder.family.text_tower}
    if wanted.layer_decay < 1 and not moving & towers:
        raise UserError(
            f"train.layer_decay: {wanted.layer_decay} is of the layers of towers, and both are frozen",
            "delete train.layer_decay",
        )


def learning_rate(step: int, steps: int, wanted: Train) -> float:
    """The learning rate of optimizer step `step`, counted from 0, of `steps`.

    It rises linearly and reaches its peak at the last warm-up step; after that it is constant, or falls as half a
    cosine or a line toward zero just after the last step. The same for any number of processes.

    Examples
    --------
    >>> wanted = Train(learning_rate=1.0, warmup_steps=4, schedule="linear")
    >>> [learning_rate(step, 8, wanted) for step in range(8)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < wanted.warmup_steps:
        return wanted.learning_rate * (step + 1) / wanted.warmup_steps
    done = (step - wanted.warmup_steps) / max(steps - wanted.warmup_steps, 1)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return wanted.learning_rate * left[wanted.schedule]


def clip(moving: Mapping[str, torch.nn.Parameter], limit: float | None) -> torch.Tensor:
    """Scale all gradients down to the norm `limit`; the norm before that, 0-dim.

    Of sharded gradients (`train.shard`) and whole ones alike: the norm is that of all together, in all processes.
    """
    gradients = [parameter.grad for parameter in moving.values() if parameter.grad is not None]
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not sharded:
        norm = torch.nn.utils.get_total_norm(gradients)
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(list(moving.values()), limit, norm)
        return norm
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    shared: Any = torch.nn.utils.get_total_norm(sharded)
    norm = torch.nn.utils.get_total_norm([shared.full_tensor(), *whole])
    if limit is not None:
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # as clip_grads_with_norm_ does
        torch._foreach_mul_([gradient.to_local() for gradient in sharded] + whole, factor)
    return norm
