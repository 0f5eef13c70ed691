"""One process of a group: the loss and gradients of every case of `cases()`, saved by the first process.

python -m tests.numerics.gradients_of_one_rank BASE OUT.safetensors
"""

from __future__ import annotations

import copy
import functools
import itertools
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from cytoclip import adapters, checkpoint, device, loss, model
from cytoclip.config import Model
from cytoclip.device import World
from cytoclip.objectives import Objective
from cytoclip.pairs import Identity

B = 48
CHUNKS = (48, 16, 7, 1)
REPEATS = (False, True)
TOWERS = (("full", "full"), ("lora", "lora"), ("full", "lora"))
OBJECTIVES = (Objective(), Objective("sigmoid"), Objective("infonce", "ignore", 0.1, 0.3, 0.7))
Case = tuple[int, bool, tuple[str, str], Objective]


def cases() -> list[Case]:
    """InfoNCE in chunks of any size, the other objectives in two of them: how they are cut is one code."""
    every = itertools.product(CHUNKS, REPEATS, TOWERS, OBJECTIVES)
    return [case for case in every if case[3] == OBJECTIVES[0] or case[0] in (16, 7)]


def encoder_of(base: Path, towers: tuple[str, str], dropout: float = 0.0) -> model.DualEncoder:
    """In float64, its adapters away from zero, its pixels taken as they are."""
    encoder = copy.deepcopy(_opened(base))
    encoder.to_floats = lambda pixels: pixels
    torch.manual_seed(0)
    wanted = {"image_tower": towers[0], "text_tower": towers[1]}
    lora = {"lora": {"dropout": dropout}} if "lora" in towers else {}
    adapters.set_moving(encoder, Model.model_validate(wanted | lora))
    encoder.double().train()
    for name, parameter in encoder.moving().items():
        if ".lora_B." in name:  # zero at the start, which would leave lora_A without a gradient
            torch.nn.init.normal_(parameter, std=0.1)
    return encoder


@functools.cache
def _opened(base: Path) -> model.DualEncoder:
    return checkpoint.open_model(str(base)).encoder


def inputs(encoder: model.DualEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    side, text = encoder.clip.config.vision_config.image_size, encoder.clip.config.text_config
    pixels = torch.randn(B, 3, side, side, generator=generator, dtype=torch.float64)
    tokens = torch.randint(3, text.vocab_size - 2, (B, 9), generator=generator)
    tokens[:, -1] = text.eos_token_id
    return pixels, tokens


def identity_of(repeats: bool) -> Identity:
    each, nothing = torch.arange(B), torch.full((B,), -1)
    return (
        Identity(each // 2, each.flip(0) // 3, torch.where(each % 5 == 0, 1, -1))
        if repeats
        else Identity(each, each, nothing)
    )


def start_of(base: Path) -> model.DualEncoder:
    """Another starting model than the encoder, so that the anchor pulls."""
    start = encoder_of(base, ("full", "full")).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in start.moving().values():
            parameter += 0.05 * torch.randn_like(parameter)
    return start


def gradients(case: Case, base: Path, world: World) -> dict[str, torch.Tensor]:
    """The loss, and every gradient summed over processes, by name."""
    chunk, repeats, towers, objective = case
    encoder = encoder_of(base, towers)
    bias = torch.nn.Parameter(torch.full((1,), -2.0, dtype=torch.float64)) if objective.kind == "sigmoid" else None
    own = slice(world.rank * B // world.size, (world.rank + 1) * B // world.size)
    pieces = [part[own].split(chunk) for part in inputs(encoder)]
    result = loss.contrastive_step(
        encoder,
        loss.Logits(encoder.logit_scale, bias),
        list(zip(*pieces, strict=True)),
        identity_of(repeats),
        world,
        objective,
        start=start_of(base) if objective.anchored else None,
    )
    moving = encoder.moving() | ({} if bias is None else {"logit_bias": bias})
    world.sum_gradients(moving.values())
    return {"loss": result.loss} | {name: parameter.grad for name, parameter in moving.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = device.start("cpu", "no")
    found = {
        f"{i}/{name}": t
        for i, case in enumerate(cases())
        for name, t in gradients(case, Path(sys.argv[1]), here).items()
    }
    if here.first:
        save_file(found, sys.argv[2])
    here.wait()
    print("done", flush=True)
