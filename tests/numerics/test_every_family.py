"""What moves, stays, is averaged and comes back in every family: real steps of AdamW, whole runs, equal weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cytoclip import adapters, checkpoint, optim, training
from cytoclip.checkpoint import Opened
from cytoclip.config import Config, Model, Train
from cytoclip.console import Console
from tests import tiny

pytestmark = pytest.mark.slow  # half a minute; each part has a quicker test beside its module

KINDS = ("clip", *tiny.MADE)
MODES = ("full", "frozen", "lora")
ALL_OF_LORA = {"rank": 4, "alpha": 2.0, "rslora": True, "dora": True}


def logits(opened: Opened) -> torch.Tensor:
    encoder, generator = opened.encoder.eval(), torch.Generator().manual_seed(3)
    text = encoder.clip.config.text_config
    pixels_B3HW = torch.randint(0, 256, (4, 3, tiny.SIDE, tiny.SIDE), dtype=torch.uint8, generator=generator)
    tokens_BL = torch.randint(5, text.vocab_size, (4, 16), generator=generator)
    tokens_BL[:, -1] = getattr(text, "eos_token_id", None) or 5
    image_BD, text_BD = encoder(pixels_B3HW, tokens_BL)
    bias = 0.0 if encoder.logit_bias is None else encoder.logit_bias
    return encoder.logit_scale.exp() * image_BD @ text_BD.T + bias


def take_steps(opened: Opened) -> None:
    """With a strong decay: whatever is handed to AdamW by mistake moves. The scale and the bias have a gradient too."""
    optimizer = optim.build(opened.encoder, Train(learning_rate=1e-2, weight_decay=0.5))
    for _ in range(2):
        optimizer.zero_grad()
        logits_BB = logits(opened)
        (logits_BB.square().mean() - logits_BB.log_softmax(dim=1).diagonal().mean()).backward()
        optimizer.step()


def everything(opened: Opened) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those too that are not saved."""
    clip = opened.encoder.clip
    return dict([*clip.named_parameters(), *clip.named_buffers()])


@pytest.mark.parametrize("kind", ["siglip", "two towers"])
@pytest.mark.parametrize("towers", list(itertools.product(MODES, MODES)), ids="-".join)
def test_what_is_frozen_keeps_its_bytes_and_every_adapter_moves(
    towers: tuple[str, str], kind: str, bases: dict[str, Path]
) -> None:
    """Traps 33, 35 and 45."""
    opened = checkpoint.open_model(str(bases[kind]))
    before = {name: tensor.clone() for name, tensor in everything(opened).items()}
    adapters.set_moving(opened.encoder, Model.model_validate({"image_tower": towers[0], "text_tower": towers[1]}))
    new = {name: parameter.detach().clone() for name, parameter in opened.encoder.moving().items()}
    take_steps(opened)
    after = everything(opened)
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in after.items() if ".lora_" not in name}
    assert plain.keys() == before.keys()
    for tower, mode in zip(("vision_model.", "text_model."), towers, strict=True):
        names = [name for name in before if name.startswith(tower)]
        assert len(names) > 20
        same = [name for name in names if torch.equal(plain[name], before[name])]
        assert (same == names) == (mode != "full")
        adapted = [name for name in new if name.startswith(tower) and ".lora_" in name]
        assert len(adapted) == (tiny.LAYERS * 3 * 2 if mode == "lora" else 0)  # layers × q, k, v × A, B
        assert not any(torch.equal(new[name], after[name]) for name in adapted)
    beside = [name for name in before if not name.startswith(("vision_model.", "text_model."))]
    assert len(beside) == (2 if kind == "siglip" else 3)  # scale and bias, or scale and projections
    assert not any(torch.equal(plain[name], before[name]) for name in beside)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("towers", [("lora", "frozen"), ("full", "lora")], ids="-".join)
def test_rslora_and_dora_together_are_saved_and_opened_alike(
    towers: tuple[str, str], kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Trap 44: once as an adapter beside its base, once merged; saving leaves the training weights their bytes."""
    wanted = Model.model_validate({"image_tower": towers[0], "text_tower": towers[1], "lora": ALL_OF_LORA})
    opened = checkpoint.open_model(str(bases[kind]))
    start = logits(opened).detach()
    adapter = adapters.set_moving(opened.encoder, wanted)
    assert torch.allclose(logits(opened), start, atol=1e-4), "a new adapter changes the model"
    take_steps(opened)
    expected, held = logits(opened).detach(), {name: tensor.clone() for name, tensor in everything(opened).items()}
    checkpoint.save_model(tmp_path / "model", opened, adapter, wanted)
    assert all(torch.equal(tensor, held[name]) for name, tensor in everything(opened).items())
    again = checkpoint.open_model(str(tmp_path / "model"))
    assert (tmp_path / "model" / "adapter_config.json").is_file() == ("full" not in towers)
    assert everything(again).keys() == everything(checkpoint.open_model(str(bases[kind]))).keys()
    assert torch.allclose(logits(again), expected, atol=1e-4 * float(expected.abs().max()))
    assert (expected - start).abs().max() > 0.05, "the steps moved nothing: the test shows nothing"


@pytest.mark.parametrize(("lora", "each"), [({}, 2), ({"rslora": True}, 2), ({"dora": True}, 3)])
def test_adapters_and_magnitudes_are_float32_on_a_base_of_half_precision(
    lora: dict[str, Any], each: int, base: Path
) -> None:
    """Trap 13."""
    opened = checkpoint.open_model(str(base))
    opened.encoder.clip.half()
    wanted = Model.model_validate({"image_tower": "lora", "text_tower": "lora", "lora": lora})
    adapters.set_moving(opened.encoder, wanted)
    found = [parameter.dtype for name, parameter in opened.encoder.moving().items() if ".lora_" in name]
    assert found == [torch.float32] * (2 * tiny.LAYERS * 3 * each)


@pytest.mark.parametrize("kind", ["siglip", "two towers"])
def test_a_run_with_averages_and_adapters_that_grows_ends_as_the_long_one(
    kind: str, bases: dict[str, Path], experiment: Callable[..., Config], tmp_path: Path
) -> None:
    """Averages and adapters come back from a checkpoint; what is saved is the average."""

    def run(folder: str, steps: int, ema: float | None) -> dict[str, torch.Tensor]:
        lora = {**ALL_OF_LORA, "dropout": 0.1, "last_layers": 1}
        given = experiment(
            model={"name": str(bases[kind]), "image_tower": "lora", "lora": lora},
            train={"steps": steps, "ema": ema, "layer_decay": 0.7, "text_learning_rate": 5e-4},
            validate={"every": 2},
            checkpoint={"every": 2},
            output=str(tmp_path / folder),
        )
        training.fit(given, Console())
        return everything(checkpoint.open_model(str(tmp_path / folder / "model")))

    long, short = run("long", 4, 0.5), run("grown", 2, 0.5)
    grown, bare = run("grown", 4, 0.5), run("bare", 4, None)
    assert grown.keys() == long.keys()
    assert all(torch.equal(grown[name], tensor) for name, tensor in long.items())
    weight = "text_model.encoder.layers.1.mlp.fc1.weight" if kind == "siglip" else "text_projection.weight"
    for other in (short, bare):
        assert not torch.equal(other[weight], long[weight])
