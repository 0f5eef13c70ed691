"""Saved → loaded gives the same logits for every combination of towers; plain transformers opens what is full."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from cytoclip import adapters, checkpoint, model
from cytoclip.checkpoint import RunFolder
from cytoclip.config import Model
from cytoclip.errors import UserError
from cytoclip.pixels import PixelSpec

MODES = ("full", "frozen", "lora")
COMBINATIONS = list(itertools.product(MODES, MODES))
ADAPTERS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}
CASES = [(*towers, kind) for towers in COMBINATIONS for kind in (ADAPTERS if "lora" in towers else ("none",))]


def test_there_are_nine_combinations_and_three_adapters_of_the_five_with_lora() -> None:
    assert len(COMBINATIONS) == 9
    assert len(CASES) == 4 + 5 * 3


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_saved_and_loaded_gives_the_same_logits(case: tuple[str, str, str], base: Path, tmp_path: Path) -> None:
    """Trap 44: peft alone loses the full tower, the projections and the logit scale."""
    *towers, kind = case
    lora = {"lora": ADAPTERS[kind]} if kind in ADAPTERS else {}
    wanted = Model.model_validate({"image_tower": towers[0], "text_tower": towers[1], **lora})
    opened = checkpoint.open_model(str(base))
    before = {name: p.detach().clone() for name, p in opened.encoder.clip.named_parameters()}
    adapter = adapters.set_moving(opened.encoder, wanted)
    _train_a_little(opened.encoder)
    expected = _logits(opened.encoder)

    checkpoint.save_model(tmp_path / "model", opened, adapter, wanted)

    assert torch.equal(_logits(opened.encoder), expected), "saving changed the model"
    loaded = checkpoint.open_model(str(tmp_path / "model"))
    assert torch.allclose(_logits(loaded.encoder), expected, atol=1e-4 * expected.abs().max().item())
    assert not torch.allclose(_logits(checkpoint.open_model(str(base)).encoder), expected, atol=1e-2)
    is_adapter = (tmp_path / "model" / "adapter_config.json").is_file()
    assert is_adapter == ("lora" in towers and "full" not in towers)
    if is_adapter:
        assert (tmp_path / "model" / "cytoclip.safetensors").is_file()
        assert not (tmp_path / "model" / "model.safetensors").exists()
        assert (tmp_path / "model" / "adapter_model.safetensors").stat().st_size < (
            base / "model.safetensors"
        ).stat().st_size
        PeftModel.from_pretrained(CLIPModel.from_pretrained(base), tmp_path / "model")
    else:
        plain = CLIPModel.from_pretrained(tmp_path / "model")
        assert torch.allclose(_logits(model.DualEncoder(plain, lambda pixels: pixels)), expected, atol=1e-3)
    _assert_frozen_is_byte_identical(towers, before, opened)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == opened.tokenizer.eos_token


def _assert_frozen_is_byte_identical(
    towers: list[str], before: dict[str, torch.Tensor], opened: checkpoint.Opened
) -> None:
    """Traps 33 and 35; under LoRA the base layer is frozen too."""
    after = {n.replace(".base_layer", ""): p for n, p in opened.encoder.clip.named_parameters()}
    still = [tower for tower, mode in zip(("vision_model.", "text_model."), towers, strict=True) if mode != "full"]
    names = [name for name in before if name.startswith(tuple(still))]
    assert len(names) >= 30 * len(still)
    for name in names:
        assert torch.equal(after[name], before[name]), name


def test_a_processor_opens_beside_the_model(base: Path, tmp_path: Path) -> None:
    opened = checkpoint.open_model(str(base))
    adapter = adapters.set_moving(opened.encoder, Model())
    checkpoint.save_model(tmp_path / "model", opened, adapter, Model())
    processor = CLIPProcessor.from_pretrained(tmp_path / "model", backend="pil")
    assert type(processor.image_processor).__name__ == "CLIPImageProcessorPil"
    assert checkpoint.open_model(str(tmp_path / "model")).pixels == opened.pixels


def test_a_run_folder_opens_at_its_best_and_is_a_base_for_another_run(base: Path, tmp_path: Path) -> None:
    wanted = Model.model_validate({"image_tower": "lora", "text_tower": "lora"})
    run = RunFolder(tmp_path / "run")
    opened = checkpoint.open_model(str(base))
    adapter = adapters.set_moving(opened.encoder, wanted)
    _train_a_little(opened.encoder)
    run.path.mkdir()
    run.config.write_text("data: {root: x}\nvalidate: {every: 30}\n")
    with pytest.raises(UserError, match=r"without a saved model yet: .* at step 30, or at the end") as caught:
        checkpoint.open_model(str(run.path))
    assert caught.value.hint == f"`cytoclip train {run.config}` goes on; in a new run validate.every=N brings it sooner"
    checkpoint.save_model(run.model, opened, adapter, wanted)
    at_last = _logits(checkpoint.open_model(str(run.path)).encoder)
    _train_a_little(opened.encoder)
    checkpoint.save_model(run.best, opened, adapter, wanted)
    again = checkpoint.open_model(str(run.path))
    assert not torch.equal(_logits(again.encoder), at_last)
    assert torch.allclose(_logits(again.encoder), _logits(opened.encoder), atol=1e-3)
    assert not checkpoint.is_adapter_only(wanted, again), "an adapter on an adapter could not be opened by peft"
    second = adapters.set_moving(again.encoder, wanted)
    _train_a_little(again.encoder)
    checkpoint.save_model(tmp_path / "second", again, second, wanted)
    assert torch.allclose(
        _logits(checkpoint.open_model(str(tmp_path / "second")).encoder), _logits(again.encoder), atol=1e-3
    )


def test_an_adapter_without_its_companion_is_refused(base: Path, tmp_path: Path) -> None:
    wanted = Model.model_validate({"image_tower": "lora", "text_tower": "frozen"})
    opened = checkpoint.open_model(str(base))
    checkpoint.save_model(tmp_path / "m", opened, adapters.set_moving(opened.encoder, wanted), wanted)
    (tmp_path / "m" / "cytoclip.safetensors").unlink()
    with pytest.raises(UserError, match="not both of"):
        checkpoint.open_model(str(tmp_path / "m"))


def test_pixels_of_another_size_than_the_tower_reads_are_refused(base: Path, tmp_path: Path) -> None:
    opened = checkpoint.open_model(str(base))
    checkpoint.save_model(tmp_path / "m", opened, adapters.set_moving(opened.encoder, Model()), Model())
    file = next(p for p in (tmp_path / "m").glob("*processor_config.json"))
    settings = json.loads(file.read_text())
    settings |= {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"\(48, 48\) pixels but its image tower reads 32"):
        checkpoint.open_model(str(tmp_path / "m"))


def _train_a_little(encoder: model.DualEncoder) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.moving().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def _logits(encoder: model.DualEncoder) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(5, 3, 32, 32, generator=generator)
    tokens = torch.randint(3, 100, (5, 7), generator=generator)
    tokens[:, -1] = encoder.clip.config.text_config.eos_token_id
    with torch.no_grad():
        clip = encoder.eval().clip
        image = torch.nn.functional.normalize(clip.get_image_features(pixel_values=pixels).pooler_output)
        return encoder.logit_scale.exp() * image @ encoder.texts(tokens).T


def test_a_damaged_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    """Each of these would otherwise open with some weights of the base, and score."""
    wanted = Model.model_validate({"image_tower": "lora", "text_tower": "lora"})
    opened = checkpoint.open_model(str(base))
    adapter = adapters.set_moving(opened.encoder, wanted)
    checkpoint.save_model(tmp_path / "whole", opened, adapter, wanted)
    checkpoint.open_model(str(tmp_path / "whole"))
    damages = {
        "no scale": ("cytoclip.safetensors", "does not fit"),
        "no tensor": ("adapter_model.safetensors", "lacks"),
        "cut beside": ("cytoclip.safetensors", "cannot be read"),
        "cut adapter": ("adapter_model.safetensors", "cannot open"),
        "cut config": ("adapter_config.json", "cannot be read"),
    }
    for name, (file, said) in damages.items():
        folder = shutil.copytree(tmp_path / "whole", tmp_path / name)
        if name.startswith("cut"):
            (folder / file).write_bytes((folder / file).read_bytes()[:-40])
        else:
            tensors = load_file(folder / file)
            tensors.pop("logit_scale" if name == "no scale" else next(iter(tensors)))
            save_file(tensors, folder / file, {"format": "pt"})
        with pytest.raises(UserError, match=said):
            checkpoint.open_model(str(folder))
    assert len(damages) == 5


def test_a_truncated_model_and_one_without_tokenizer_are_refused(base: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(base, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot open the checkpoint"):
        checkpoint.open_model(str(cut))
    bare = shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match="has no tokenizer"):
        checkpoint.open_model(str(bare))


def test_a_reader_does_not_touch_a_folder_in_exchange(base: Path, tmp_path: Path) -> None:
    """Between the two renames of its writer, `best` is away: a reader takes the old one where it is."""
    run = RunFolder(tmp_path)
    run.config.write_text("data: {root: x}\n")
    waiting = shutil.copytree(base, tmp_path / ".best.old")
    assert checkpoint.open_model(str(tmp_path)).name == str(waiting.resolve())
    assert waiting.is_dir()
    assert not run.best.exists()


def test_the_image_processor_is_always_the_pil_one(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 48: where torchvision is installed, transformers' default would resize differently."""
    asked = []
    opens = model.AutoImageProcessor.from_pretrained

    def noted(name: str, **how: Any) -> Any:
        asked.append(how.get("backend"))
        return opens(name, **how)

    monkeypatch.setattr(model.AutoImageProcessor, "from_pretrained", noted)
    checkpoint.open_model(str(base))
    assert asked == ["pil"]


