"""What is done to whole towers changes what it says and nothing else."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, CLIPModel

from cytoclip import adapters, captions, checkpoint, towers
from cytoclip.config import Config, Model
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError
from cytoclip.model import DualEncoder
from cytoclip.train import dry_run
from tests.families import NAMES

Tiny = Callable[[str], Path]
SHORT = ["a superficial squamous cell in a clean background", "cell"]
LONG = "a cell with a round nucleus and dense cytoplasm " * 30


def batch(opened: checkpoint.Opened, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, 3, *opened.pixels.size), dtype=torch.uint8, generator=generator)
    some = [*SHORT, "the nucleus is round", "two cells"][:count]
    return pixels, captions.tokenise(opened.tokenizer, some, opened.context, opened.encoder.family).batch(range(count))


def gradients(
    encoder: DualEncoder, pixels: torch.Tensor, tokens: torch.Tensor, keep: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    encoder.zero_grad()
    torch.manual_seed(5)  # dropout
    image, text = encoder(pixels, tokens, keep)
    (image @ text.T).square().sum().backward()
    return {n: p.grad.clone() for n, p in encoder.moving().items() if p.grad is not None}


def with_dropout(encoder: DualEncoder) -> None:
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.3)


# ---- gradient checkpointing


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_runs_every_layer_twice_and_changes_no_gradient(tiny: Tiny, name: str) -> None:
    opened = checkpoint.open_model(str(tiny(name)))
    encoder = opened.encoder.train()
    with_dropout(encoder)
    expected = gradients(encoder, *batch(opened))
    towers.checkpoint_gradients(encoder)
    runs: list[str] = []
    for tower in (encoder.image_tower, encoder.text_tower):
        for layer in encoder.layers(tower):
            first = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
            first.register_forward_pre_hook(lambda *_: runs.append("linear"))
    found = gradients(encoder, *batch(opened))
    assert len(runs) == 2 * 4
    assert found.keys() == expected.keys()
    assert len(found) > 50
    for key, gradient in expected.items():
        assert torch.allclose(found[key], gradient, atol=1e-7), key


def test_a_tower_that_cannot_be_checkpointed_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = checkpoint.open_model(str(tiny("clip"))).encoder
    monkeypatch.setattr(type(encoder.text_tower), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="gradient_checkpointing is true") as caught:
        towers.checkpoint_gradients(encoder)
    assert caught.value.code is ExitCode.MODEL


def test_gradient_checkpointing_with_lora_gives_the_adapters_their_gradients(tiny: Tiny) -> None:
    opened = checkpoint.open_model(str(tiny("clip")))
    adapters.set_moving(opened.encoder, Model.model_validate({"image_tower": "lora", "text_tower": "lora"}))
    encoder = opened.encoder.train()
    expected = gradients(encoder, *batch(opened))
    towers.checkpoint_gradients(encoder)
    found = gradients(encoder, *batch(opened))
    assert any("lora_" in name for name in found)
    assert all(torch.allclose(found[name], expected[name], atol=1e-7) for name in expected)


# ---- torch.compile


class Noted:
    """A backend of torch.compile that runs what it is given as it is: graphs made, and how often they ran."""

    def __init__(self) -> None:
        torch.compiler.reset()
        self.graphs = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*given: Any) -> Any:
            self.runs += 1
            return graph.forward(*given)

        return run


@pytest.mark.parametrize("name", ["clip", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != "clip")])
def test_compiled_layers_embed_the_same_under_the_same_names(tiny: Tiny, name: str) -> None:
    opened = checkpoint.open_model(str(tiny(name)))
    encoder, backend, names = opened.encoder, Noted(), list(opened.encoder.state_dict())
    pixels, tokens = batch(opened)
    asked = [(pixels, tokens), (pixels[:2], tokens[:2]), (pixels, tokens, torch.tensor([[0, 2], [1, 3], [3, 0]]))]
    with torch.no_grad():
        expected = [encoder(*given) for given in asked]
        towers.compile_towers(encoder, backend=backend)  # type: ignore[arg-type]
        found = [encoder(*given) for given in asked]
    assert backend.runs == 4 * len(asked)  # two layers of each tower
    assert backend.graphs == 2  # which they share
    assert list(encoder.state_dict()) == names
    for one, other in zip(found, expected, strict=True):
        for side, twin in zip(one, other, strict=True):
            assert torch.allclose(side, twin, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_layer_goes_on_uncompiled_in_training_and_evaluation(tiny: Tiny, name: str) -> None:
    """torch gives up after 8 graphs of one function, with a warning; training and evaluation have up to 16."""
    opened = checkpoint.open_model(str(tiny(name)))
    encoder, backend = opened.encoder, Noted()
    towers.checkpoint_gradients(encoder)
    towers.compile_towers(encoder, backend=backend)  # type: ignore[arg-type]
    pixels, tokens = batch(opened)

    def work() -> int:
        before = backend.runs
        for rows in (slice(3), slice(1)):
            encoder.train()
            with torch.no_grad():
                encoder(pixels[rows], tokens[rows])
            gradients(encoder, pixels[rows], tokens[rows])
            encoder.eval()
            with torch.inference_mode():
                encoder(pixels[rows], tokens[rows])
        return backend.runs - before

    assert work() == work() == 2 * 4 * 4  # a layer's forward runs twice for its gradient
    made = backend.graphs
    work()
    assert backend.graphs == made


@pytest.mark.slow
def test_inductor_gives_the_same_gradients(tiny: Tiny) -> None:
    torch.compiler.reset()
    opened = checkpoint.open_model(str(tiny("clip")))
    encoder = opened.encoder.train()
    expected = gradients(encoder, *batch(opened))
    towers.compile_towers(encoder)
    found = gradients(encoder, *batch(opened))
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


# ---- patches left out


def by_hand(encoder: DualEncoder, pixels: torch.Tensor, keep: list[list[int]], prefix: int) -> torch.Tensor:
    """The image tower run on each picture alone, with the tokens of the kept patches picked one by one."""
    embeddings = encoder.image_tower.embeddings
    rows = []
    for picture, kept in zip(pixels, keep, strict=True):
        whole = embeddings(encoder.to_floats(picture[None]))
        assert whole.shape[1] == prefix + encoder.patches
        tokens = [whole[0, i] for i in range(prefix)] + [whole[0, prefix + k] for k in kept]
        hook = embeddings.register_forward_hook(lambda *_, t=tokens: torch.stack(t)[None])
        rows.append(encoder.images(picture[None])[0])
        hook.remove()
    return torch.stack(rows)


@pytest.mark.parametrize("name", NAMES)
def test_the_image_tower_sees_the_patches_that_are_kept_and_no_other(tiny: Tiny, name: str) -> None:
    opened = checkpoint.open_model(str(tiny(name)))
    encoder = opened.encoder.eval()
    pixels, tokens = batch(opened)
    keep = [[2, 0], [1, 3], [3, 1]]
    with torch.no_grad():
        found, text = encoder(pixels, tokens, torch.tensor(keep))
        whole, same_text = encoder(pixels, tokens)
        every = encoder.images(pixels, torch.arange(encoder.patches).expand(3, -1))
        expected = by_hand(encoder, pixels, keep, prefix=0 if name.startswith("siglip") else 1)
        side = opened.pixels.size[0] // int(encoder.patches**0.5)
        unseen, seen = pixels.clone(), pixels.clone()
        unseen[0, :, :side, side : 2 * side] = 255 - unseen[0, :, :side, side : 2 * side]  # patch 1: not kept of row 0
        seen[0, :, :side, :side] = 255 - seen[0, :, :side, :side]  # patch 0: kept
        of_unseen, of_seen = encoder.images(unseen, torch.tensor(keep)), encoder.images(seen, torch.tensor(keep))
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(every, whole, atol=1e-6)
    assert (found - whole).abs().max() > 1e-4
    assert torch.equal(text, same_text)
    assert torch.allclose(of_unseen, found, atol=1e-7)
    assert (of_seen - found).abs().max() > 1e-4


def test_a_copy_of_the_encoder_leaves_out_its_own_patches(tiny: Tiny) -> None:
    opened = checkpoint.open_model(str(tiny("clip")))
    pixels, _ = batch(opened)
    keep = torch.tensor([[0], [1], [2]])
    twin = copy.deepcopy(opened.encoder)
    with torch.no_grad():
        assert torch.equal(twin.images(pixels, keep), opened.encoder.images(pixels, keep))
        assert not torch.allclose(twin.images(pixels), opened.encoder.images(pixels, keep), atol=1e-4)


def test_patches_left_out_work_with_gradient_checkpointing(tiny: Tiny) -> None:
    opened = checkpoint.open_model(str(tiny("clip")))
    encoder = opened.encoder.train()
    pixels, tokens = batch(opened)
    keep = torch.tensor([[0, 1], [2, 3], [1, 2]])
    expected = gradients(encoder, pixels, tokens, keep)
    towers.checkpoint_gradients(encoder)
    found = gradients(encoder, pixels, tokens, keep)
    assert all(torch.allclose(found[name], expected[name], atol=1e-7) for name in expected)


def test_an_image_tower_whose_patches_cannot_go_says_so(tiny: Tiny) -> None:
    encoder = checkpoint.open_model(str(tiny("dinov2-bert"))).encoder
    encoder.image_tower.config.model_type = "swin"
    with pytest.raises(UserError, match="'swin' image tower has no patches"):
        _ = encoder.patches


# ---- a longer context


def test_stretched_positions_are_interpolated_by_hand(base: Path) -> None:
    """Long-CLIP, arXiv 2403.15378: the first 20 stay, between two of the others come three new ones."""
    old = CLIPModel.from_pretrained(base).text_model.embeddings.position_embedding.weight.detach()
    opened = checkpoint.open_model(str(base), 248)
    new = opened.encoder.clip.text_model.embeddings.position_embedding.weight.detach()
    assert new.shape == (248, 32)
    assert torch.equal(new[:20], old[:20])
    for i in range(57):
        for quarter in range(4):
            if i < 56:
                expected = old[20 + i] * (1 - quarter / 4) + old[21 + i] * (quarter / 4)
            else:  # behind the last there is nothing to go towards: on, as from the one before it
                expected = old[76] + (old[76] - old[75]) * (quarter / 4)
            assert torch.allclose(new[20 + 4 * i + quarter], expected, atol=1e-7)


@pytest.mark.parametrize("length", [78, 100, 248, 300])
def test_captions_of_up_to_20_tokens_keep_their_features(base: Path, length: int) -> None:
    before, after = checkpoint.open_model(str(base)), checkpoint.open_model(str(base), length)
    assert (before.context, after.context) == (77, length)
    assert after.stretched
    short = captions.tokenise(before.tokenizer, SHORT, 77, before.encoder.family)
    assert short.lengths().max() <= 20
    tokens = captions.tokenise(after.tokenizer, [*SHORT, LONG], length, after.encoder.family)
    assert tokens.lengths().max() == length
    with torch.no_grad():
        expected = before.encoder.eval().texts(short.batch([0, 1]))
        assert torch.equal(after.encoder.eval().texts(short.batch([0, 1])), expected)
        assert torch.allclose(after.encoder.texts(tokens.batch([0, 1, 2]))[:2], expected, atol=2e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_a_stretched_model_is_saved_whole_and_opened_by_transformers(base: Path, tmp_path: Path, lora: bool) -> None:
    """An adapter on the short base would lose the new positions."""
    opened = checkpoint.open_model(str(base), 248)
    wanted = Model.model_validate({"image_tower": "frozen", "text_tower": "lora" if lora else "full"})
    adapter = adapters.set_moving(opened.encoder, wanted)
    assert not checkpoint.is_adapter_only(wanted, opened)
    with torch.no_grad():
        for parameter in opened.encoder.moving().values():
            parameter.add_(0.02 * torch.randn(parameter.shape))
        checkpoint.save_model(tmp_path / "model", opened, adapter, wanted)
        some = [" ".join(["cell"] * 200), " ".join([*["cell"] * 199, "nucleus"]), LONG]
        tokens = captions.tokenise(opened.tokenizer, some, 248, opened.encoder.family)
        expected = opened.encoder.eval().texts(tokens.batch(range(3)))
        plain = CLIPModel.from_pretrained(tmp_path / "model")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        assert plain.config.text_config.max_position_embeddings == tokenizer.model_max_length == 248
        given = tokenizer(some, padding="max_length", truncation=True, return_tensors="pt")
        assert given["input_ids"].shape == (3, 248)
        found = torch.nn.functional.normalize(plain.eval().get_text_features(**given).pooler_output)
        assert torch.allclose(found, expected, atol=2e-6)
        assert (found[0] - found[1]).abs().max() > 1e-5  # the 200th word is read
    again = checkpoint.open_model(str(tmp_path / "model"))
    assert again.context == 248
    assert not checkpoint.open_model(str(tmp_path / "model"), 248).stretched


def test_only_clip_can_be_stretched_and_only_upward(tiny: Tiny, base: Path) -> None:
    assert not checkpoint.open_model(str(base), 77).stretched
    with pytest.raises(UserError, match="context_length is 60 but the checkpoint reads 77 tokens"):
        checkpoint.open_model(str(base), 60)
    for name, why in (("siglip", "pools at its last"), ("chinese-clip", "BERT-like"), ("vit-roberta", "BERT-like")):
        with pytest.raises(UserError, match=why) as caught:
            checkpoint.open_model(str(tiny(name)), 248)
        assert caught.value.code is ExitCode.MODEL


def test_fewer_positions_than_are_kept_cannot_be_stretched(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "short")
    short = CLIPModel.from_pretrained(base)
    table = short.text_model.embeddings.position_embedding
    table.weight = torch.nn.Parameter(table.weight[:21].clone())
    short.config.text_config.max_position_embeddings = 21
    short.save_pretrained(folder)
    with pytest.raises(UserError, match="longer from 22 on"):
        checkpoint.open_model(str(folder), 77)
    assert not checkpoint.open_model(str(folder), 21).stretched


def test_a_context_length_that_changes_nothing_is_said(
    experiment: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(experiment(model={"context_length": 77}), Console())
    assert "model.context_length 77 is the checkpoint's own: nothing to stretch" in capsys.readouterr().err
    dry_run(experiment(model={"context_length": 100}), Console())
    assert "nothing to stretch" not in capsys.readouterr().err
