"""Weights between models: interpolated, or averaged, tensor by tensor into a third."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from cytoclip.errors import ExitCode, UserError, first_few

Weights = Mapping[str, torch.Tensor]


@torch.no_grad()
def interpolate(into: nn.Module, start: Weights, end: Weights, alpha: float) -> None:
    """Put (1 − alpha) · start + alpha · end into a model (WiSE-FT, arXiv 2109.01903, equation 1).

    Computed in float64 and rounded once: what the two have in common stays as it is, and 0 and 1 give their bytes.
    Whole numbers (a BatchNorm's count) are the start's, but at 1.
    """
    _check_names(into, start, end)
    for name, tensor in into.state_dict().items():
        one, other = start[name], end[name]
        if alpha == 0 or (alpha < 1 and not tensor.is_floating_point()):
            tensor.copy_(one)
        elif alpha == 1:
            tensor.copy_(other)
        else:
            tensor.copy_((1 - alpha) * one.double() + alpha * other.double())


@torch.no_grad()
def average(into: nn.Module, members: Iterable[Weights]) -> None:
    """Put the uniform mean of models into another (arXiv 2203.05482, section 2), holding one of them at a time."""
    for number, member in enumerate(members, start=1):
        _check_names(into, member)
        for name, tensor in into.state_dict().items():
            if number == 1:
                tensor.copy_(member[name])
            elif tensor.is_floating_point():
                so_far = tensor.double()
                tensor.copy_(so_far + (member[name].to(tensor.device).double() - so_far) / number)


def _check_names(into: nn.Module, *given: Weights) -> None:
    shapes = {name: tensor.shape for name, tensor in into.state_dict().items()}
    for weights in given:
        own = {name: tensor.shape for name, tensor in weights.items()}
        other = sorted(name for name in own | shapes if own.get(name) != shapes.get(name))
        if other:
            raise UserError(
                f"the models have other weights than each other: {first_few(other)}",
                "mix models of one run, whose starting model is the one that it began from",
                ExitCode.MODEL,
            )
