"""What LoRA adapts in each family, that this and nothing frozen moves, and that merged weights are its own."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cytoclip import adapters, checkpoint, optim
from cytoclip.checkpoint import Opened
from cytoclip.config import Lora, Model, Train
from cytoclip.errors import UserError
from cytoclip.model import DualEncoder
from tests import tiny

KINDS = ("clip", *tiny.MADE)
BOTH = {"image_tower": "lora", "text_tower": "lora"}
VARIANTS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}
CLIP_QKV = {f"self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")}
BERT_QKV = {f"attention.self.{leaf}" for leaf in ("query", "key", "value")}
DINO_QKV = {f"attention.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")}
OLD_DINO_QKV = {f"attention.attention.{leaf}" for leaf in ("query", "key", "value")}  # in older transformers 5


def moved(folder: Path, bias: bool = True, **wanted: Any) -> Opened:
    opened = checkpoint.open_model(str(folder))
    torch.manual_seed(0)
    adapters.set_moving(opened.encoder, Model.model_validate(wanted), bias)
    return opened


def adapted(encoder: DualEncoder, tower: str) -> set[str]:
    """Paths of the adapted linear layers in a layer of a tower, with the number of the layer before them."""
    names = {name.partition(".lora_")[0] for name in encoder.moving() if ".lora_" in name}
    return {re.sub(r".*?\.layers?\.", "", name) for name in names if name.startswith(f"{tower}.")}


def embedded(encoder: DualEncoder) -> torch.Tensor:
    """Cosines of random pictures and captions."""
    generator = torch.Generator().manual_seed(2)
    text = encoder.clip.config.text_config
    pixels = torch.randint(0, 256, (4, 3, tiny.SIDE, tiny.SIDE), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(5, 25, (4, 16 if encoder.family.pools == "last" else 7), generator=generator)
    if encoder.family.pools == "end":
        tokens[:, -1] = text.eos_token_id
    image_BD, text_BD = encoder(pixels, tokens)
    return image_BD @ text_BD.T


def train_a_little(encoder: DualEncoder, steps: int = 3) -> None:
    """Real steps of AdamW with decay, on InfoNCE."""
    encoder.train()
    optimizer = optim.build(encoder, Train(learning_rate=1e-2, weight_decay=0.1))
    for _ in range(steps):
        optimizer.zero_grad()
        logits = encoder.logit_scale.exp() * embedded(encoder)
        if encoder.logit_bias is not None:
            logits = logits + 0.01 * encoder.logit_bias * torch.eye(4)
        nn.functional.cross_entropy(logits, torch.arange(4)).backward()
        optimizer.step()
    encoder.eval()


@pytest.mark.parametrize(
    ("kind", "image", "text"),
    [
        ("clip", CLIP_QKV, CLIP_QKV),
        ("siglip", CLIP_QKV, CLIP_QKV),
        ("siglip2", CLIP_QKV, CLIP_QKV),
        ("chinese_clip", CLIP_QKV, BERT_QKV),
        ("two towers", DINO_QKV, BERT_QKV),
    ],
)
def test_auto_adapts_q_k_and_v_of_every_layer(
    kind: str, image: set[str], text: set[str], bases: dict[str, Path]
) -> None:
    """Trap 45: names of one tower must not adapt the other one not at all. The lists are snapshots."""
    encoder = moved(bases[kind], **BOTH).encoder
    for tower, leaves in ((encoder.family.image_tower, image), (encoder.family.text_tower, text)):
        found = adapted(encoder, tower)
        leaves = OLD_DINO_QKV if leaves == DINO_QKV and "0.attention.attention.query" in found else leaves
        assert found == {f"{i}.{leaf}" for i in range(tiny.LAYERS) for leaf in leaves}
    beside = {name.partition(".")[0] for name in encoder.moving() if ".lora_" not in name}
    bias = {"logit_bias"} if "siglip" in kind else set()
    assert beside == {*encoder.family.projections, "logit_scale", *bias}
    assert len(encoder.moving()) == 2 * tiny.LAYERS * 3 * 2 + len(beside)  # towers × layers × leaves × A and B


def test_the_logit_bias_moves_only_where_it_is_told_to(bases: dict[str, Path]) -> None:
    """Under InfoNCE it has no gradient: a constant on all logits."""
    assert "logit_bias" in moved(bases["siglip"]).encoder.moving()
    assert "logit_bias" not in moved(bases["siglip"], bias=False).encoder.moving()
    assert "logit_bias" not in moved(bases["clip"], bias=True).encoder.moving()


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"rank": 8, "alpha": 8.0}, 1.0),
        ({"rank": 8, "alpha": 1.0}, 0.125),
        ({"rank": 16, "alpha": 8.0, "rslora": True}, 2.0),
        ({"rank": 4, "alpha": 8.0, "dora": True}, 2.0),
    ],
)
def test_scaling_is_what_the_layers_multiply_with(base: Path, lora: dict[str, Any], expected: float) -> None:
    """Trap 12: alpha is not the scaling."""
    opened = moved(base, image_tower="lora", lora=lora)
    found = {s for _, layer in adapters._lora_layers(opened.encoder.clip) for s in layer.scaling.values()}
    assert found == {expected}
    assert adapters.scaling(Lora.model_validate(lora)) == expected


@pytest.mark.parametrize(
    ("kind", "targets", "said", "hinted"),
    [
        ("clip", ["q_proj", "query"], "'query' matches no linear layer of vision_model or text_model", "out_proj"),
        ("two towers", ["q_lin"], "'q_lin' matches no linear layer", "text_model are called dense, key, query"),
        ("chinese_clip", ["q_proj"], "none of q_proj matches a linear layer of text_model", "query"),
        ("chinese_clip", ["query", "key"], "none of query, key matches a linear layer of vision_model", "q_proj"),
        ("clip", ["proj"], "'proj' matches no linear layer", "q_proj"),
        ("clip", ["attn.q_proj"], "'attn.q_proj' matches no linear layer", "q_proj"),
    ],
)
def test_targets_that_miss_a_tower_are_refused_with_its_leaves(
    kind: str, targets: list[str], said: str, hinted: str, bases: dict[str, Path]
) -> None:
    """Traps 35 and 45."""
    with pytest.raises(UserError, match=said) as caught:
        moved(bases[kind], **BOTH, lora={"targets": targets})
    assert hinted in caught.value.hint


def test_targets_are_last_names_or_more_of_them(bases: dict[str, Path]) -> None:
    encoder = moved(bases["chinese_clip"], **BOTH, lora={"targets": ["q_proj", "self.value", "fc1"]}).encoder
    assert adapted(encoder, "vision_model") == {
        f"{i}.{leaf}" for i in (0, 1) for leaf in ("self_attn.q_proj", "mlp.fc1")
    }
    assert adapted(encoder, "text_model") == {f"{i}.attention.self.value" for i in (0, 1)}
    encoder = moved(bases["clip"], image_tower="frozen", text_tower="lora", lora={"targets": ["fc1"]}).encoder
    assert adapted(encoder, "vision_model") == set()
    assert adapted(encoder, "text_model") == {"0.mlp.fc1", "1.mlp.fc1"}


def test_auto_that_finds_nothing_is_refused_with_the_leaves(base: Path) -> None:
    encoder = checkpoint.open_model(str(base)).encoder
    tower = nn.Sequential()
    tower.mixer = nn.Linear(4, 4)
    tower.config = SimpleNamespace(num_hidden_layers=1)
    encoder.clip.vision_model = tower
    with pytest.raises(UserError, match="auto finds no q, k and v projections in vision_model") as caught:
        adapters.set_moving(encoder, Model.model_validate({"image_tower": "lora"}))
    assert "mixer" in caught.value.hint
    with pytest.raises(UserError, match="last_layers: 1, but vision_model has no layers in a row"):
        adapters.set_moving(encoder, Model.model_validate({"image_tower": "lora", "lora": {"last_layers": 1}}))


@pytest.mark.parametrize("kind", KINDS)
def test_last_layers_are_the_ones_next_to_the_output(kind: str, bases: dict[str, Path]) -> None:
    encoder = moved(bases[kind], **BOTH, lora={"last_layers": 1}).encoder
    for tower in (encoder.family.image_tower, encoder.family.text_tower):
        found = adapted(encoder, tower)
        assert len(found) == 3
        assert {name.partition(".")[0] for name in found} == {str(tiny.LAYERS - 1)}
    with pytest.raises(UserError, match="last_layers: 3, but vision_model has 2 layers") as caught:
        moved(bases[kind], **BOTH, lora={"last_layers": 3})
    assert caught.value.hint == "give at most 2"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["auto", ["out_proj", "o_proj", "dense"]], ids=["auto", "output"])
def test_every_adapter_has_a_gradient(kind: str, targets: Any, bases: dict[str, Path]) -> None:
    """SigLIP's head has an `out_proj` whose weight torch reads without calling it: an adapter there is never used."""
    there = {n.rpartition(".")[2] for n, _ in checkpoint.open_model(str(bases[kind])).encoder.clip.named_modules()}
    targets = targets if targets == "auto" else [target for target in targets if target in there]
    encoder = moved(bases[kind], **BOTH, lora={"targets": targets}).encoder
    embedded(encoder).square().sum().backward()
    unused = ("pooler",) if kind == "chinese_clip" else ()  # it takes the first token as it is
    names = [n for n in encoder.moving() if ".lora_B." in n and not any(part in n for part in unused)]
    assert len(names) >= 2 * tiny.LAYERS
    for name in names:
        gradient = encoder.moving()[name].grad
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name


