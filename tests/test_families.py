"""Every family reads captions and pictures as transformers reads them, and what it does not support is refused."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    CamembertConfig,
    CLIPModel,
    Dinov2Config,
    MPNetConfig,
    RobertaConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from cytoclip import captions, checkpoint, config, families, model
from cytoclip.checkpoint import Opened
from cytoclip.errors import UserError
from cytoclip.pixels import prepare
from tests import tiny

CAPTIONS = tiny.CAPTIONS
KINDS = ("clip", *tiny.MADE)


def opened(bases: dict[str, Path], kind: str) -> Opened:
    found = checkpoint.open_model(str(bases[kind]))
    found.encoder.eval()
    return found


def tokens_of(found: Opened, some: list[str] | None = None) -> captions.Tokens:
    return captions.tokenise(found.tokenizer, some or CAPTIONS, found.context, found.encoder.family)


def pixels_of(count: int = 4) -> torch.Tensor:
    generator = np.random.default_rng(0)
    return torch.from_numpy(generator.integers(0, 256, (count, 3, tiny.SIDE, tiny.SIDE), dtype=np.uint8))


def test_there_are_five_families_and_checkpoints_of_four() -> None:
    """The fifth, two towers from open_clip, is made by from_open_clip and tried there."""
    assert len(families.FAMILIES) == 5
    assert len(KINDS) == 5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_those_of_transformers_with_its_own_tokenizer_and_processor(
    kind: str, bases: dict[str, Path]
) -> None:
    """Traps 14, 15, 16, 18, 36: padding, pooling, truncation and canonicalisation."""
    found = opened(bases, kind)
    fixed = found.encoder.family.pads == "context"
    lowered = [caption.lower() if found.encoder.family.lower else caption for caption in CAPTIONS]
    theirs = found.tokenizer(
        lowered, padding="max_length" if fixed else True, truncation=True, max_length=found.context, return_tensors="pt"
    )
    expected = found.encoder.clip.get_text_features(
        **{key: value for key, value in theirs.items() if not fixed or key == "input_ids"}
    ).pooler_output
    mine = found.encoder.texts(tokens_of(found).batch(range(4)))
    assert torch.allclose(mine, functional.normalize(expected, dim=1), atol=1e-6)
    assert not torch.allclose(mine[0], mine[3], atol=1e-3)

    picture = Image.fromarray(pixels_of()[0].permute(1, 2, 0).numpy()).resize((50, 41))
    values = found.image_processor(images=picture, return_tensors="pt")["pixel_values"]
    expected = found.encoder.clip.get_image_features(pixel_values=values).pooler_output
    mine = found.encoder.images(torch.from_numpy(prepare(picture, found.pixels))[None])
    assert torch.allclose(mine, functional.normalize(expected, dim=1), atol=1e-6)
    assert mine.shape == (1, found.encoder.width)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_caption_is_embedded_the_same_beside_any_other(kind: str, bases: dict[str, Path]) -> None:
    found = opened(bases, kind)
    tokens = tokens_of(found)
    together = found.encoder.texts(tokens.batch(range(4)))
    alone = torch.cat([found.encoder.texts(tokens.batch([i])) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-6)
    widths = {tokens.batch([i]).shape[1] for i in range(4)}
    assert widths == ({found.context} if found.encoder.family.pads == "context" else set(tokens.lengths().tolist()))
    assert len(widths) == (1 if found.encoder.family.pads == "context" else 4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_last_word_of_a_caption_counts(kind: str, bases: dict[str, Path]) -> None:
    """Trap 39: a feature that is pooled before the caption ends passes parity and is worth nothing."""
    found = opened(bases, kind)
    one, two = found.encoder.texts(tokens_of(found, ["a round cell", "a round nucleus"]).batch([0, 1]))
    assert not torch.allclose(one, two, atol=1e-3)


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_siglip_s_captions_are_canonicalised(kind: str, bases: dict[str, Path]) -> None:
    """Trap 18. Both were trained on lower-cased text; SigLIP's own tokenizer takes punctuation out as well."""
    found = opened(bases, kind)
    same = ["two cells on it", "Two Cells on it"] + (["Two cells, on it!"] if kind == "siglip" else [])
    rows = tokens_of(found, same).batch(range(len(same)))
    assert all(torch.equal(row, rows[0]) for row in rows)
    assert found.encoder.logit_bias is not None
    assert found.encoder.family.objective == "sigmoid"


def test_the_scale_of_siglip_is_not_crushed(bases: dict[str, Path]) -> None:
    """Trap 34."""
    encoder = opened(bases, "siglip").encoder
    encoder.clamp_scale()
    assert float(encoder.logit_scale.detach()) == pytest.approx(4.77)


