"""Features equal transformers' own; what should move moves, and only that; unusable checkpoints are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from cytoclip import adapters, captions, checkpoint, demo, model
from cytoclip.config import Model
from cytoclip.errors import UserError

LONG = "a cell with a round nucleus " * 40
CAPTIONS = ["a superficial squamous cell in a clean background", "cell", LONG, "a cell 细胞 é", "…"]


def moved(base: Path, **wanted: Any) -> tuple[checkpoint.Opened, dict[str, torch.nn.Parameter]]:
    opened = checkpoint.open_model(str(base))
    adapters.set_moving(opened.encoder, Model.model_validate(wanted))
    return opened, opened.encoder.moving()


def test_text_features_are_transformers_own_for_full_truncated_and_one_word_captions(base: Path) -> None:
    opened = checkpoint.open_model(str(base))
    tokens = captions.tokenise(opened.tokenizer, CAPTIONS, opened.context)
    assert tokens.truncated == 1
    plain = CLIPModel.from_pretrained(base).eval()
    reference = AutoTokenizer.from_pretrained(base)(
        CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        expected = plain.get_text_features(**reference).pooler_output
        found = opened.encoder.eval().texts(tokens.batch(range(len(CAPTIONS))))
        short = opened.encoder.texts(tokens.batch([0, 1]))  # padded to the longest of two, not to 77
    expected = torch.nn.functional.normalize(expected)
    assert torch.allclose(found, expected, atol=2e-6)
    assert torch.allclose(short, expected[:2], atol=2e-6)


def test_image_features_are_transformers_own(base: Path) -> None:
    opened = checkpoint.open_model(str(base))
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    plain = CLIPModel.from_pretrained(base).eval()
    floats = opened.image_processor([p.permute(1, 2, 0).numpy() for p in pixels], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(plain.get_image_features(pixel_values=floats).pooler_output)
        assert torch.allclose(opened.encoder.eval().images(pixels), expected, atol=2e-6)


@pytest.mark.parametrize("count", [5, 60, 200])
def test_the_last_word_of_a_caption_changes_its_feature(base: Path, count: int) -> None:
    """Falls if the text tower pools before the end (trap 39); past the context the last kept word decides."""
    opened = checkpoint.open_model(str(base))
    kept = min(count, 70)
    one, other = (["cell"] * count for _ in range(2))
    other[kept - 1] = "nucleus"
    tokens = captions.tokenise(opened.tokenizer, [" ".join(one), " ".join(other)], opened.context)
    with torch.no_grad():
        features = opened.encoder.eval().texts(tokens.batch([0, 1]))
    assert (features[0] - features[1]).abs().max() > 1e-4


def test_embeddings_have_length_one_and_are_float32_under_autocast(base: Path) -> None:
    encoder = checkpoint.open_model(str(base)).encoder
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image, text = encoder(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([[3, 4, 5]] * 2))
    assert image.dtype == text.dtype == torch.float32
    assert torch.allclose(image.norm(dim=1), torch.ones(2), atol=1e-5)


def test_full_training_moves_everything(base: Path) -> None:
    opened, moving = moved(base)
    assert len(moving) == len(list(opened.encoder.parameters()))
    assert all(part[0] == part[1] for part in opened.encoder.sizes().values())
    assert list(opened.encoder.sizes()) == ["image tower", "text tower", "projections", "logit scale"]


def test_a_half_precision_checkpoint_is_opened_in_float32(base: Path, tmp_path: Path) -> None:
    """Trap 40: transformers 5 keeps the dtype of the file."""
    CLIPModel.from_pretrained(base).half().save_pretrained(tmp_path)
    shutil.copytree(
        base, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model.safetensors", "config.json")
    )
    assert CLIPModel.from_pretrained(tmp_path).dtype == torch.float16
    opened = checkpoint.open_model(str(tmp_path))
    assert {p.dtype for p in opened.encoder.parameters()} == {torch.float32}


def test_a_scale_above_the_ceiling_is_kept_and_one_below_is_clamped(base: Path, tmp_path: Path) -> None:
    """Traps 10 and 34."""
    encoder = checkpoint.open_model(str(base)).encoder
    encoder.logit_scale.data.fill_(9.0)
    encoder.clamp_scale()
    assert encoder.logit_scale.item() == pytest.approx(4.6052, abs=1e-4)
    clip = CLIPModel.from_pretrained(base)
    clip.logit_scale.data.fill_(4.75)
    encoder = model.DualEncoder(clip, lambda pixels: pixels)
    encoder.clamp_scale()
    assert encoder.logit_scale.item() == 4.75


def test_the_end_token_must_be_where_the_tower_pools(base: Path, tmp_path: Path) -> None:
    """Trap 39: an end token with id 2 sends transformers down a path that pools the highest id."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["text_config"]["eos_token_id"] = 7
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="pools at id 7 but the tokenizer's end token has id"):
        checkpoint.open_model(str(tmp_path))
    settings["text_config"]["eos_token_id"] = 2  # as in OpenAI's files: right, since our end token is the highest id
    (tmp_path / "config.json").write_text(json.dumps(settings))
    checkpoint.open_model(str(tmp_path))


def test_an_end_token_with_id_2_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    swapped = next(token for token, number in saved["model"]["vocab"].items() if number == 2)
    settings["eos_token"] = swapped
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="pools at the highest id"):
        checkpoint.open_model(str(tmp_path))


def test_what_is_no_clip_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    bert = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="is a 'bert' checkpoint, not a CLIP-like one"):
        checkpoint.open_model(str(tmp_path / "bert"))
    with pytest.raises(UserError, match="cannot open the checkpoint"):
        checkpoint.open_model("nobody/nothing-here")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no model"):
        checkpoint.open_model(str(tmp_path / "empty"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot open the checkpoint"):
        checkpoint.open_model(str(tmp_path / "broken"))


def test_a_checkpoint_with_half_of_its_weights_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    vision = CLIPVisionModel(CLIPVisionConfig.from_pretrained(base))
    vision.save_pretrained(tmp_path / "vision")
    shutil.copy(tmp_path / "vision" / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="weights of a whole CLIP"):
        checkpoint.open_model(str(tmp_path))


def test_the_tokenizer_of_the_demo_ends_every_caption_with_its_highest_id() -> None:
    tokenizer = demo.train_tokenizer(["a round cell", "two cells"], size=300)
    assert tokenizer.eos_token_id == len(tokenizer) - 1 != 2
    ids = tokenizer("A Round cell")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a round cell"


def test_a_folder_that_is_gone_is_no_strange_hub_id(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder: .*/gone") as caught:
        model.read(str(tmp_path / "gone"))
    assert "an adapter its base" in caught.value.hint
