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


def moving(base: Path, **wanted: Any) -> DualEncoder:
    encoder = checkpoint.open_model(str(base)).encoder
    adapters.set_moving(encoder, Model.model_validate(wanted))
    return encoder


def test_only_matrices_are_decayed(base: Path) -> None:
    """Trap 10: decay pulls norms and the temperature toward zero."""
    encoder = moving(base)
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


def test_the_options_reach_the_optimizer(base: Path) -> None:
    optimizer = optim.build(moving(base), Train(learning_rate=0.125, weight_decay=0.0))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_lora_adapters_are_decayed_and_the_scale_is_not(base: Path) -> None:
    encoder = moving(base, image_tower="lora", text_tower="lora")
    parameters = encoder.moving()
    decayed, rest = optim.build(encoder, Train()).param_groups
    assert [id(p) for p in rest["params"]] == [id(parameters["logit_scale"])]
    assert len(decayed["params"]) == len(parameters) - 1


def test_each_part_and_layer_has_its_rate(base: Path) -> None:
    """By hand: 2 layers a tower, decay 0.5, twice the rate in the image tower, 100 times it in projections."""
    wanted = Train(learning_rate=1e-5, image_learning_rate=2e-5, projection_learning_rate=1e-3, layer_decay=0.5)
    encoder = moving(base)
    found = optim.factors(encoder, wanted)
    assert found.keys() == encoder.moving().keys()
    expected = {}
    for name in found:
        tower = 2.0 if name.startswith("vision_model") else 100.0 if "projection" in name else 1.0
        layer = re.search(r"layers\.(\d)", name)
        before = "embeddings" in name or "pre_layrnorm" in name
        power = 1 - int(layer[1]) if layer else 2 if before else 0
        expected[name] = tower * 0.5**power
    assert found == pytest.approx(expected)
    assert {round(value, 6) for value in found.values()} == {0.25, 0.5, 1.0, 2.0, 100.0}
    assert found["logit_scale"] == 1
    assert found["text_model.final_layer_norm.weight"] == 1
    optimizer = optim.build(encoder, wanted)
    optim.set_rates(optimizer, 3e-6)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert all(rates[id(p)] == pytest.approx(3e-6 * expected[name]) for name, p in encoder.moving().items())


def test_adapters_have_the_rate_of_their_layer(base: Path) -> None:
    found = optim.factors(moving(base, image_tower="lora", text_tower="lora"), Train(layer_decay=0.5))
    rates = {(name.split(".layers.")[0].split(".")[0], name.split(".layers.")[1][0]): f
             for name, f in found.items() if "lora_" in name}  # fmt: skip
    assert rates == {(tower, layer): {"0": 0.5, "1": 1.0}[layer] for tower in ("vision_model", "text_model")
                     for layer in "01"}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "train", "said"),
    [
        ({"image_tower": "frozen"}, {"image_learning_rate": 1e-4}, "image tower does not move"),
        ({"text_tower": "frozen"}, {"text_learning_rate": 1e-4}, "text tower does not move"),
        ({"projections": "frozen"}, {"projection_learning_rate": 1e-4}, "projections do not move"),
        ({"image_tower": "frozen", "text_tower": "frozen"}, {"layer_decay": 0.5}, "neither tower moves"),
    ],
)
def test_a_rate_of_what_does_not_move_is_refused(model: Any, train: Any, said: str, base: Path) -> None:
    with pytest.raises(UserError, match=said):
        optim.refuse_idle(moving(base, **model), Train(**train))


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
