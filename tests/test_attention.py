"""Attention by matrix products against softmax(scale · Q Kᵀ + mask) V written out in float64, and where it is used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cytoclip import attention, checkpoint
from tests import tiny

Tensors = tuple[torch.Tensor, ...]
CAUSAL = torch.ones(9, 9, dtype=torch.bool).tril()
MASKS = {
    "none": None,
    "causal": CAUSAL,
    "padded": (torch.arange(9) < torch.tensor([9, 4, 7])[:, None])[:, None, None],
    "added": torch.where(CAUSAL, 0.0, -1e4).to(torch.bfloat16)[None, None],
}


class Module(torch.nn.Module):
    is_causal = False


def inputs(tokens: int = 9, dimensions: int = 8) -> Tensors:
    """Query, key and value of 3 rows and 2 heads, as layers make them: heads behind the tokens in memory."""
    generator = torch.Generator().manual_seed(0)
    shape = 4, 3, tokens, 2, dimensions
    return tuple(each.transpose(1, 2) for each in torch.randn(shape, generator=generator).bfloat16())


def twin(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scale: float) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    shares = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    return (shares @ value).transpose(1, 2)


def with_gradients(attend: Callable[..., torch.Tensor], given: Tensors, by_output: torch.Tensor) -> Tensors:
    leaves = [each.clone().requires_grad_() for each in given]
    found = attend(*leaves)
    return found, *torch.autograd.grad(found, leaves, by_output)


@pytest.mark.parametrize("name", MASKS)
def test_output_and_gradients_are_those_of_the_formula(name: str) -> None:
    *given, by_output = inputs()
    module, scale, mask = Module().train(), 0.3, MASKS[name]
    causal = name == "causal"

    def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        shown = None if causal else mask
        return attention._attend(module, query, key, value, shown, scaling=scale, is_causal=causal)[0]

    def formula(*leaves: torch.Tensor) -> torch.Tensor:
        return twin(*leaves, mask if mask is None or mask.dtype == torch.bool else mask.double(), scale)

    sent = by_output.transpose(1, 2)
    found = with_gradients(ours, tuple(given), sent)
    expected = with_gradients(formula, tuple(each.double() for each in given), sent.double())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert ((one.double() - other).norm() / other.norm()) < 0.008, "two roundings of bf16"


def test_no_row_sees_what_is_masked() -> None:
    query, key, value, _ = inputs()
    module = Module().train()
    before = attention._attend(module, query, key, value, None, is_causal=True)[0]
    value[:, :, 5:] += 100
    key[:, :, 5:] -= 3
    after = attention._attend(module, query, key, value, None, is_causal=True)[0]
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize(
    "case", ["bf16", "not training", "float32", "dropout", "long", "shared heads"]
)  # fmt: skip
def test_it_is_used_in_bf16_training_without_dropout_on_rows_that_are_not_long(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []
    apply = attention._ByProducts.apply
    monkeypatch.setattr(attention._ByProducts, "apply", lambda *given: used.append(given) or apply(*given))
    query, key, value, _ = inputs(tokens=41 if case == "long" else 9)
    module = Module().train(case != "not training")
    if case == "float32":
        query, key, value = (each.float() for each in (query, key, value))
    if case == "shared heads":
        key, value = key[:, :1], value[:, :1]
        module.num_key_value_groups = 2  # type: ignore[assignment]  # as transformers has it
    attention._attend(module, query, key, value, None, dropout=0.1 if case == "dropout" else 0.0)
    assert len(used) == (case == "bf16")


@pytest.mark.parametrize("kind", ["clip", *tiny.MADE])
def test_a_tower_trains_as_with_torchs_own_attention(kind: str, bases: dict[str, Path]) -> None:
    opened = checkpoint.open_model(str(bases[kind]))
    for module in opened.encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    encoders = [opened.encoder.train(), copy.deepcopy(opened.encoder).train()]
    before = opened.encoder.clip.config.to_dict()
    attention.quicken(opened.encoder.clip)
    assert opened.encoder.clip.config.to_dict() == before, "what is saved says nothing of it"
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (4, 3, tiny.SIDE, tiny.SIDE), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(5, 25, (4, 16), generator=generator)
    if opened.encoder.family.pools == "end":
        tokens[:, -1] = opened.encoder.clip.config.text_config.eos_token_id
    gradients = []
    for encoder in encoders:
        with torch.autocast("cpu", torch.bfloat16):
            image, text = encoder(pixels, tokens)
        (image * torch.arange(4)[:, None] + text).square().sum().backward()
        gradients.append({n: p.grad for n, p in encoder.clip.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    ours, theirs = (torch.cat([g.flatten() for g in each.values()]) for each in gradients)
    assert ((ours - theirs).norm() / theirs.norm()) < 0.02
