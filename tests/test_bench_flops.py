"""What `bench/mfu.py` counts as a model's floating-point operations: torch's count against one by hand."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from cytoclip import attention, last_layer, lean, loss
from cytoclip.device import World
from cytoclip.model import DualEncoder
from cytoclip.pairs import Identity

BENCH = Path(__file__).parents[1] / "bench"
PAIRS, TOKENS = 6, 9


@pytest.fixture(scope="module")
def flops() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_flops", BENCH / "flops.py")
    assert spec
    assert spec.loader
    found = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def encoder() -> DualEncoder:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 80, **sizes}
    text = {"hidden_size": 24, "intermediate_size": 48, "vocab_size": 50, "eos_token_id": 49, **sizes}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=20))
    return DualEncoder(clip, lambda pixels: pixels.float() / 255).train()


@pytest.fixture
def given() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 48, (PAIRS, TOKENS))
    tokens[:, -1] = 49
    return torch.randint(0, 256, (PAIRS, 3, 32, 32), dtype=torch.uint8), tokens


def test_torchs_count_is_the_one_by_hand(
    flops: ModuleType, encoder: DualEncoder, given: tuple[torch.Tensor, torch.Tensor]
) -> None:
    expected = flops.by_hand(encoder.clip.config, PAIRS, TOKENS)
    assert flops.of_model(encoder, *given) == expected
    lean.lighten(encoder.clip)
    attention.quicken(encoder.clip)
    assert flops.of_model(encoder, *given) == expected, "however it is computed"
    last_layer.shorten(encoder.clip)
    shortened = flops.by_hand(encoder.clip.config, PAIRS, TOKENS, shortened=True)
    assert flops.of_model(encoder, *given) == shortened < 0.75 * expected, "two layers a tower"
    assert encoder.clip.config._attn_implementation == attention.NAME, "and left as it was"
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_what_is_computed_again_is_executed_and_not_counted(
    flops: ModuleType, encoder: DualEncoder, given: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """A step in chunks embeds all but one twice, a third more at most, and scores are computed twice."""
    encoder.clip.set_attn_implementation("eager")
    each = torch.arange(PAIRS)
    identity = Identity(each, each, -torch.ones_like(each))

    def executed(chunk: int) -> float:
        chunks = list(zip(*(side.split(chunk) for side in given), strict=True))
        logits = loss.Logits(encoder.logit_scale)
        found: float = flops.counted(
            lambda: loss.contrastive_step(encoder, logits, chunks, identity, World(torch.device("cpu")))
        )
        return found

    model, scores = flops.of_model(encoder, *given), 2 * PAIRS * PAIRS * 20
    forward = flops.counted(lambda: encoder(*given))
    assert executed(PAIRS) == model + scores, "scores once more, and the two gradients"
    assert executed(2) == model + scores + forward * (PAIRS - 2) / PAIRS


def test_attention_in_one_kernel_is_counted_as_its_products(
    flops: ModuleType, encoder: DualEncoder, given: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """A CPU's, of which torch's counter knows nothing. Scores are computed again on the way back: no product."""
    found, alone = {}, {}
    pixels, tokens = given
    sides = {"image": lambda: encoder.images(pixels).sum(), "text": lambda: encoder.texts(tokens).sum()}
    for key in itertools.product(("eager", "sdpa"), sides):
        encoder.clip.set_attn_implementation(key[0])
        with flops.Products() as noted:
            found[key] = flops.counted(lambda forward=sides[key[1]]: forward().backward())
        made = flops.alone(noted.found, torch.device("cpu"))
        alone[key] = sum(flops.counted(product) * times for product, times in made)
    again = 2 * 2 * PAIRS * 17 * 17 * 32  # two layers; 16 patches and the class token, 32 wide
    assert found["sdpa", "image"] == found["eager", "image"] + again
    assert alone["sdpa", "image"] == alone["eager", "image"] < found["eager", "image"], "patches are a convolution"
    again = 2 * 2 * PAIRS * TOKENS * TOKENS * 24
    assert found["sdpa", "text"] == found["eager", "text"] + again
    assert alone["sdpa", "text"] == alone["eager", "text"] == found["eager", "text"]


def test_products_are_noted_and_run_alone(flops: ModuleType) -> None:
    a, b = torch.randn(3, 4, dtype=torch.bfloat16), torch.randn(5, 4, dtype=torch.bfloat16)
    with flops.Products() as noted:
        a @ b.T
        a @ b.T
        torch.addmm(torch.zeros(5, dtype=torch.bfloat16), a, b.T)
        torch.bmm(a[None], b.T[None])
    assert sorted(noted.found.values()) == [1, 3]
    made = flops.alone(noted.found, torch.device("cpu"))
    assert sorted((tuple(product().shape), times) for product, times in made) == [((1, 3, 5), 1), ((3, 5), 3)]
