"""Leaner forwards against the modules they stand in for: values, every gradient in float64, and where they are used."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import QuickGELUActivation

from cytoclip import adapters, checkpoint, config, lean, model, training
from cytoclip.config import Config, Model, Train
from cytoclip.console import Console
from tests import tiny

KINDS = ("clip", *tiny.MADE)


def count_replaced(module: nn.Module) -> int:
    return sum("forward" in vars(each) for each in module.modules())


def gradients(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    found = module(leaf)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view(found.shape)
    each = torch.autograd.grad((found * weights).sum(), [leaf, *parameters.values()])
    return {"output": found.detach(), **dict(zip(("input", *parameters), each, strict=True))}


def assert_same(module: nn.Module, x: torch.Tensor) -> None:
    leaner = copy.deepcopy(module).train()
    lean.lighten(leaner)
    assert count_replaced(leaner) == 1
    expected, found = gradients(module.train(), x), gradients(leaner, x)
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert torch.allclose(found[name], one, rtol=1e-12, atol=1e-12), name
    with torch.no_grad():
        assert torch.equal(leaner.eval()(x), module.eval()(x)), "what does not train is transformers' to the last bit"


def test_quick_gelu() -> None:
    assert_same(QuickGELUActivation(), torch.linspace(-9, 9, 200, dtype=torch.float64))


@pytest.mark.parametrize(("bias", "size"), [(False, (16, 16)), (True, (16, 8)), (True, (19, 9))])
def test_patches(bias: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, (8, 4), (8, 4), bias=bias).double()
    assert_same(convolution, torch.randn(2, 3, *size, dtype=torch.float64))


@pytest.mark.parametrize("how", [{"padding": 1}, {"stride": 2}, {"groups": 3}, {"dilation": 2}])
def test_other_convolutions_stay(how: dict[str, int]) -> None:
    convolution = nn.Conv2d(3, 6, 4, **{"stride": 4, **how})
    lean.lighten(convolution)
    assert count_replaced(convolution) == 0


@pytest.mark.parametrize(
    ("lora", "replaced"),
    [({}, True), ({"rank": 3, "alpha": 5.0}, True), ({"rslora": True}, True), ({"dropout": 0.1}, False),
     ({"dora": True}, False)],
)  # fmt: skip
def test_lora(lora: dict[str, Any], replaced: bool, base: Path) -> None:
    encoder = checkpoint.open_model(str(base)).encoder
    adapters.set_moving(encoder, Model.model_validate({"image_tower": "lora", "lora": lora}))
    layer = model.layers(encoder.image_tower)[0].self_attn.v_proj.double()
    nn.init.normal_(layer.lora_B["default"].weight)
    if replaced:
        assert_same(layer, torch.randn(2, 5, layer.in_features, dtype=torch.float64))
    else:
        lean.lighten(layer)
        assert count_replaced(layer) == 0


@pytest.mark.parametrize(("kind", "layers"), [("clip", 5), ("siglip", 1), ("chinese_clip", 3), ("two towers", 1)])
def test_a_towers_names_and_its_evaluation_stay(kind: str, layers: int, bases: dict[str, Path]) -> None:
    """Of each family: quick GELU in each layer of OpenAI's towers, patches in all."""
    encoder = checkpoint.open_model(str(bases[kind])).encoder.eval()
    pixels = torch.randint(0, 256, (2, 3, tiny.SIDE, tiny.SIDE), dtype=torch.uint8)
    names, before = list(encoder.state_dict()), encoder.images(pixels)
    lean.lighten(encoder.clip)
    assert count_replaced(encoder) == layers
    assert list(encoder.state_dict()) == names
    assert torch.equal(encoder.images(pixels), before)
    torch.testing.assert_close(encoder.train().images(pixels), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, True),
        ({"kind": "cpu"}, False),
        ({"steps": 499}, False),
        ({"processes": 2}, False),
        ({"triton": None}, False),
        ({"compiler": None}, False),
        ({"train": {"gradient_checkpointing": True}}, False),
        ({"train": {"shard": True}}, False),
        ({"dropout": 0.1}, False),
        ({"layers": 9}, False),
    ],
)
def test_what_auto_compiles(how: dict[str, Any], expected: bool, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = checkpoint.open_model(str(base)).encoder.train()
    model.layers(encoder.text_tower)[0].self_attn.dropout = how.get("dropout", 0.0)
    if "layers" in how:
        encoder.text_tower.config.num_hidden_layers = how["layers"]
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(lean, "shutil", SimpleNamespace(which=lambda _: how.get("compiler", "/usr/bin/cc")))
    spec = SimpleNamespace(find_spec=lambda _: how.get("triton", True))
    monkeypatch.setattr(lean, "importlib", SimpleNamespace(util=spec))
    compiled: list[Any] = []
    monkeypatch.setattr(lean, "compile_towers", compiled.append)
    wanted = Train.model_validate(how.get("train", {}))
    found = lean.compile_if_it_pays(
        encoder, wanted, how.get("steps", 500), how.get("kind", "cuda"), how.get("processes", 1)
    )
    assert found is expected
    assert len(compiled) == expected


def test_a_run_writes_down_what_auto_was_and_goes_on_with_it(
    experiment: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(lean, "compile_if_it_pays", lambda *given: bool(asked.append(given[2])))
    wanted = experiment()
    training.fit(wanted, Console(quiet=True))
    run = Path(wanted.output)
    assert config.load(run / "config.yaml").train.compile is False
    (run / "results.json").unlink()
    training.fit(wanted, Console(quiet=True))
    assert len(asked) == 1, "a run that goes on does not choose again"
    assert len(json.loads((run / "results.json").read_text())) > 3
