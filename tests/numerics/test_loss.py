"""The exact step against a textbook formula with a full matrix and autograd, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cytoclip import adapters, checkpoint, loss, model
from cytoclip.config import Model
from cytoclip.device import World
from cytoclip.pairs import Identity, right_answers

ALONE = World(torch.device("cpu"))
B, D = 12, 8

IDENTITIES = {
    "no repeats": Identity(torch.arange(B), torch.arange(B), torch.full((B,), -1)),
    "repeated captions": Identity(torch.arange(B) // 3, torch.arange(B), torch.full((B,), -1)),
    "captions, images and groups that overlap": Identity(
        torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]),
        torch.tensor([0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9]),
        torch.tensor([-1, -1, 0, 0, 0, -1, 1, 1, -1, 2, -1, 2]),
    ),
}


def textbook(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    logit_scale: torch.Tensor,
    identity: Identity,
    positives: str = "groups",
) -> torch.Tensor:
    """Symmetric cross-entropy over a whole matrix, with targets uniform over the right answers."""
    right_BB, pair_BB = right_answers(identity, identity), torch.eye(len(image_BD), dtype=torch.bool)
    target_BB = (right_BB if positives == "groups" else pair_BB).double()
    scores_BB = logit_scale.exp() * image_BD @ text_BD.T
    if positives == "ignore":
        scores_BB = scores_BB.masked_fill(right_BB & ~pair_BB, -1e300)
    by_row = -(target_BB / target_BB.sum(1, keepdim=True) * scores_BB.log_softmax(1)).sum(1).mean()
    by_column = -(target_BB / target_BB.sum(0, keepdim=True) * scores_BB.log_softmax(0)).sum(0).mean()
    return (by_row + by_column) / 2


@pytest.mark.parametrize("rows", [1, 5, 1024])
@pytest.mark.parametrize("positives", ["groups", "pairs", "ignore"])
@pytest.mark.parametrize("name", IDENTITIES)
def test_loss_and_gradients_of_embeddings_are_the_textbook_s(
    name: str, positives: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss.BLOCK_SCORES, "cpu", rows * B)
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(B, D).double()).requires_grad_() for _ in range(2))
    scale = torch.tensor(2.7, dtype=torch.float64, requires_grad=True)
    expected = textbook(image, text, scale, IDENTITIES[name], positives)
    expected.backward()

    found = loss.info_nce(image.detach(), text.detach(), scale.detach(), IDENTITIES[name], ALONE, positives)

    assert torch.allclose(found.loss, expected, rtol=1e-13, atol=0)
    assert torch.allclose(found.images, image.grad, rtol=0, atol=1e-14)
    assert torch.allclose(found.texts, text.grad, rtol=0, atol=1e-14)
    assert torch.allclose(found.logit_scale, scale.grad, rtol=0, atol=1e-14)


def test_the_three_ways_to_take_right_answers_differ_only_where_something_repeats() -> None:
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(B, D).double()) for _ in range(2))
    for name, identity in IDENTITIES.items():
        values = {
            loss.info_nce(image, text, torch.tensor(2.7).double(), identity, ALONE, way).loss.item()
            for way in ("groups", "pairs", "ignore")
        }
        assert len(values) == (1 if name == "no repeats" else 3)


def test_without_repeats_it_is_the_loss_of_transformers(base: Path) -> None:
    clip = model.read(str(base)).clip
    pixels, tokens = _inputs(clip)
    clip.logit_scale.data.fill_(2.0)
    expected = clip(input_ids=tokens, pixel_values=pixels, return_loss=True)
    found = loss.info_nce(
        expected.image_embeds.detach(),
        expected.text_embeds.detach(),
        clip.logit_scale.detach(),
        IDENTITIES["no repeats"],
        ALONE,
    )
    assert torch.allclose(found.loss, expected.loss, rtol=1e-6)


@pytest.mark.parametrize("name", IDENTITIES)
@pytest.mark.parametrize("towers", [("full", "full"), ("lora", "lora"), ("frozen", "lora"), ("full", "frozen")])
def test_every_parameter_s_gradient_is_the_textbook_s(name: str, towers: tuple[str, str], base: Path) -> None:
    encoder = checkpoint.open_model(str(base)).encoder
    encoder.to_floats = lambda pixels: pixels
    torch.manual_seed(0)
    adapters.set_moving(encoder, Model.model_validate({"image_tower": towers[0], "text_tower": towers[1]}))
    encoder.double()
    for parameter_name, parameter in encoder.moving().items():
        if ".lora_B." in parameter_name:  # zero at the start, which would leave lora_A without a gradient
            torch.nn.init.normal_(parameter, std=0.1)
    pixels, tokens = _inputs(encoder.clip)
    textbook(*encoder(pixels.double(), tokens), encoder.logit_scale, IDENTITIES[name]).backward()
    expected = {n: p.grad.clone() for n, p in encoder.moving().items()}
    encoder.zero_grad()

    loss.contrastive_step(encoder, encoder.logit_scale, [(pixels.double(), tokens)], IDENTITIES[name], ALONE)

    found = {n: p.grad for n, p in encoder.moving().items()}
    assert expected.keys() == found.keys()
    assert "logit_scale" in found
    for parameter_name, gradient in expected.items():
        assert torch.allclose(found[parameter_name], gradient, rtol=0, atol=1e-12), parameter_name
    assert all(parameter.grad is None for parameter in encoder.parameters() if not parameter.requires_grad)


def test_factor_multiplies_every_gradient(base: Path) -> None:
    gradients = []
    for factor in (1.0, 1024.0):
        encoder = checkpoint.open_model(str(base)).encoder
        encoder.to_floats = lambda pixels: pixels
        inputs, identity = _inputs(encoder.clip), IDENTITIES["no repeats"]
        loss.contrastive_step(encoder, encoder.logit_scale, [inputs], identity, ALONE, factor=factor)
        gradients.append({n: p.grad / factor for n, p in encoder.moving().items()})
    for parameter_name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][parameter_name], gradient, rtol=1e-5, atol=1e-8), parameter_name


def test_the_floor_that_repeats_impose_is_reached_by_perfect_embeddings() -> None:
    """Three pairs of one caption can at best share a third each: the loss cannot fall below ln 3 there."""
    identity = IDENTITIES["repeated captions"]
    classes = torch.nn.functional.one_hot(identity.caption).double()
    found = loss.info_nce(classes, classes, torch.tensor(10.0).double(), identity, ALONE)
    assert found.loss.item() == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-3)
    assert found.hit_at_1.item() == 1


def _inputs(clip: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    side, text = clip.config.vision_config.image_size, clip.config.text_config
    pixels = torch.randn(B, 3, side, side, generator=generator)
    tokens = torch.randint(3, text.vocab_size - 2, (B, 9), generator=generator)
    tokens[:, -1] = text.eos_token_id
    return pixels, tokens
