"""The exact step against a textbook formula with a full matrix and autograd, in float64."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from cytoclip import adapters, checkpoint, loss, model, objectives
from cytoclip.config import Model
from cytoclip.device import World
from cytoclip.objectives import Embeddings, Objective, contrast
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
    objective: Objective = Objective(),  # noqa: B008 - frozen
    bias: torch.Tensor | None = None,
    start: Embeddings | None = None,
) -> torch.Tensor:
    """The whole matrix, with autograd: symmetric cross-entropy or pairwise sigmoid, and the anchor."""
    right_BB, pair_BB = right_answers(identity, identity), torch.eye(len(image_BD), dtype=torch.bool)
    target_BB = right_BB if objective.positives == "groups" else pair_BB
    in_BB = ~(right_BB & ~pair_BB) if objective.positives == "ignore" else torch.ones_like(right_BB)
    scores_BB = logit_scale.exp() * image_BD @ text_BD.T
    if objective.kind == "sigmoid":
        each_BB = torch.nn.functional.logsigmoid((2.0 * target_BB.double() - 1) * (scores_BB + bias))
        value = -each_BB[in_BB].sum() / len(image_BD)
    else:
        value = (_cross_entropy(scores_BB, target_BB, in_BB, objective.smoothing)
                 + _cross_entropy(scores_BB.T, target_BB.T, in_BB.T, objective.smoothing)) / 2  # fmt: skip
    if start is not None:
        for now, then in zip((image_BD, text_BD), start, strict=True):
            value = value + objective.anchor_embeddings * (now - then).square().sum(1).mean() / 2
        away_BB = image_BD @ text_BD.T - start[0] @ start[1].T
        value = value + objective.anchor_similarities * away_BB.square().mean()
    return value


def hits_at_1(scores_BB: torch.Tensor, identity: Identity, objective: Objective) -> float:
    right_BB, hits = right_answers(identity, identity), 0
    for row, scores in enumerate(scores_BB.tolist()):
        wrong_too = [j for j in range(B) if objective.positives != "ignore" or j == row or not right_BB[row, j]]
        best = max(wrong_too, key=scores.__getitem__)
        hits += best == row or (objective.positives == "groups" and bool(right_BB[row, best]))
    return hits / B


def _cross_entropy(
    scores_BB: torch.Tensor, target_BB: torch.Tensor, in_BB: torch.Tensor, smoothing: float
) -> torch.Tensor:
    rows = []
    for scores, target, candidates in zip(scores_BB, target_BB, in_BB, strict=True):
        kept, right = scores[candidates], target[candidates].double()
        wanted = (1 - smoothing) * right / right.sum() + smoothing / len(kept)
        rows.append(-(wanted * kept.log_softmax(0)).sum())
    return torch.stack(rows).mean()


OBJECTIVES = [
    Objective(kind, positives, smoothing, *anchor)
    for kind, smoothing in (("infonce", 0.0), ("infonce", 0.1), ("sigmoid", 0.0))
    for positives in ("groups", "pairs", "ignore")
    for anchor in ((0.0, 0.0), (0.3, 0.7))
]


@pytest.mark.parametrize("tile", [(1, 12), (5, 1), (4, 5), (1024, 1024)], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("name", IDENTITIES)
def test_loss_and_gradients_of_embeddings_are_the_textbook_s(
    name: str, objective: Objective, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(objectives.TILE, "cpu", tile)
    torch.manual_seed(0)
    image, text, *start = (functional.normalize(torch.randn(B, D).double()) for _ in range(4))
    image.requires_grad_(), text.requires_grad_()
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.7, -1.3))
    anchor = (start[0], start[1]) if objective.anchored else None
    expected = textbook(image, text, scale, IDENTITIES[name], objective, bias, anchor)
    expected.backward()

    found = contrast((image, text), scale, bias, IDENTITIES[name], ALONE, objective, anchor)

    assert torch.allclose(found.loss, expected, rtol=1e-13, atol=0)
    assert torch.allclose(found.images, image.grad, rtol=0, atol=1e-14)
    assert torch.allclose(found.texts, text.grad, rtol=0, atol=1e-14)
    assert torch.allclose(found.logit_scale, scale.grad, rtol=0, atol=1e-14)
    if objective.kind == "sigmoid":
        assert torch.allclose(found.logit_bias, bias.grad, rtol=0, atol=1e-14)
    assert (found.anchor > 0) == objective.anchored
    assert found.hit_at_1.item() == pytest.approx(hits_at_1(image @ text.T, IDENTITIES[name], objective), abs=1e-15)


def test_there_are_eighteen_objectives() -> None:
    assert len(OBJECTIVES) == len(set(OBJECTIVES)) == 18


def test_the_three_ways_to_take_right_answers_differ_only_where_something_repeats() -> None:
    torch.manual_seed(0)
    image, text = (functional.normalize(torch.randn(B, D).double()) for _ in range(2))
    scale, bias = torch.tensor(2.7).double(), torch.tensor(-1.0).double()
    for kind in ("infonce", "sigmoid"):
        for name, identity in IDENTITIES.items():
            values = {
                contrast((image, text), scale, bias, identity, ALONE, Objective(kind, way)).loss.item()
                for way in ("groups", "pairs", "ignore")
            }
            assert len(values) == (1 if name == "no repeats" else 3)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_knowing_nothing_costs_what_chance_loss_says(kind: Any) -> None:
    """Trap 37: equal embeddings, and for the sigmoid the bias that is best for them."""
    same = functional.normalize(torch.ones(B, D).double())
    bias = torch.tensor(-math.log(B - 1)).double()  # σ(bias) = 1/B
    found = contrast((same, same), torch.tensor(-50.0).double(), bias, IDENTITIES["no repeats"], ALONE, Objective(kind))
    assert found.loss.item() == pytest.approx(Objective(kind).chance_loss(B), abs=1e-12)


def test_without_repeats_it_is_the_loss_of_transformers(base: Path) -> None:
    clip = model.read(str(base)).clip
    pixels, tokens = _inputs(clip)
    clip.logit_scale.data.fill_(2.0)
    expected = clip(input_ids=tokens, pixel_values=pixels, return_loss=True)
    own = expected.image_embeds.detach(), expected.text_embeds.detach()
    found = contrast(own, clip.logit_scale.detach(), None, IDENTITIES["no repeats"], ALONE, Objective())
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

    loss.contrastive_step(
        encoder, loss.Logits(encoder.logit_scale), [(pixels.double(), tokens)], IDENTITIES[name], ALONE
    )

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
        loss.contrastive_step(encoder, loss.Logits(encoder.logit_scale), [inputs], identity, ALONE, factor=factor)
        gradients.append({n: p.grad / factor for n, p in encoder.moving().items()})
    for parameter_name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][parameter_name], gradient, rtol=1e-5, atol=1e-8), parameter_name


def test_the_floor_that_repeats_impose_is_reached_by_perfect_embeddings() -> None:
    """Three pairs of one caption can at best share a third each: the loss cannot fall below ln 3 there."""
    identity = IDENTITIES["repeated captions"]
    classes = torch.nn.functional.one_hot(identity.caption).double()
    found = contrast((classes, classes), torch.tensor(10.0).double(), None, identity, ALONE, Objective())
    assert found.loss.item() == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-3)
    assert found.hit_at_1.item() == 1


def _inputs(clip: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    side, text = clip.config.vision_config.image_size, clip.config.text_config
    pixels = torch.randn(B, 3, side, side, generator=generator)
    tokens = torch.randint(3, text.vocab_size - 2, (B, 9), generator=generator)
    tokens[:, -1] = text.eos_token_id
    return pixels, tokens


def test_the_loss_alone_leaves_no_memory_behind() -> None:
    """In a process that keeps what it frees, as training does on a CPU: 300 MB were scattered for 8,192 pairs."""
    program = (
        "import sys, torch; sys.path.insert(0, 'bench'); import memory; from cytoclip import device\n"
        "device.keep_memory()\n"
        "work = memory._loss(memory.Point('loss', 8192, 1, 64, 'cpu'))\n"
        "before = memory._status('VmRSS'); work(); print(memory._status('VmRSS') - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 100