@pytest.mark.parametrize("towers", ["full", "lora"])
@pytest.mark.parametrize("crop", ["auto", "center", "pad", "squash"])
def test_a_saved_model_reads_pictures_by_the_crop_that_it_was_trained_with(
    crop: str, towers: str, base: Path, tmp_path: Path
) -> None:
    """An adapter is opened on its base, whose image processor has the base's crop."""
    wanted = Model.model_validate({"image_tower": towers, "text_tower": towers})
    opened = checkpoint.with_crop(checkpoint.open_model(str(base)), crop)
    checkpoint.save_model(tmp_path / "model", opened, adapters.set_moving(opened.encoder, wanted), wanted)

    loaded = checkpoint.open_model(str(tmp_path / "model"))

    assert (loaded.pixels, loaded.crop) == (opened.pixels, crop)
    plain = PixelSpec.from_processor(CLIPImageProcessorPil.from_pretrained(str(tmp_path / "model")))
    assert plain == opened.pixels.fitted("center" if crop == "pad" else crop)
    if crop in ("pad", "squash"):
        assert loaded.pixels != checkpoint.open_model(str(base)).pixels


@pytest.mark.parametrize(("name", "near"), [("runs/frist", "runs/first"), ("a/b/c", ""), ("./first", "")])
def test_a_slip_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, near: str) -> None:
    """A run beside it, or more than an owner and a name: nobody waits for the hub to say no."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "read", lambda name: pytest.fail(f"{name} is looked for"))
    Path("runs/first").mkdir(parents=True)
    Path("runs/first/config.yaml").touch()
    with pytest.raises(UserError, match=f"no such folder: {name}") as caught:
        checkpoint.open_model(name)
    assert caught.value.hint.startswith(f"did you mean {near}?" if near else "give a hub id")


def test_a_hub_id_beside_a_folder_of_its_owner_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("openai/clip-vit-base-patch32").mkdir(parents=True)  # no run
    assert checkpoint.locate("openai/clip-vit-base-patch16") == "openai/clip-vit-base-patch16"
    hint = model.not_opened("openai/clip-vit-base-patch16", OSError("no network")).hint
    assert hint.startswith("did you mean openai/clip-vit-base-patch32? Else give a hub id")


def test_the_digest_tells_other_pixels_contexts_and_readings_of_the_same_words(
    base: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Trap 19: what an index or stored embeddings were made with is told by it."""
    opened = checkpoint.open_model(str(base))
    digests = {opened.digest(), replace(opened, pixels=opened.pixels.fitted("squash")).digest()}
    assert len(digests | {replace(opened, context=20).digest()}) == 3
    cased = shutil.copytree(bases["two towers"], tmp_path / "cased")
    BertTokenizer(str(cased / "vocab.txt"), model_max_length=40, do_lower_case=False).save_pretrained(cased)
    one, other = (checkpoint.open_model(str(folder)) for folder in (bases["two towers"], cased))
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert one.digest() != other.digest()
