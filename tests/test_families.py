"""Every family: features are transformers' own, padding and pooling are the family's, what it cannot do is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, DistilBertConfig, DistilBertModel

from cytoclip import captions, checkpoint, families
from cytoclip.batches import Batch
from cytoclip.config import Model, Train
from cytoclip.errors import ExitCode, UserError
from cytoclip.families import FAMILIES
from tests.families import NAMES

Tiny = Callable[[str], Path]
LONG = "a cell with a round nucleus and dense cytoplasm " * 20
CAPTIONS = [
    "a superficial squamous cell",
    "cell",
    LONG,
    "A Cell, with CLEAR halo!",
    "two  cells",
    "the nucleus is round",
]
BERT = ["chinese-clip", "dinov2-bert", "vit-roberta"]


def embedded(opened: checkpoint.Opened, some: list[str]) -> torch.Tensor:
    tokens = captions.tokenise(opened.tokenizer, some, opened.context, opened.encoder.family)
    with torch.no_grad():
        return opened.encoder.eval().texts(tokens.batch(range(len(some))))


def plain(folder: Path) -> Any:
    kind = FAMILIES[AutoConfig.from_pretrained(folder).model_type].opens
    return getattr(transformers, kind).from_pretrained(folder).eval()


def reference(folder: Path, some: list[str]) -> torch.Tensor:
    """As transformers' own examples do it: its tokenizer, its padding, its mask, its model."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), plain(folder)
    if folder.name == "siglip2":  # its training lowered captions, this tokenizer does not
        some = [caption.lower() for caption in some]
    if folder.name in BERT:
        length = {"vit-roberta": 39}.get(folder.name, 40)
        given = tokenizer(some, padding=True, truncation=True, max_length=length, return_tensors="pt")
    else:
        given = tokenizer(some, padding="max_length", truncation=True, return_tensors="pt")
        if folder.name != "clip":
            given = {"input_ids": given["input_ids"]}
    with torch.no_grad():
        return torch.nn.functional.normalize(model.get_text_features(**given).pooler_output)


def test_every_family_has_a_tiny_checkpoint(tiny: Tiny) -> None:
    assert {AutoConfig.from_pretrained(tiny(name)).model_type for name in NAMES} == set(FAMILIES)
    assert len(NAMES) == 6


@pytest.mark.parametrize("name", NAMES)
def test_text_features_are_transformers_own_for_short_and_truncated_captions(tiny: Tiny, name: str) -> None:
    opened = checkpoint.open_model(str(tiny(name)))
    tokens = captions.tokenise(opened.tokenizer, CAPTIONS, opened.context, opened.encoder.family)
    assert tokens.truncated >= 1
    expected = reference(tiny(name), CAPTIONS)
    assert torch.allclose(embedded(opened, CAPTIONS), expected, atol=2e-6)
    for i, caption in enumerate(CAPTIONS):  # in a batch of its own, with the least padding there can be
        assert torch.allclose(embedded(opened, [caption])[0], expected[i], atol=2e-6)
    apart = (expected[:, None] - expected).abs().amax(dim=2) + torch.eye(len(CAPTIONS))
    assert apart.min() > 1e-4, "captions that look equal would prove nothing"


