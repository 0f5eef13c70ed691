"""FSDP2: weights, gradients and moments shared out over the processes, and put together again to be saved.

Each transformer layer is whole in a process only while it computes (ZeRO-3, arXiv 1910.02054; PyTorch's FSDP2). Around
the layers, each tower and each projection is a unit of its own: they are what the encoder calls, in training and in
evaluation, in whatever order. The logit scale and bias belong to no unit and stay whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.errors import ExitCode, UserError
from cytoclip.model import DualEncoder, layers


def share_out(encoder: DualEncoder, world: World, console: Console) -> None:
    """Leave each process its part of every weight; before the optimizer is built, after the encoder is on its device.

    Raises
    ------
    UserError
        For fp16, whose loss scaling would have to look at every process's part.
    """
    if world.size == 1:
        console.warn("train.shard: one process has nothing to share out")
        return
    if world.precision == "fp16":
        raise UserError(
            "train.shard does not go with precision fp16",
            "set train.precision=bf16, or no where the device lacks it",
            ExitCode.SYSTEM,
        )
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in _units(encoder):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in encoder.modules():
        if isinstance(module, FSDPModule):  # the sum of what the processes add, as `World.sum_gradients` makes it
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    held, all_ = _bytes(encoder, whole=False), _bytes(encoder, whole=True)
    console.say(f"train.shard: a process keeps {held / all_:.0%} of the weights, gradients and moments")


def split_groups(optimizer: torch.optim.Optimizer) -> None:
    """Give whole parameters groups of their own beside sharded ones: one kernel cannot update both."""
    for group in list(optimizer.param_groups):
        whole = [parameter for parameter in group["params"] if not isinstance(parameter, DTensor)]
        if 0 < len(whole) < len(group["params"]):
            group["params"] = [parameter for parameter in group["params"] if isinstance(parameter, DTensor)]
            optimizer.add_param_group({**group, "params": whole})


@contextmanager
def whole(encoder: nn.Module, world: World) -> Iterator[None]:
    """While inside, the first process's encoder has all its weights, on the CPU, as if they were never shared out.

    Entered by all processes, since they send their parts; what writes a model then needs to know nothing of shards.
    """
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in encoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                full = cast(DTensor, parameter.detach()).full_tensor()
                if world.first:
                    kept.append((module, name, parameter))
                    module.register_parameter(name, nn.Parameter(full.cpu(), parameter.requires_grad))
    try:
        yield
    finally:
        for module, name, parameter in kept:
            module.register_parameter(name, parameter)


def _units(encoder: DualEncoder) -> Iterator[nn.Module]:
    """What is gathered together, inner ones first."""
    for tower in (encoder.image_tower, encoder.text_tower):
        yield from layers(tower)
        yield tower
    for projection in encoder.family.projections:
        yield getattr(encoder.clip, projection)


def _bytes(encoder: DualEncoder, whole: bool) -> int:
    parameters = list(encoder.parameters())
    return sum(p.numel() if whole or not isinstance(p, DTensor) else p.to_local().numel() for p in parameters)
