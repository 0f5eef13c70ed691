"""Compiled layers compute what the layers do, in every kind of pass, and none goes on uncompiled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cytoclip import captions, checkpoint, model, training
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.errors import UserError
from tests import tiny

KINDS = ("clip", *tiny.MADE)


class Noted:
    """A backend of torch.compile that runs what it is given as it is: graphs made, and how often they ran."""

    def __init__(self) -> None:
        torch.compiler.reset()
        self.graphs = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*given: Any) -> Any:
            self.runs += 1
            return graph.forward(*given)

        return run


def four_pairs(found: checkpoint.Opened) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 3, tiny.SIDE, tiny.SIDE), dtype=torch.uint8, generator=generator)
    tokens = captions.tokenise(found.tokenizer, tiny.CAPTIONS, found.context, found.encoder.family)
    return pixels, tokens.batch(range(4))


@pytest.mark.parametrize("kind", ["clip", *(pytest.param(kind, marks=pytest.mark.slow) for kind in tiny.MADE)])
@torch.no_grad()
def test_compiled_layers_embed_the_same_and_keep_their_names(kind: str, bases: dict[str, Path]) -> None:
    found, backend = checkpoint.open_model(str(bases[kind])), Noted()
    found.encoder.eval()
    names = list(found.encoder.state_dict())
    pixels, tokens = four_pairs(found)
    asked = [(pixels, tokens), (pixels[:2], tokens[:2]), (pixels, tokens, torch.tensor([[0, 3]] * 4))]
    expected = [found.encoder(*given) for given in asked]
    model.compile_towers(found.encoder, backend)
    for given, twins in zip(asked, expected, strict=True):
        for one, two in zip(found.encoder(*given), twins, strict=True):
            assert torch.allclose(one, two, atol=1e-6)
    assert backend.runs == 2 * tiny.LAYERS * len(asked)
    assert 1 <= backend.graphs <= 4, "layers share them, and passes too"
    assert list(found.encoder.state_dict()) == names


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_goes_on_uncompiled(kind: str, bases: dict[str, Path]) -> None:
    """torch gives up after 8 graphs of one function, with a warning only; a run has more kinds of passes than that."""
    found, backend = checkpoint.open_model(str(bases[kind])), Noted()
    encoder, (pixels, tokens) = found.encoder.eval(), four_pairs(found)
    model.compile_towers(encoder, backend)

    def work() -> int:
        before = backend.runs
        for rows in (slice(3), slice(1)):
            encoder.train()
            with torch.no_grad():
                encoder(pixels[rows], tokens[rows])
            image, text = encoder(pixels[rows], tokens[rows])
            (image @ text.T).sum().backward()
            encoder.eval()
            with torch.inference_mode():
                encoder(pixels[rows], tokens[rows])
        return backend.runs - before

    assert work() == 2 * 3 * 2 * tiny.LAYERS
    made = backend.graphs
    assert work() == 2 * 3 * 2 * tiny.LAYERS
    assert backend.graphs == made


def test_a_tower_without_layers_is_not_compiled(bases: dict[str, Path]) -> None:
    encoder = checkpoint.open_model(str(bases["clip"])).encoder
    encoder.text_tower.config.num_hidden_layers = 7
    with pytest.raises(UserError, match=r"train\.compile: the layers of CLIPTextModel cannot be told apart"):
        model.compile_towers(encoder, Noted())


@pytest.mark.slow  # a C++ compiler, a minute
@pytest.mark.parametrize("checkpointed", [False, True])
def test_inductor_gives_the_same_gradients(base: Path, checkpointed: bool) -> None:
    torch.compiler.reset()
    found = checkpoint.open_model(str(base))
    encoder, inputs = found.encoder.train(), four_pairs(found)

    def gradients() -> dict[str, torch.Tensor]:
        encoder.zero_grad()
        image, text = encoder(*inputs)
        (image @ text.T).square().sum().backward()
        return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}

    expected = gradients()
    if checkpointed:
        model.checkpoint_gradients(encoder)
    model.compile_towers(encoder)
    compiled = gradients()
    assert compiled.keys() == expected.keys()
    assert all(torch.allclose(compiled[name], gradient, atol=1e-5) for name, gradient in expected.items())


@pytest.mark.slow  # a C++ compiler, a minute
def test_a_compiled_run_has_the_losses_of_one_that_is_not(experiment: Callable[..., Config], tmp_path: Path) -> None:
    """With chunks, checkpointing, dropped patches and LoRA at once."""
    lora = {"image_tower": "lora", "text_tower": "lora"}
    how = {"micro_batch_size": 5, "gradient_checkpointing": True, "patch_dropout": 0.25}
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        wanted = experiment(model=lora, train={**how, "compile": compiled}, output=str(tmp_path / str(compiled)))
        training.fit(wanted, Console())
        found.append(
            [json.loads(line)["loss"] for line in Path(wanted.output, "losses.jsonl").read_text().splitlines()]
        )
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], abs=1e-4)