def test_padding_in_a_caption_is_refused_where_it_is_masked(bases: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"with padding in it: .*a \[PAD\] cell"):
        tokens_of(opened(bases, "chinese_clip"), ["a cell", "a [PAD] cell"])


@pytest.mark.parametrize("kind", KINDS)
def test_stored_features_stand_in_for_their_tower(kind: str, bases: dict[str, Path]) -> None:
    found = opened(bases, kind)
    pixels, tokens = pixels_of(), tokens_of(found).batch(range(4))
    with torch.no_grad():
        stored = found.encoder.image_features(pixels), found.encoder.text_features(tokens)
        for one, two in zip(found.encoder(*stored), found.encoder(pixels, tokens), strict=True):
            assert torch.equal(one, two)
    assert {features.ndim for features in stored} == {2}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_dropped_patches_are_as_if_they_were_not_there(kind: str, bases: dict[str, Path]) -> None:
    """Each row against a tower whose embeddings were cut by hand; all patches kept is no dropout."""
    encoder = opened(bases, kind).encoder
    pixels, keep = pixels_of(), torch.tensor([[0, 3], [1, 2], [0, 1], [2, 3]])
    assert encoder.patches == 4
    whole = encoder.images(pixels)
    assert torch.equal(encoder.images(pixels, torch.arange(4).expand(4, 4)), whole)
    dropped = encoder.images(pixels, keep)
    assert not torch.allclose(dropped, whole, atol=1e-3)
    assert torch.equal(encoder.images(pixels), whole), "nothing is left behind"
    before = 0 if kind.startswith("siglip") else 1  # the class token
    for row in range(4):
        kept = [*range(before), *(before + patch for patch in keep[row].tolist())]
        by_hand = copy.deepcopy(encoder)
        by_hand.image_tower.embeddings.register_forward_hook(lambda _, __, out, kept=kept: out[:, kept])
        assert torch.allclose(by_hand.images(pixels[row : row + 1])[0], dropped[row], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients_are_the_same(kind: str, bases: dict[str, Path]) -> None:
    found = opened(bases, kind)
    inputs = pixels_of(), tokens_of(found).batch(range(4))
    gradients = []
    for checkpointed in (False, True):
        encoder = opened(bases, kind).encoder
        if checkpointed:
            model.checkpoint_gradients(encoder)
        encoder.train()
        torch.manual_seed(1)
        runs = 0

        def count(*_: Any) -> None:
            nonlocal runs
            runs += 1

        first = next(m for m in model.layers(encoder.image_tower)[0].modules() if isinstance(m, nn.Linear))
        first.register_forward_hook(count)
        (encoder(*inputs)[0] * torch.arange(encoder.width)).sum().backward()
        assert runs == (2 if checkpointed else 1)
        gradients.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 20
    assert all(torch.allclose(gradients[1][n], g, atol=1e-6) for n, g in gradients[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_those_of_the_tower(kind: str, bases: dict[str, Path]) -> None:
    encoder = opened(bases, kind).encoder
    for tower in (encoder.image_tower, encoder.text_tower):
        assert len(model.layers(tower)) == tiny.LAYERS
        assert sum(p.numel() for p in model.layers(tower).parameters()) > 0


def test_a_frozen_tower_has_no_dropout_and_batch_norm_learns_no_statistics(bases: dict[str, Path]) -> None:
    """Trap 41, and a frozen BERT, which has dropout by default."""
    encoder = opened(bases, "two towers").encoder
    dropouts = [module for module in encoder.text_tower.modules() if isinstance(module, nn.Dropout)]
    assert dropouts
    encoder.train()
    assert all(module.training for module in dropouts)
    encoder.text_tower.requires_grad_(False)
    encoder.image_tower.layernorm = nn.Sequential(encoder.image_tower.layernorm)
    encoder.image_tower.norm = nn.BatchNorm1d(3)
    encoder.train()
    assert not any(module.training for module in dropouts)
    assert encoder.image_tower.training
    assert not encoder.image_tower.norm.training
    assert encoder.frozen_statistics() == 1


# model.context_length


def test_a_stretched_context_keeps_twenty_positions_and_interpolates_the_rest(base: Path) -> None:
    short, long = checkpoint.open_model(str(base)), checkpoint.open_model(str(base), 248)
    old, new = (one.encoder.clip.text_model.embeddings.position_embedding.weight.detach() for one in (short, long))
    assert (len(old), len(new)) == (77, 248)
    for position in range(248):
        at = position if position < 20 else 20 + (position - 20) / 4
        below = min(int(at), 75)  # the last three stand on the line through the last two
        expected = old[below] + (at - below) * (old[below + 1] - old[below])
        assert torch.allclose(new[position], expected, atol=1e-5), position
    some = ["a round cell", "two cells"]
    with torch.no_grad():
        one, two = (found.encoder.eval().texts(tokens_of(found, some).batch([0, 1])) for found in (short, long))
    assert torch.allclose(one, two, atol=1e-6), "captions of up to 20 tokens say what they said"


def test_a_stretched_checkpoint_opens_with_plain_transformers(base: Path, tmp_path: Path) -> None:
    found = checkpoint.open_model(str(base), 248)
    wanted = config.Model(image_tower="lora", text_tower="lora", lora=config.Lora())
    assert not checkpoint.is_adapter_only(wanted, found), "an adapter beside the base would lose the stretch"
    checkpoint.save_model(tmp_path / "m", found, None, config.Model())
    caption = " ".join(["cell"] * 300)
    tokenizer, plain = AutoTokenizer.from_pretrained(tmp_path / "m"), CLIPModel.from_pretrained(tmp_path / "m")
    ids = tokenizer([caption], truncation=True, return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 248)
    with torch.no_grad():
        theirs = functional.normalize(plain.eval().get_text_features(input_ids=ids).pooler_output, dim=1)
        mine = found.encoder.eval().texts(tokens_of(found, [caption]).batch([0]))
    assert torch.allclose(mine, theirs, atol=1e-6)
    assert tokens_of(found, [caption]).truncated == 1
    assert checkpoint.open_model(str(tmp_path / "m"), 248).context == 248


def test_a_shorter_context_is_refused(base: Path) -> None:
    with pytest.raises(UserError, match="50 is less than the 77 tokens"):
        checkpoint.open_model(str(base), 50)
    assert not checkpoint.open_model(str(base), 77).stretched
    assert checkpoint.open_model(str(base), 78).stretched


def test_too_few_positions_cannot_be_stretched(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "short")
    short = CLIPModel.from_pretrained(base)
    table = short.text_model.embeddings.position_embedding
    table.weight = nn.Parameter(table.weight[:21].clone())
    short.config.text_config.max_position_embeddings = 21
    short.save_pretrained(folder)
    with pytest.raises(UserError, match="reads 21 tokens, and the first 20 positions are kept"):
        checkpoint.open_model(str(folder), 77)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (RobertaConfig(pad_token_id=1), 38),
        (CamembertConfig(pad_token_id=1), 38),
        (MPNetConfig(pad_token_id=1), 38),
        (BertConfig(), 40),
    ],
    ids=lambda one: getattr(one, "model_type", str(one)),
)
def test_towers_that_count_from_behind_their_padding_read_fewer_tokens(settings: Any, expected: int) -> None:
    for name, value in {**tiny._SIZES, "vocab_size": 30, "max_position_embeddings": 40}.items():
        setattr(settings, name, value)
    tower = AutoModel.from_config(settings).eval()
    vision = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    both = VisionTextDualEncoderConfig.from_vision_text_configs(vision, settings)
    two = VisionTextDualEncoderModel(both, AutoModel.from_config(vision), tower)
    context = model.Checkpoint(two, SimpleNamespace(model_max_length=10**30), None).context
    assert context == expected
    tower(input_ids=torch.full((1, context), 7))
    with pytest.raises((IndexError, RuntimeError)):
        tower(input_ids=torch.full((1, context + 1), 7))


# what is refused


@pytest.mark.parametrize(
    ("kind", "sections", "said"),
    [
        ("siglip", {"model": {"context_length": 248}}, "always filled up"),
        ("chinese_clip", {"model": {"context_length": 248}}, "hundreds of tokens"),
        ("vision-text-dual-encoder", {"model": {"context_length": 248}}, "that model's own"),
        ("siglip", {"model": {"projections": "frozen"}}, "no projections apart"),
        ("siglip", {"model": {"image_tower": "frozen", "text_tower": "frozen"}}, "only the logit scale"),
        ("vision-text-dual-encoder", {"train": {"patch_dropout": 0.5}}, "'swin' image tower needs all its patches"),
        (
            "clip",
            {"model": {"image_tower": "frozen", "text_tower": "frozen"}, "train": {"gradient_checkpointing": True}},
            "both are frozen",
        ),
    ],
)
def test_what_has_no_effect_is_refused_with_the_reason(kind: str, sections: dict[str, Any], said: str) -> None:
    wanted = config.parse({"data": {"root": "x"}, "output": "x", **sections}, "the test")
    with pytest.raises(UserError, match=said):
        families.refuse_unsupported(families.FAMILIES[kind], "swin", wanted.model, wanted.train)


@pytest.mark.parametrize(("kind", "tower"), list(itertools.product(families.FAMILIES, ("full", "lora", "frozen"))))
def test_what_is_supported_is_not_refused(kind: str, tower: str) -> None:
    wanted = config.parse({"data": {"root": "x"}, "output": "x", "model": {"text_tower": tower}}, "the test")
    families.refuse_unsupported(families.FAMILIES[kind], "swin", wanted.model, wanted.train)


def test_patch_dropout_is_for_towers_that_move() -> None:
    sections = {"model": {"image_tower": "frozen"}, "train": {"patch_dropout": 0.5}}
    wanted = config.parse({"data": {"root": "x"}, "output": "x", **sections}, "the test")
    with pytest.raises(UserError, match="image_tower is frozen"):
        families.refuse_unsupported(families.FAMILIES["clip"], "clip_vision_model", wanted.model, wanted.train)


def test_naflex_is_refused_by_name(tmp_path: Path) -> None:
    AutoConfig.for_model("siglip2").save_pretrained(tmp_path)
    with pytest.raises(UserError) as refused:
        checkpoint.open_model(str(tmp_path))
    assert "NaFlex" in refused.value.hint


def test_siglip_without_its_head_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(bases["siglip"], tmp_path / "headless")
    settings = json.loads((folder / "config.json").read_text())
    settings["vision_config"]["vision_use_head"] = False
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"one blank picture .* do not pass"):
        checkpoint.open_model(str(folder))


