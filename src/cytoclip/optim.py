"""AdamW over matrices and the rest, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from cytoclip.config import Train


def build(moving: Mapping[str, torch.nn.Parameter], wanted: Train) -> torch.optim.AdamW:
    """AdamW, fused where the device has it; weight decay on matrices only.

    Biases, norms, class embeddings and the logit scale (all below two dimensions) are not decayed: decay would pull
    gains and the temperature toward zero, which is no prior for either.
    """
    matrices = [parameter for parameter in moving.values() if parameter.ndim >= 2]
    rest = [parameter for parameter in moving.values() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": wanted.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in moving.values())
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=wanted.learning_rate, fused=fused)


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
    """Scale all gradients down to the norm `limit`; the norm before that, 0-dim."""
    gradients = [parameter.grad for parameter in moving.values() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(list(moving.values()), limit, norm)
    return norm
