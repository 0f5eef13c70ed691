"""The last layer for one token against the whole layer: features, every gradient in float64, and where it is used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel, ViTConfig
from transformers.models.dinov2.modeling_dinov2 import Dinov2DropPath

from cytoclip import adapters, checkpoint, last_layer, model, training
from cytoclip.config import Config, Model
from cytoclip.console import Console
from cytoclip.model import DualEncoder
from tests import tiny

PAIRS, TOKENS = 5, 9
END = 40
# Each family's towers whose last layer is for one token.
SHORTENED = {"clip": 2, "siglip": 1, "siglip2": 1, "chinese_clip": 1, "two towers": 1}


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (PAIRS, 3, tiny.SIDE, tiny.SIDE), dtype=torch.uint8)


def opened(folder: Path) -> DualEncoder:
    torch.manual_seed(0)
    encoder = checkpoint.open_model(str(folder)).encoder.double().train()
    for parameter in encoder.parameters():  # biases and layer scales too, none of which is 0 or 1 then
        parameter.requires_grad_().data += torch.randn_like(parameter) * 0.05
    return encoder


def words(encoder: DualEncoder) -> torch.Tensor:
    """Captions that end at different places, and padding behind them."""
    text = encoder.clip.config.text_config
    tokens = torch.randint(3, 30, (PAIRS, TOKENS))
    if encoder.family.pools != "end":
        tokens[1, 4:] = encoder.pad
        return tokens
    for row, end in enumerate((8, 3, 1, 5, 2)):
        tokens[row, end:] = encoder.pad
        tokens[row, end] = text.eos_token_id if text.eos_token_id != 2 else text.vocab_size - 1
    return tokens


def computed(encoder: DualEncoder, pixels: torch.Tensor, tokens: torch.Tensor, **more: Any) -> dict[str, torch.Tensor]:
    """Both features and the gradient of each weight."""
    encoder.zero_grad()
    torch.manual_seed(1)
    images, texts = encoder(pixels, tokens, **more)
    weights = torch.linspace(-1, 1, images.numel(), dtype=torch.float64).view(images.shape)
    (images * weights).sum().backward()
    (texts * weights.flip(0)).sum().backward()
    found = {"images": images.detach(), "texts": texts.detach()}
    return found | {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def shortened(encoder: DualEncoder) -> int:
    return sum("forward" in vars(layer) for tower in towers(encoder) for layer in model.layers(tower))


def towers(encoder: DualEncoder) -> tuple[nn.Module, nn.Module]:
    return encoder.image_tower, encoder.text_tower


def assert_same(encoder: DualEncoder, count: int, pixels: torch.Tensor, **more: Any) -> None:
    tokens, leaner = words(encoder), copy.deepcopy(encoder)
    last_layer.shorten(leaner.clip)
    assert shortened(leaner) == count
    expected, found = computed(encoder, pixels, tokens, **more), computed(leaner, pixels, tokens, **more)
    assert found.keys() == expected.keys()
    assert len(found) > 25
    for name, one in expected.items():
        assert torch.allclose(found[name], one, rtol=1e-10, atol=1e-12), name
    names = list(leaner.state_dict())
    assert names == list(encoder.state_dict())
    with torch.no_grad():
        for one, other in zip(leaner.eval()(pixels, tokens), encoder.eval()(pixels, tokens), strict=True):
            assert torch.equal(one, other), "what does not train is transformers' to the last bit"


def test_every_family_has_a_case(bases: dict[str, Path]) -> None:
    assert bases.keys() == SHORTENED.keys()


@pytest.mark.parametrize("kind", SHORTENED)
def test_features_and_gradients_are_those_of_the_whole_layer(
    kind: str, bases: dict[str, Path], pixels: torch.Tensor
) -> None:
    assert_same(opened(bases[kind]), SHORTENED[kind], pixels)


@pytest.mark.parametrize("end", [2, END])
def test_a_caption_ends_where_transformers_finds_its_end(end: int, base: Path, pixels: torch.Tensor) -> None:
    """At the highest id where the configuration says 2, as OpenAI's files do, else at the first end token."""
    encoder = opened(base)
    encoder.clip.config.text_config.eos_token_id = encoder.text_tower.eos_token_id = end
    assert_same(encoder, 2, pixels)


