"""What is decayed, how fast it learns, and that clipping clips."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cytoclip import adapters, checkpoint, optim
from cytoclip.config import Model, Train
from cytoclip.errors import UserError
from cytoclip.model import DualEncoder


def set_up(folder: Path, **wanted: Any) -> DualEncoder:
    encoder = checkpoint.open_model(str(folder)).encoder
    adapters.set_moving(encoder, Model.model_validate(wanted))
    return encoder


def test_only_matrices_are_decayed(base: Path) -> None:
    """Trap 10: decay pulls norms and the temperature toward zero."""
    encoder = set_up(base)
    parameters = encoder.moving()
    names = {id(parameter): name for name, parameter in parameters.items()}
    decayed, rest = optim.build(encoder, Train(weight_decay=0.2)).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.2, 0.0)
    decayed_names, rest_names = ({names[id(p)] for p in group["params"]} for group in (decayed, rest))
    assert "logit_scale" in rest_names
    assert any("norm" in name for name in rest_names)
    assert all(name.endswith((".weight", "embedding.weight")) for name in decayed_names)
    assert all(name.endswith((".bias", "logit_scale", "class_embedding")) or "norm" in name for name in rest_names)
    assert not any("norm" in name or "bias" in name for name in decayed_names)
    assert not decayed_names & rest_names
    assert decayed_names | rest_names == set(parameters)
    # 4 layers × 6 matrices, 4 embeddings, 2 projections; 4 × 10 biases and norms, 3 outer norms, class, logit scale
    assert (len(decayed_names), len(rest_names)) == (24 + 4 + 2, 40 + 6 + 2)


def test_single_vectors_of_any_shape_are_not_decayed(bases: dict[str, Path]) -> None:
    """DINOv2's class token and the probe of SigLIP's head have three dimensions, SigLIP's scale and bias one."""
    for kind, vectors in (
        ("two towers", {"vision_model.embeddings.cls_token"}),
        ("siglip", {"vision_model.head.probe", "logit_scale", "logit_bias"}),
    ):
        encoder = set_up(bases[kind])
        names = {id(parameter): name for name, parameter in encoder.moving().items()}
        rest = optim.build(encoder, Train()).param_groups[-1]
        assert rest["weight_decay"] == 0
        assert vectors <= {names[id(p)] for p in rest["params"]}


def test_the_options_reach_the_optimizer(base: Path) -> None:
    optimizer = optim.build(set_up(base), Train(learning_rate=0.125, weight_decay=0.0))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_lora_adapters_are_decayed_and_the_scale_and_magnitudes_are_not(base: Path) -> None:
    both = {"image_tower": "lora", "text_tower": "lora"}
    for lora, magnitudes in (({"rank": 1}, 0), ({"dora": True}, 2 * 2 * 3)):
        encoder = set_up(base, **both, lora=lora)
        decayed, rest = optim.build(encoder, Train()).param_groups
        assert len(rest["params"]) == magnitudes + 1
        assert any(p is encoder.logit_scale for p in rest["params"])
        assert len(decayed["params"]) == len(encoder.moving()) - len(rest["params"])


RATES = {"learning_rate": 1e-3, "image_learning_rate": 5e-4, "text_learning_rate": 2e-3, "layer_decay": 0.5}


def slow_factor(name: str, layers: int, image: float, text: float, projection: float, decay: float) -> float:
    """By the name of the parameter alone, for CLIP."""
    part = name.split(".")[0]
    if part.endswith("projection"):
        return projection
    if part.startswith("logit"):
        return 1.0
    tower = image if part == "vision_model" else text
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer:
        return tower * decay ** (layers - 1 - int(layer[1]))
    return tower * (decay**layers if ".embeddings." in name or "pre_layrnorm" in name else 1.0)