@pytest.mark.parametrize("name", NAMES)
def test_image_features_are_transformers_own(tiny: Tiny, name: str) -> None:
    opened = checkpoint.open_model(str(tiny(name)))
    pixels = torch.randint(0, 256, (3, 3, *opened.pixels.size), dtype=torch.uint8)
    processor = AutoImageProcessor.from_pretrained(tiny(name), backend="pil")
    floats = processor([p.permute(1, 2, 0).numpy() for p in pixels], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(plain(tiny(name)).get_image_features(floats).pooler_output)
        found = opened.encoder.eval().images(pixels)
    assert torch.allclose(found, expected, atol=2e-6)
    assert found.shape == (3, opened.encoder.width)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_of_every_family_is_opened_by_transformers(tiny: Tiny, name: str, tmp_path: Path) -> None:
    opened = checkpoint.open_model(str(tiny(name)))
    with torch.no_grad():
        for parameter in opened.encoder.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    checkpoint.save_model(tmp_path / name, opened, None, Model())
    expected = embedded(opened, CAPTIONS)
    assert torch.allclose(embedded(checkpoint.open_model(str(tmp_path / name)), CAPTIONS), expected, atol=1e-6)
    assert torch.allclose(reference(tmp_path / name, CAPTIONS), expected, atol=2e-6)


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_siglip_is_padded_to_its_whole_context_wherever_batches_are_cut(tiny: Tiny, name: str) -> None:
    """Trap 16: it attends to its padding and pools at the last position, so a shorter row is another caption."""
    opened = checkpoint.open_model(str(tiny(name)))
    family = opened.encoder.family
    tokens = captions.tokenise(opened.tokenizer, CAPTIONS, opened.context, family)
    assert tokens.batch([1]).shape == (1, 16)
    assert tokens.lengths().tolist() == [16] * len(CAPTIONS)
    assert tokens.lengths(np.array([1, 0])).tolist() == [16, 16]
    rows = np.array([1, 3])
    batch = Batch(rows, torch.zeros(2, 3, 32, 32, dtype=torch.uint8), tokens.batch(rows), tokens.lengths(rows))
    assert [part[1].shape for part in batch.chunks(1)] == [(1, 16), (1, 16)]
    with torch.no_grad():
        cut = opened.encoder.texts(tokens.batch([1])[:, :8])
    assert (cut - embedded(opened, ["cell"])).abs().max() > 1e-4


def test_siglip_is_padded_on_the_side_of_its_tokenizer(tiny: Tiny) -> None:
    opened = checkpoint.open_model(str(tiny("siglip2")))
    opened.tokenizer.padding_side = "left"
    tokens = captions.tokenise(opened.tokenizer, CAPTIONS, 16, opened.encoder.family)
    lowered = [caption.lower() for caption in CAPTIONS]
    expected = opened.tokenizer(lowered, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    assert torch.equal(tokens.batch(range(len(CAPTIONS))), expected["input_ids"])
    assert tokens.batch([1])[0, 0] == opened.tokenizer.pad_token_id


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_siglip_reads_captions_in_lower_case(tiny: Tiny, name: str) -> None:
    """Trap 18: it was trained on nothing else."""
    opened = checkpoint.open_model(str(tiny(name)))
    assert torch.equal(embedded(opened, ["A Round CELL"]), embedded(opened, ["a round cell"]))


@pytest.mark.parametrize("name", BERT)
def test_a_caption_that_holds_the_padding_token_is_refused_where_it_would_be_masked(tiny: Tiny, name: str) -> None:
    opened = checkpoint.open_model(str(tiny(name)))
    pad = opened.tokenizer.pad_token
    with pytest.raises(UserError, match="1 caption with the padding token") as caught:
        captions.tokenise(opened.tokenizer, ["cell", f"a {pad} cell"], opened.context, opened.encoder.family)
    assert caught.value.code is ExitCode.DATA


def test_a_tokenizer_that_does_not_begin_with_its_cls_token_is_refused(tiny: Tiny) -> None:
    opened = checkpoint.open_model(str(tiny("dinov2-bert")))
    opened.tokenizer.cls_token = opened.tokenizer.sep_token
    with pytest.raises(UserError, match="1 caption without the tokenizer's cls token"):
        captions.tokenise(opened.tokenizer, ["cell"], opened.context, opened.encoder.family)


def test_where_scale_and_bias_are(tiny: Tiny) -> None:
    for name in NAMES:
        encoder = checkpoint.open_model(str(tiny(name))).encoder
        assert encoder.logit_scale.numel() == 1
        if name.startswith("siglip"):
            assert encoder.logit_bias is not None
            assert encoder.logit_bias.item() == -10
            assert encoder.family.objective == "sigmoid"
            assert encoder.sizes()["logit scale"] == (2, 2)
            assert "projections" not in encoder.sizes()
        else:
            assert encoder.logit_bias is None
            assert encoder.family.objective == "infonce"
            assert encoder.sizes()["logit scale"] == (1, 1)
            assert encoder.sizes()["projections"][0] == 2 * 32 * 16
        counted = sum(total for _, total in encoder.sizes().values())
        assert counted == sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_layers_of_both_towers_are_found(tiny: Tiny, name: str) -> None:
    encoder = checkpoint.open_model(str(tiny(name))).encoder
    for tower in (encoder.image_tower, encoder.text_tower):
        layers = encoder.layers(tower)
        assert len(layers) == 2
        assert {type(layer).__name__[-5:] for layer in layers} == {"Layer"}


def test_a_tower_without_layers_is_refused(tiny: Tiny) -> None:
    encoder = checkpoint.open_model(str(tiny("clip"))).encoder
    encoder.text_tower.config.num_hidden_layers = 7
    with pytest.raises(UserError, match="cannot be told apart"):
        encoder.layers(encoder.text_tower)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_that_moves_gets_a_gradient(tiny: Tiny, name: str) -> None:
    """One without would have no moments to save; DINOv2's mask token is such a one."""
    opened = checkpoint.open_model(str(tiny(name)))
    tokens = captions.tokenise(opened.tokenizer, CAPTIONS, opened.context, opened.encoder.family).batch(range(3))
    image, text = opened.encoder(torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), tokens)
    ((image @ text.T) * opened.encoder.logit_scale.exp() + (opened.encoder.logit_bias or 0)).square().sum().backward()
    moving = opened.encoder.moving()
    assert [n for n, p in moving.items() if p.grad is None] == []
    left_out = {n for n, _ in opened.encoder.clip.named_parameters()} - moving.keys()
    assert left_out == ({"vision_model.embeddings.mask_token"} if name == "dinov2-bert" else set())


def test_the_size_of_two_towers_is_what_the_processor_says_and_the_tower_takes(tiny: Tiny, tmp_path: Path) -> None:
    opened = checkpoint.open_model(str(tiny("dinov2-bert")))  # made for 64, reads 32
    assert opened.pixels.size == (32, 32)
    assert opened.encoder.patches == 16
    folder = shutil.copytree(tiny("vit-roberta"), tmp_path / "vit")
    _edit(folder / "preprocessor_config.json", size={"height": 48, "width": 48})
    with pytest.raises(UserError, match="the image tower fails on one input") as caught:
        checkpoint.open_model(str(folder))
    assert "48 × 48" in caught.value.hint
    assert caught.value.code is ExitCode.MODEL


@pytest.mark.parametrize("name", ["siglip", "chinese-clip"])
def test_another_size_than_the_image_tower_reads_is_refused(tiny: Tiny, name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny(name), tmp_path / "m")
    larger = {"height": 48, "width": 48}
    how = {"size": larger} if name == "siglip" else {"size": {"shortest_edge": 48}, "crop_size": larger}
    _edit(folder / "preprocessor_config.json", **how)
    with pytest.raises(UserError, match=r"\(48, 48\) pixels but its image tower reads 32"):
        checkpoint.open_model(str(folder))


def test_towers_that_pool_nothing_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("dinov2-bert"), tmp_path / "distil")
    two = plain(tiny("dinov2-bert"))
    text = DistilBertConfig(vocab_size=two.config.text_config.vocab_size, dim=32, n_layers=1, n_heads=2, hidden_dim=8)
    both = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(two.config.vision_config, text)
    model = transformers.VisionTextDualEncoderModel(both, two.vision_model, DistilBertModel(text))
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="the text tower fails on one input"):
        checkpoint.open_model(str(folder))
    headless = shutil.copytree(tiny("siglip"), tmp_path / "headless")
    settings = json.loads((headless / "config.json").read_text())
    settings["vision_config"]["vision_use_head"] = False
    (headless / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="the image tower's feature has the shape None"):
        checkpoint.open_model(str(headless))