def test_a_vit_too(pixels: torch.Tensor) -> None:
    """BiomedCLIP's image tower."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = ViTConfig(**sizes, image_size=tiny.SIDE, patch_size=tiny.PATCH, qkv_bias=False)
    text = BertConfig(**sizes, vocab_size=60, max_position_embeddings=40)
    joined = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16)
    encoder = DualEncoder(VisionTextDualEncoderModel(joined), lambda given: given / 255).double().train()
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in model.layers(encoder.text_tower):
        layer.attention.self.dropout.p = 0.0
    assert_same(encoder, 1, pixels)


@pytest.mark.parametrize("lora", [{}, {"dora": True}, {"rslora": True}])
def test_with_adapters(lora: dict[str, Any], base: Path, pixels: torch.Tensor) -> None:
    encoder = checkpoint.open_model(str(base)).encoder
    both = {"image_tower": "lora", "text_tower": "lora", "projections": "full"}
    adapters.set_moving(encoder, Model.model_validate({**both, "lora": lora}))
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    assert_same(encoder.double().train(), 2, pixels)


@pytest.mark.parametrize("kind", ["clip", "two towers"])
def test_with_patches_left_out(kind: str, bases: dict[str, Path], pixels: torch.Tensor) -> None:
    encoder = opened(bases[kind])
    kept = torch.stack([torch.randperm(encoder.patches)[:2] for _ in range(PAIRS)])
    assert_same(encoder, SHORTENED[kind], pixels, keep_BK=kept)


def test_with_layers_computed_again(base: Path, pixels: torch.Tensor) -> None:
    encoder = opened(base)
    model.checkpoint_gradients(encoder)
    assert_same(encoder, 2, pixels)


def test_sharded(base: Path, pixels: torch.Tensor) -> None:
    """FSDP gives a layer another class, of another name."""
    encoder = opened(base)
    last_layer.shorten(encoder.clip)
    tokens = words(encoder)
    expected = computed(encoder, pixels, tokens)
    for tower in towers(encoder):
        last = model.layers(tower)[-1]
        last.__class__ = type("FSDP" + type(last).__name__, (type(last),), {})
    found = computed(encoder, pixels, tokens)
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def test_dropout_is_drawn_for_the_one_token_too(base: Path, pixels: torch.Tensor) -> None:
    encoder = opened(base)
    last_layer.shorten(encoder.clip)
    plain = encoder.images(pixels)
    model.layers(encoder.image_tower)[-1].self_attn.dropout = 0.5
    one, other = encoder.images(pixels), encoder.images(pixels)
    assert not torch.equal(one, plain)
    assert not torch.equal(one, other)


def test_a_mask_has_the_whole_layer(bases: dict[str, Path]) -> None:
    encoder = opened(bases["siglip"])
    layer = model.layers(encoder.text_tower)[-1]
    hidden = torch.randn(2, TOKENS, tiny.WIDTH, dtype=torch.float64)
    mask = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    expected = layer(hidden, mask)
    last_layer.shorten(encoder.clip)
    assert torch.equal(layer(hidden, mask), expected)


def test_layers_of_other_parts_stay(base: Path) -> None:
    encoder = opened(base)
    del model.layers(encoder.image_tower)[-1].self_attn.q_proj
    last_layer.shorten(encoder.clip)
    assert shortened(encoder) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_has_it_unless_it_is_compiled(
    compiled: bool, experiment: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    whole = last_layer._for_one
    monkeypatch.setattr(last_layer, "_for_one", lambda *given: seen.append(given) or whole(*given))
    monkeypatch.setattr(model, "compile_towers", lambda _: None)
    training.fit(experiment(train={"compile": compiled}), Console(quiet=True))
    assert len(seen) == (0 if compiled else 2 * 4), "two towers, four steps of one chunk; and no validation"


def test_dropout_of_attention_and_of_paths_falls_on_the_one_token(bases: dict[str, Path], pixels: torch.Tensor) -> None:
    """Trap 5."""
    encoder = checkpoint.open_model(str(bases["two towers"])).encoder.train()
    last_layer.shorten(encoder.clip)
    last: Any = model.layers(encoder.image_tower)[-1]
    assert torch.equal(encoder.images(pixels), encoder.images(pixels))
    last.attention.attention_dropout = 0.5
    assert not torch.equal(encoder.images(pixels), encoder.images(pixels))
    last.attention.attention_dropout = 0.0
    last.drop_path = Dinov2DropPath(0.5).train()
    assert not torch.equal(encoder.images(pixels), encoder.images(pixels))