def test_dropout_and_dora_reach_the_layers(base: Path) -> None:
    opened = moved(base, **BOTH, lora={"dropout": 0.25, "dora": True})
    layers = dict(adapters._lora_layers(opened.encoder.clip))
    assert {layer.lora_dropout["default"].p for layer in layers.values()} == {0.25}
    magnitudes = [name for name in opened.encoder.moving() if "magnitude" in name]
    assert len(magnitudes) == len(layers) == 2 * tiny.LAYERS * 3


def test_adapters_are_float32_on_a_half_precision_base(base: Path) -> None:
    """Trap 13."""
    encoder = checkpoint.open_model(str(base)).encoder.to(torch.float16)
    adapters.set_moving(encoder, Model.model_validate(BOTH))
    assert {p.dtype for name, p in encoder.moving().items() if ".lora_" in name} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", [*VARIANTS, "full"])
def test_frozen_is_byte_identical_after_steps_of_adamw_and_adapters_moved(
    kind: str, variant: str, bases: dict[str, Path]
) -> None:
    """Trap 33: neither decay nor a buffer moves what is frozen."""
    text = {"text_tower": "lora", "lora": VARIANTS[variant]} if variant in VARIANTS else {}
    encoder = moved(bases[kind], image_tower="frozen", **text).encoder
    clip, moving = encoder.clip, encoder.moving()
    before = {name: tensor.clone() for name, tensor in (*clip.named_parameters(), *clip.named_buffers())}
    train_a_little(encoder)
    after = dict((*clip.named_parameters(), *clip.named_buffers()))
    assert after.keys() == before.keys()
    assert len(before.keys() - moving.keys()) > 30
    for name in before.keys() - moving.keys():
        assert torch.equal(after[name], before[name]), name
    for name in moving:
        if "k_proj.bias" in name or "key.bias" in name or "pooler" in name:
            continue  # no gradient: softmax does not see the one, Chinese-CLIP does not use the other
        assert not torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_are_pefts_own_and_the_training_weights_stay(base: Path, variant: str) -> None:
    opened = checkpoint.open_model(str(base))
    adapter = adapters.set_moving(opened.encoder, Model.model_validate({**BOTH, "lora": VARIANTS[variant]}))
    assert adapter is not None
    train_a_little(opened.encoder)
    before = copy.deepcopy(opened.encoder.clip.state_dict())
    merged = adapters.merged_state(opened.encoder.clip)
    for name, tensor in opened.encoder.clip.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    expected = copy.deepcopy(adapter).merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(merged[name], tensor, atol=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("variant", "image"), [*((name, "lora") for name in VARIANTS), ("dora", "full")])
def test_every_family_is_saved_and_loaded_alike(
    kind: str, variant: str, image: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """With a full tower whole merged weights, else an adapter beside its base."""
    wanted = Model.model_validate({"image_tower": image, "text_tower": "lora", "lora": VARIANTS[variant]})
    opened = checkpoint.open_model(str(bases[kind]))
    adapter = adapters.set_moving(opened.encoder, wanted)
    with torch.no_grad():
        start = embedded(opened.encoder.eval())
    train_a_little(opened.encoder)
    with torch.no_grad():
        expected = embedded(opened.encoder)
        checkpoint.save_model(tmp_path / "model", opened, adapter, wanted)
        loaded = checkpoint.open_model(str(tmp_path / "model")).encoder.eval()
        assert (tmp_path / "model" / "adapter_config.json").is_file() == (image == "lora")
        assert torch.allclose(embedded(loaded), expected, atol=1e-5)
        assert not torch.allclose(start, expected, atol=1e-3)
        assert torch.equal(loaded.logit_scale, opened.encoder.logit_scale)
        if loaded.logit_bias is not None and opened.encoder.logit_bias is not None:
            assert torch.equal(loaded.logit_bias, opened.encoder.logit_bias)