def test_naflex_is_refused_with_the_reason(tiny: Tiny, tmp_path: Path) -> None:
    transformers.Siglip2Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'siglip2' checkpoint") as caught:
        checkpoint.open_model(str(tmp_path))
    assert "NaFlex" in caught.value.hint


def test_what_a_family_cannot_do_is_refused_with_the_reason() -> None:
    cannot = []
    for key, family in FAMILIES.items():
        for tower in ("clip_vision_model", "swin"):
            for wanted, train in (({"context_length": 100}, {}), ({}, {"patch_dropout": 0.5}), (_SCALE_ALONE, {})):
                try:
                    families.refuse_unsupported(family, tower, Model.model_validate(wanted), Train(**train))
                except UserError:
                    cannot.append((key, tower, *wanted, *train))
    expected = {(key, "swin", "patch_dropout") for key in FAMILIES}
    expected |= {(k, t, "context_length") for k in FAMILIES if k != "clip" for t in ("clip_vision_model", "swin")}
    expected |= {("siglip", t, "image_tower", "text_tower") for t in ("clip_vision_model", "swin")}
    assert set(cannot) == expected
    assert len(cannot) == 4 + 6 + 2


_SCALE_ALONE = {"image_tower": "frozen", "text_tower": "frozen"}


def test_the_reference_page_has_a_column_for_every_family_and_names_every_refusal() -> None:
    page = families.reference()
    assert [line.count(" | ") for line in page.splitlines() if line.startswith("| class")] == [len(FAMILIES)]
    for key in (*FAMILIES, *families.REFUSED, *families.PATCH_TOWERS):
        assert f"`{key}`" in page


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