def test_the_complete_configuration_of_a_siglip_run_is_not_refused(bases: dict[str, Path]) -> None:
    """A run writes every option down, and training from that file repeats it."""
    written = config.dump(config.parse({"data": {"root": "x"}, "output": "x"}, "the test"))
    wanted = config.parse(yaml.safe_load(written), "the test")
    assert "projections" in wanted.model.model_fields_set
    families.refuse_unsupported(families.FAMILIES["siglip"], "siglip_vision_model", wanted.model, wanted.train)
    assert "projections" not in opened(bases, "siglip").encoder.sizes()


def test_towers_that_give_no_vector_are_refused(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.DualEncoder, "text_features", lambda *_: (_ for _ in ()).throw(ValueError("no pooler")))
    with pytest.raises(UserError, match="do not pass: no pooler"):
        checkpoint.open_model(str(bases["two towers"]))


def test_a_text_towers_batch_norm_learns_nothing_either(bases: dict[str, Path]) -> None:
    """Trap 41."""
    encoder = opened(bases, "two towers").encoder
    encoder.text_tower.norm = nn.BatchNorm1d(3)
    encoder.train()
    assert not encoder.text_tower.norm.training
    assert encoder.frozen_statistics() == 1


def test_padding_is_masked_by_the_tokenizers_id(bases: dict[str, Path], tmp_path: Path) -> None:
    """Trap 16: RoBERTa pads with 1; nothing says that padding is 0."""
    folder = shutil.copytree(bases["two towers"], tmp_path / "padded")
    words = list(AutoTokenizer.from_pretrained(folder).get_vocab())
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / file).unlink(missing_ok=True)
    others = [word for word in words if word not in ("[UNK]", "[PAD]")]
    (folder / "vocab.txt").write_text("\n".join(["[UNK]", "[PAD]", *others]) + "\n")
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=40).save_pretrained(folder)
    found = checkpoint.open_model(str(folder))
    assert found.tokenizer.pad_token_id == found.encoder.pad == 1
    tokens = captions.tokenise(found.tokenizer, CAPTIONS, found.context, found.encoder.family)
    with torch.no_grad():
        together = found.encoder.eval().texts(tokens.batch(range(4)))
        alone = torch.cat([found.encoder.texts(tokens.batch([i])) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("rate", ["attention_probs_dropout_prob", "drop_path_rate", "hidden_dropout_prob"])
def test_every_kind_of_dropout_is_seen(rate: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Traps 5 and 26: under dropout other chunks are another run, which nobody may be led into."""
    folder = shutil.copytree(bases["two towers"], tmp_path / "drops")
    settings = json.loads((folder / "config.json").read_text())
    nothing = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings["vision_config"] |= {**nothing, "drop_path_rate": 0.0}
    settings["text_config"] |= nothing
    pixels = torch.randint(0, 256, (4, 3, tiny.SIDE, tiny.SIDE), dtype=torch.uint8)
    for value in (0.0, 0.5):
        settings["vision_config"][rate] = value
        (folder / "config.json").write_text(json.dumps(settings))
        encoder = checkpoint.open_model(str(folder)).encoder.train()
        assert encoder.drops_out() is (value > 0)
        assert torch.equal(encoder.images(pixels), encoder.images(pixels)) is (value == 0)