@pytest.mark.parametrize("towers", [("full", "full"), ("lora", "lora"), ("lora", "full")], ids="-".join)
@pytest.mark.parametrize("given", [{}, RATES, {**RATES, "projection_learning_rate": 1e-2}, {"layer_decay": 0.7}])
def test_factors_equal_their_slow_twin(towers: tuple[str, str], given: dict[str, float], base: Path) -> None:
    encoder = set_up(base, image_tower=towers[0], text_tower=towers[1])
    wanted = Train.model_validate(given)
    peak = wanted.learning_rate
    shares = [
        (rate or peak) / peak
        for rate in (wanted.image_learning_rate, wanted.text_learning_rate, wanted.projection_learning_rate)
    ]
    expected = {name: slow_factor(name, 2, *shares, wanted.layer_decay) for name in encoder.moving()}
    assert optim.factors(encoder, wanted) == pytest.approx(expected, rel=1e-12)
    optimizer = optim.build(encoder, wanted)
    optim.set_rates(optimizer, peak / 4)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in encoder.moving().items()} == pytest.approx(
        {name: factor * peak / 4 for name, factor in expected.items()}, rel=1e-12
    )


def test_some_factors_by_hand(base: Path, bases: dict[str, Path]) -> None:
    """Of two layers each; `refuse_idle` has nothing to say."""
    wanted = Train.model_validate({**RATES, "projection_learning_rate": 1e-2})
    encoder = set_up(base)
    optim.refuse_idle(encoder, wanted)
    found = optim.factors(encoder, wanted)
    by_hand = {
        "vision_model.embeddings.patch_embedding.weight": 0.125,
        "vision_model.pre_layrnorm.weight": 0.125,
        "vision_model.encoder.layers.0.mlp.fc1.weight": 0.25,
        "vision_model.encoder.layers.1.mlp.fc1.weight": 0.5,
        "vision_model.post_layernorm.bias": 0.5,
        "text_model.embeddings.token_embedding.weight": 0.5,
        "text_model.encoder.layers.0.layer_norm1.weight": 1.0,
        "text_model.encoder.layers.1.layer_norm1.weight": 2.0,
        "text_model.final_layer_norm.weight": 2.0,
        "visual_projection.weight": 10.0,
        "text_projection.weight": 10.0,
        "logit_scale": 1.0,
    }
    assert {name: found[name] for name in by_hand} == pytest.approx(by_hand)
    others = {
        "siglip": {"logit_bias": 1.0, "vision_model.head.probe": 0.5, "text_model.head.weight": 2.0},
        "chinese_clip": {"text_model.encoder.layer.0.attention.self.query.weight": 1.0, "text_projection.weight": 1.0},
        "two towers": {"vision_model.embeddings.cls_token": 0.125, "vision_model.layernorm.weight": 0.5},
    }
    for kind, expected in others.items():
        found = optim.factors(set_up(bases[kind]), Train.model_validate(RATES))
        assert {name: found[name] for name in expected} == pytest.approx(expected), kind


@pytest.mark.parametrize(
    ("kind", "model", "train", "said"),
    [
        ("clip", {"image_tower": "frozen"}, {"image_learning_rate": 1e-4}, "the image tower does not move"),
        ("clip", {"text_tower": "frozen"}, {"text_learning_rate": 1e-4}, "the text tower does not move"),
        ("clip", {"projections": "frozen"}, {"projection_learning_rate": 1e-4}, "the projections do not move"),
        ("siglip", {}, {"projection_learning_rate": 1e-4}, "the projections are parts of the towers in SigLIP"),
        ("clip", {"image_tower": "frozen", "text_tower": "frozen"}, {"layer_decay": 0.9}, "neither tower moves"),
    ],
)
def test_a_rate_of_what_does_not_move_is_refused(
    kind: str, model: dict[str, str], train: dict[str, float], said: str, bases: dict[str, Path]
) -> None:
    encoder = set_up(bases[kind], **model)
    with pytest.raises(UserError, match=said) as caught:
        optim.refuse_idle(encoder, Train.model_validate(train))
    assert caught.value.hint == f"delete train.{next(iter(train))}"
    optim.refuse_idle(encoder, Train())
    optim.refuse_idle(set_up(bases["clip"]), Train.model_validate(train))


