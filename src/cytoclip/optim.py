"""AdamW over groups of parameters, each with its own decay and rate, and the rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from cytoclip.config import Train
from cytoclip.errors import ExitCode, UserError
from cytoclip.model import DualEncoder, layers


def build(encoder: DualEncoder, wanted: Train) -> torch.optim.AdamW:
    """AdamW, fused where the device has it; weight decay on matrices only, rates by part and layer.

    Biases, norms, class tokens and the logit scale and bias are not decayed: decay would pull gains and the temperature
    toward zero, which is no prior for either. Each group keeps its share of `train.learning_rate` as "factor", for
    `set_rates`.
    """
    moving, factor = encoder.moving(), factors(encoder, wanted)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in moving.items():
        groups.setdefault((_is_matrix(parameter), factor[name]), []).append(parameter)
    settings = [
        {"params": groups[key], "weight_decay": wanted.weight_decay if key[0] else 0.0, "factor": key[1]}
        for key in sorted(groups, reverse=True)
    ]
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in moving.values())
    optimizer = torch.optim.AdamW(settings, lr=wanted.learning_rate, fused=fused)
    set_rates(optimizer, wanted.learning_rate)
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group its part of `rate`, what `learning_rate` says of a step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def factors(encoder: DualEncoder, wanted: Train) -> dict[str, float]:
    """The rate of each parameter that trains, by name, in units of `train.learning_rate`.

    A part's own rate counts from there. In a tower of L layers, layer i has `layer_decay^(L − 1 − i)` of its tower's
    rate, what comes before the first layer `layer_decay^L`, and what comes after the last one all of it (ELECTRA,
    arXiv 2003.10555; BEiT, arXiv 2106.08254). The logit scale and bias learn at `train.learning_rate`.
    """
    family = encoder.family
    rates = {
        family.image_tower: wanted.image_learning_rate,
        family.text_tower: wanted.text_learning_rate,
        **dict.fromkeys(family.projections, wanted.projection_learning_rate),
    }
    below_top = {id(p): n for tower in (encoder.image_tower, encoder.text_tower) for p, n in _below_top(tower)}
    found = {}
    for name, parameter in encoder.moving().items():
        rate = rates.get(name.partition(".")[0])
        own = 1.0 if rate is None else rate / wanted.learning_rate
        found[name] = own * wanted.layer_decay ** below_top.get(id(parameter), 0)
    return found


def refuse_idle(encoder: DualEncoder, wanted: Train) -> None:
    """Raise `UserError` for a rate of something that does not move, and for a layer decay without layers.

    To be called after `adapters.set_moving`.
    """
    family, moving = encoder.family, {name.partition(".")[0] for name in encoder.moving()}
    parts = {
        "image_learning_rate": ("the image tower", (family.image_tower,)),
        "text_learning_rate": ("the text tower", (family.text_tower,)),
        "projection_learning_rate": ("the projections", family.projections),
    }
    for option, (part, names) in parts.items():
        rate = getattr(wanted, option)
        if rate is not None and not moving & set(names):
            why = "do not move" if names and part == "the projections" else "does not move"
            why = why if names else f"are parts of the towers in {family.title}"
            raise UserError(f"train.{option}: {rate:g} has no effect: {part} {why}", f"delete train.{option}")
    if wanted.layer_decay == 1:
        return
    towers = {"image tower": family.image_tower, "text tower": family.text_tower}
    moved = {part: name for part, name in towers.items() if name in moving}
    if not moved:
        raise UserError(
            f"train.layer_decay: {wanted.layer_decay:g} has no effect: neither tower moves", "delete train.layer_decay"
        )
    for part, name in moved.items():
        tower = getattr(encoder.clip, name)
        if not len(layers(tower)):
            raise UserError(
                f"train.layer_decay: {wanted.layer_decay:g} needs layers in a row, and the {part} "
                f"({type(tower).__name__}) has none",
                f"delete train.layer_decay, or set model.{part.replace(' ', '_')}=frozen",
                ExitCode.MODEL,
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


def clip(moving: Mapping[str, nn.Parameter], limit: float | None) -> torch.Tensor:
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


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Whether it is more than one vector; a class token of ViT is one, of shape (1, 1, h)."""
    return parameter.ndim == 2 or (parameter.ndim > 2 and parameter.shape[:-1].numel() > 1)


def _below_top(tower: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """How many layers are above each parameter, and above what a module registers before its first layer."""
    stack = layers(tower)
    depth = {id(p): len(stack) - 1 - i for i, layer in enumerate(stack) for p in layer.parameters()}
    before = len(stack)
    for parameter in tower.parameters():
        if id(parameter) in depth:
            before = 0
        yield parameter, depth.get(id(parameter), before)
