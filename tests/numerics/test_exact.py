"""Loss and every gradient of the plain full-batch formula, for any chunks, on 1, 2 and 4 processes, in float64."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cytoclip import loss
from cytoclip.device import World
from cytoclip.objectives import Objective
from tests.numerics import gradients_of_one_rank as one_rank
from tests.numerics.nursery import spawn
from tests.numerics.test_loss import textbook

ALONE = World(torch.device("cpu"))
PROCESSES = (1, 2, 4)


@pytest.fixture(scope="module")
def found(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, torch.Tensor]]:
    """By number of processes: `case/parameter` to gradient. Each group is spawned once for all its cases."""
    folder = tmp_path_factory.mktemp("gradients")
    collected = {
        1: {
            f"{i}/{n}": t for i, c in enumerate(one_rank.cases()) for n, t in one_rank.gradients(c, base, ALONE).items()
        }
    }
    for processes in PROCESSES[1:]:
        spawn("tests.numerics.gradients_of_one_rank", [str(base), str(folder / f"{processes}.safetensors")], processes)
        collected[processes] = load_file(folder / f"{processes}.safetensors")
    return collected


def test_it_is_the_plain_formula_in_all_144_cases(found: dict[int, dict[str, torch.Tensor]], base: Path) -> None:
    checked = 0
    for i, (chunk, repeats, towers, objective) in enumerate(one_rank.cases()):
        expected = plain(base, repeats, towers, objective)
        for processes in PROCESSES:
            case = (processes, chunk, repeats, towers, objective)
            names = {name.partition("/")[2] for name in found[processes] if name.startswith(f"{i}/")}
            assert names == expected.keys(), case
            assert {"logit_scale"} <= names
            assert ("logit_bias" in names) == (objective.kind == "sigmoid")
            for name, value in expected.items():
                assert torch.allclose(found[processes][f"{i}/{name}"], value, rtol=0, atol=1e-10), (case, name)
            checked += 1
    assert checked == 3 * (4 + 2 + 2) * 2 * 3 == 144  # processes, chunks of each objective, repeats, towers


@pytest.mark.parametrize("chunk", [7, 16, 48])
def test_with_dropout_it_is_the_same_chunks_in_one_graph(chunk: int, base: Path) -> None:
    """Trap 5: the second forward of a chunk falls on the places of the first. An equal objective for other chunks does
    not exist then: the masks would be others."""
    gradients = []
    for exact in (True, False):
        encoder = one_rank.encoder_of(base, ("lora", "lora"), dropout=0.3)
        identity = one_rank.identity_of(True)
        pieces = [part.split(chunk) for part in one_rank.inputs(encoder)]
        chunks = list(zip(*pieces, strict=True))
        torch.manual_seed(11)
        if exact:
            loss.contrastive_step(encoder, loss.Logits(encoder.logit_scale), chunks, identity, ALONE)
        else:
            images, texts = (torch.cat(side) for side in zip(*(encoder(*one) for one in chunks), strict=True))
            textbook(images, texts, encoder.logit_scale, identity).backward()
        gradients.append({name: parameter.grad for name, parameter in encoder.moving().items()})
        after = torch.rand(1)
        gradients[-1]["what is drawn next"] = after
    for name, value in gradients[1].items():
        assert torch.allclose(gradients[0][name], value, rtol=0, atol=1e-10), name


def test_the_last_of_few_chunks_is_embedded_once_and_the_others_twice(base: Path) -> None:
    encoder = one_rank.encoder_of(base, ("full", "full"))
    calls: list[tuple[int, bool]] = []

    def counting(pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append((len(pixels), torch.is_grad_enabled()))
        return encoder(pixels, tokens)

    for chunk in (48, 20, 5):
        pieces = [part.split(chunk) for part in one_rank.inputs(encoder)]
        loss.contrastive_step(
            counting,
            loss.Logits(encoder.logit_scale),
            list(zip(*pieces, strict=True)),
            one_rank.identity_of(False),
            ALONE,
        )
    few = [(20, False), (20, False), (8, True), (20, True), (20, True)]
    many = [(n, grad) for grad in (False, True) for n in [5] * 9 + [3]]
    assert calls == [(48, True), *few, *many]


@functools.cache
def plain(base: Path, repeats: bool, towers: tuple[str, str], objective: Objective) -> dict[str, torch.Tensor]:
    encoder = one_rank.encoder_of(base, towers)
    inputs = one_rank.inputs(encoder)
    with torch.no_grad():
        start = one_rank.start_of(base)(*inputs) if objective.anchored else None
    bias = torch.full((1,), -2.0, dtype=torch.float64, requires_grad=True)
    value = textbook(
        *encoder(*inputs), encoder.logit_scale, one_rank.identity_of(repeats), objective, bias=bias, start=start
    )
    value.backward()
    moving = {name: p.grad for name, p in encoder.moving().items()}
    return {"loss": value.detach()} | moving | ({"logit_bias": bias.grad} if objective.kind == "sigmoid" else {})