def test_layer_decay_without_layers_in_a_row_is_refused(base: Path) -> None:
    encoder = set_up(base)
    encoder.clip.vision_model.config.num_hidden_layers = 7  # none of its lists is that long
    with pytest.raises(UserError, match=r"layer_decay: 0.9 needs layers in a row, and the image tower \(CLIPVision"):
        optim.refuse_idle(encoder, Train(layer_decay=0.9))


def slow_learning_rate(step: int, steps: int, wanted: Train) -> float:
    """Walk from step to step and draw the line by hand."""
    peak, warm = wanted.learning_rate, wanted.warmup_steps
    if step < warm:
        return sum(peak / warm for _ in range(step + 1))
    falling = steps - warm
    position = step - warm
    if wanted.schedule == "constant" or falling <= 0:
        return peak
    if wanted.schedule == "linear":
        return peak - sum(peak / falling for _ in range(position))
    return peak * math.cos(math.pi / 2 * position / falling) ** 2  # (1 + cos 2x) / 2


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (4, 10), (9, 10), (10, 10), (25, 10), (0, 1)])
def test_the_learning_rate_equals_its_slow_twin(schedule: str, warmup: int, steps: int) -> None:
    wanted = Train(learning_rate=3e-4, warmup_steps=warmup, schedule=schedule)  # type: ignore[arg-type]
    found = [optim.learning_rate(step, steps, wanted) for step in range(steps)]
    assert found == pytest.approx([slow_learning_rate(step, steps, wanted) for step in range(steps)], rel=1e-9)
    assert all(0 < rate <= 3e-4 * (1 + 1e-9) for rate in found)  # no step is wasted at a rate of zero


def test_the_warm_up_rises_to_the_peak_at_its_last_step() -> None:
    wanted = Train(learning_rate=1.0, warmup_steps=4)
    assert [optim.learning_rate(step, 100, wanted) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_learning_rate_depends_on_nothing_but_its_arguments() -> None:
    """Trap 31: a schedule that is stepped runs W times as fast on W processes, and begins again on resume."""
    wanted = Train(warmup_steps=3, schedule="cosine")
    forward = [optim.learning_rate(step, 20, wanted) for step in range(20)]
    backward = [optim.learning_rate(step, 20, wanted) for step in reversed(range(20))]
    assert forward == backward[::-1]


def with_gradients(*gradients: list[float] | None) -> dict[str, torch.nn.Parameter]:
    made = {}
    for i, gradient in enumerate(gradients):
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = None if gradient is None else torch.tensor(gradient)
        made[f"p{i}"] = parameter
    return made


def norm_of(parameters: dict[str, torch.nn.Parameter]) -> float:
    return math.sqrt(sum(float((p.grad**2).sum()) for p in parameters.values() if p.grad is not None))


def test_clipping_returns_the_norm_before_and_leaves_the_limit() -> None:
    """Trap 9: clipping over an exhausted generator of parameters logs a norm of 0 and never clips."""
    parameters = with_gradients([3.0, 0.0], None, [0.0, 4.0])
    assert optim.clip(parameters, 1.0).item() == pytest.approx(5.0)
    assert norm_of(parameters) == pytest.approx(1.0, rel=1e-4)
    assert norm_of(parameters) <= 1.0
    assert parameters["p0"].grad.tolist() == pytest.approx([0.6, 0.0], rel=1e-4)  # the direction is kept


def test_gradients_below_the_limit_are_left_alone() -> None:
    parameters = with_gradients([0.375, 0.0], [0.0, 0.5])
    assert optim.clip(parameters, 1.0).item() == 0.625
    assert parameters["p0"].grad.tolist() == [0.375, 0.0]


def test_no_limit_measures_and_changes_nothing() -> None:
    parameters = with_gradients([30.0, 0.0], [0.0, 40.0])
    norm = optim.clip(parameters, None)
    assert norm.item() == pytest.approx(50.0)
    assert norm.ndim == 0
    assert norm_of(parameters) == pytest.approx(50.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad: float) -> None:
    """So that one look at two numbers is enough to refuse the step."""
    assert not math.isfinite(optim.clip(with_gradients([1.0, bad], [1.0, 1.0]), 1.0).item())
