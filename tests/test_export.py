"""Exports opened by the libraries they are for, from pictures and captions on, and held against the model."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

import cytoclip
from cytoclip import checkpoint, export, export_hf, export_onnx, export_open_clip, export_sentence, training, yardstick
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError
from tests import tiny
from tests.typed import Run, refused

QUIET = Console(quiet=True)
FAMILIES = ["clip", "siglip", "siglip2", "chinese_clip", "two towers"]


@pytest.fixture(scope="module")
def picture(root: Path) -> Path:
    return root / "val" / "imgs" / "003.png"


def ran(folder: Path, picture: Path) -> dict[str, Any]:
    """What the code in the card leaves when it is run, as it stands but for what its reader is to replace."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    for theirs, ours in (('"picture.png"', str(picture)), ('["one round cell", "a sheet of cells"]', tiny.CAPTIONS)):
        assert code.count(theirs) == 1
        code = code.replace(theirs, repr(ours))
    said: dict[str, Any] = {}
    with chdir(folder):
        exec(code, said)  # noqa: S102 - our own
    return said


@pytest.mark.parametrize("form", ["hf", "sentence-transformers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_by_the_code_of_its_card(
    bases: dict[str, Path], tmp_path: Path, picture: Path, family: str, form: str
) -> None:
    done = export.export(str(bases[family]), tmp_path / "out", form, QUIET)
    (part,) = done.parts
    assert min(part.image, part.text) > 1 - 1e-6
    expected = cytoclip.load(str(bases[family])).similarity([picture], tiny.CAPTIONS)
    cosines = ran(tmp_path / "out", picture)["cosines"]
    assert np.abs(np.asarray(cosines) - expected).max() < 1e-5
    assert json.loads((tmp_path / "out" / export.RESULT).read_text()) == json.loads(json.dumps(done.document()))
    card = ModelCard.load(tmp_path / "out" / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == ("transformers" if form == "hf" else form)
    assert {path.suffix for path in (tmp_path / "out").rglob("*")} <= {
        "",
        ".json",
        ".md",
        ".safetensors",
        ".txt",
        ".model",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if form == "sentence-transformers":  # which would take torchvision's resize where that is there
        said = json.loads((tmp_path / "out" / "sentence_bert_config.json").read_text())
        assert said["processor_kwargs"] == {"backend": "pil"}


def test_a_tokenizer_that_knows_case_in_a_family_that_does_not(
    bases: dict[str, Path], tmp_path: Path, picture: Path
) -> None:
    """As SigLIP2's was published: lower-casing is left to who uses it."""
    base = Path(shutil.copytree(bases["siglip2"], tmp_path / "base"))
    said = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**said, "tokenizer_class": "GemmaTokenizer"}))
    cased = checkpoint.open_model(str(base)).tokenizer
    assert cased("A Round cell")["input_ids"] != cased("a round cell")["input_ids"]
    expected = cytoclip.load(base).similarity([picture], tiny.CAPTIONS)
    for form in ("hf", "sentence-transformers"):
        export.export(str(base), tmp_path / form, form, QUIET)
        assert np.abs(np.asarray(ran(tmp_path / form, picture)["cosines"]) - expected).max() < 1e-5, form


@pytest.mark.parametrize("crop", ["center", "squash", "pad"])
@pytest.mark.parametrize("form", ["hf", "sentence-transformers"])
def test_the_crop_policy_of_a_run(base: Path, tmp_path: Path, form: str, crop: str, capsys: Any) -> None:
    """A wide picture: only `pad` cannot be said to another library, and then that is said to the user."""
    model = tmp_path / "model"
    opened = checkpoint.with_crop(checkpoint.open_model(str(base)), crop)
    checkpoint.save_model(model, opened, None, Config.model_validate({"data": {"root": "x"}}).model)
    done = export.export(str(model), tmp_path / "out", form, Console())
    assert bool(done.notes) == (crop == "pad")
    assert ("padded to a square" in capsys.readouterr().err) == (crop == "pad")
    wide = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)).save(wide)
    expected = cytoclip.load(str(model)).embed_images([wide]) @ cytoclip.load(str(model)).embed_texts(tiny.CAPTIONS).T
    apart = np.abs(np.asarray(ran(tmp_path / "out", wide)["cosines"]) - expected).max()
    assert apart > 1e-3 if crop == "pad" else apart < 1e-5
    if form == "hf":
        assert np.array_equal(
            cytoclip.load(tmp_path / "out").embed_images([wide]), cytoclip.load(model).embed_images([wide])
        )


@pytest.fixture(scope="module")
def adapted(root: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with LoRA in both towers, whose adapter moved."""
    from cytoclip.config import parse

    given = {
        "data": {"root": str(root), "workers": 0},
        "model": {"name": str(base), "image_tower": "lora", "text_tower": "lora"},
        "train": {"steps": 4, "batch_size": 12, "learning_rate": 0.02, "warmup_steps": 0, "precision": "no"},
        "validate": {"every": 100, "ks": [1, 5]},
        "output": str(tmp_path_factory.mktemp("adapted") / "run"),
    }
    return training.fit(parse(given, "the test"), QUIET).run


def test_lora_is_merged(adapted: Path, base: Path, tmp_path: Path, picture: Path) -> None:
    assert (adapted / "best" / "adapter_config.json").is_file()
    done = export.export(str(adapted), tmp_path / "out", "hf", QUIET)
    assert done.compared_on == "16 of 20 val pairs"
    assert "hit@" not in done.text(), "of 16 pairs it would say nothing of the model"
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    merged, before = (load_file(place / "model.safetensors") for place in (tmp_path / "out", base))
    assert merged.keys() == before.keys()
    moved = [name for name in merged if not merged[name].equal(before[name])]
    assert any("q_proj" in name for name in moved)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "fine-tuned with cytoclip" in card
    assert "hit@1" in card
    assert str(adapted.parent) not in card
    expected = cytoclip.load(str(adapted)).similarity([picture], tiny.CAPTIONS)
    assert np.abs(np.asarray(ran(tmp_path / "out", picture)["cosines"]) - expected).max() < 1e-5


def test_an_adapter_kept_apart(adapted: Path, base: Path, tmp_path: Path, picture: Path) -> None:
    done = export.export(str(adapted), tmp_path / "out", "hf", QUIET, adapter=True)
    assert done.notes == [f"The adapter needs its base, {base}, where it is."]
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < 200_000
    text = (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "out" / "README.md").write_text(text.replace("the checkpoint it began from", str(base)))
    expected = cytoclip.load(str(adapted)).similarity([picture], tiny.CAPTIONS)
    assert np.abs(np.asarray(ran(tmp_path / "out", picture)["cosines"]) - expected).max() < 1e-5
    assert np.array_equal(cytoclip.load(tmp_path / "out").similarity([picture], tiny.CAPTIONS), expected)
    with pytest.raises(UserError, match="a folder here that nobody else can open"):
        export.export(str(adapted), tmp_path / "pushed", "hf", QUIET, adapter=True, push="lab/model")
    assert not (tmp_path / "pushed").exists()


def test_what_is_refused_before_any_work(base: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    message, hint = refused(run("export", str(base), "--to", str(out), "--format", "hf", "--adapter"), ExitCode.MODEL)
    assert "whole weights and no adapter" in message
    assert hint == "leave --adapter out"
    message, _ = refused(run("export", str(base), "--to", str(out), "--format", "onnx", "--adapter"))
    assert "no place for one" in message
    message, _ = refused(run("export", str(base), "--to", str(base), "--format", "hf"), ExitCode.DATA)
    assert "already there" in message
    message, _ = refused(run("export", str(base), "--to", str(out), "--format", "hf", "--push", "just-a-name"))
    assert "no repository of the hub" in message
    message, _ = refused(run("export", str(base), "--to", str(out), "--format", "tensorflow"))
    assert "tensorflow" in message
    assert (
        "no such folder"
        in refused(run("export", str(tmp_path / "gone"), "--to", str(out), "--format", "hf"), ExitCode.MODEL)[0]
    )
    assert not list(tmp_path.iterdir())


def _broken(file: Path) -> None:
    """One weight of the text tower's last norm is another."""
    tensors = load_file(file)
    name = next(name for name in tensors if "final_layer_norm.weight" in name or name.endswith("ln_final.weight"))
    tensors[name][0] += 0.5
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("form", ["hf", "open_clip", "sentence-transformers"])
def test_a_mismatch_is_an_error_and_leaves_nothing(
    base: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = {"hf": export_hf, "open_clip": export_open_clip, "sentence-transformers": export_sentence}[form]
    real = module.write

    def broken(opened: Any, folder: Path, *more: Any) -> Any:
        said = real(opened, folder, *more)
        (file,) = folder.glob("*.safetensors")
        _broken(file)
        return said

    monkeypatch.setattr(module, "write", broken)
    with pytest.raises(UserError, match=f"the export to {form} gives other (embeddings|logits)") as caught:
        export.export(str(base), tmp_path / "out", form, QUIET)
    assert caught.value.code == ExitCode.MODEL
    assert not list(tmp_path.iterdir())


def test_another_scale_is_a_mismatch_too(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = export_hf.embed
    monkeypatch.setattr(export_hf, "embed", lambda *given: (*real(*given)[:2], 14.5))
    with pytest.raises(UserError, match="gives other logits"):
        export.export(str(base), tmp_path / "out", "hf", QUIET)
    assert not list(tmp_path.iterdir())


def test_the_folder_that_one_is_in(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export.export(str(base), Path(), "hf", QUIET)
    assert (tmp_path / "here" / "model.safetensors").is_file()


def test_a_missing_library_says_how_to_get_it(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for form, module in (("onnx", "onnxruntime"), ("sentence-transformers", "sentence_transformers")):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(UserError, match="is not installed") as caught:
            export.export(str(base), tmp_path / "out", form, QUIET)
        assert "'cytoclip[export]'" in caught.value.hint
        assert caught.value.code == ExitCode.SYSTEM
    assert not list(tmp_path.iterdir())


def test_json_is_one_document_and_no_place_is_in_it(done: tuple[Config, Any], tmp_path: Path, run: Run) -> None:
    outcome = run("export", done[0].output, "--to", str(tmp_path / "out"), "--format", "hf", "--json")
    assert not outcome.code, outcome.err
    document = json.loads(outcome.out)
    assert document["format"] == "hf"
    assert document["compared_on"] == "16 of 20 val pairs"
    assert document["digest"] == cytoclip.load(done[0].output).digest
    for file in (tmp_path / "out").glob("*"):
        if file.suffix in (".md", ".json"):
            assert str(tmp_path) not in file.read_text(), file
            assert done[0].output not in file.read_text(), file


def test_a_run_whose_data_are_gone(
    done: tuple[Config, Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Path(shutil.copytree(done[0].output, tmp_path / "run"))
    text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(text.replace(str(done[0].data.root), str(tmp_path / "gone")))
    opened = checkpoint.open_model(str(moved))
    held = yardstick.make(opened, str(moved), Console(), most=5)
    assert held.where == "5 drawn cells"
    assert "drawn cells stand in" in capsys.readouterr().err


def test_the_yardstick_is_the_encoder(done: tuple[Config, Any], root: Path) -> None:
    """Its embeddings are those of `cytoclip.load`, of pairs spread over the split."""
    opened = checkpoint.open_model(done[0].output)
    held = yardstick.make(opened, done[0].output, QUIET, most=7)
    assert held.where == "7 of 20 val pairs"
    assert [path.name for path in held.pairs.images] == [f"{i:03}.png" for i in (0, 3, 6, 10, 13, 16, 19)]  # type: ignore[union-attr]
    encoder = cytoclip.load(done[0].output)
    assert np.abs(held.image_ND - encoder.embed_images(list(held.pairs.images))).max() < 1e-6
    assert np.abs(held.text_ND - encoder.embed_texts(list(held.pairs.captions))).max() < 1e-6
    assert held.hits(held.image_ND, held.image_ND)["image_to_text"]["hit@1"] == 1


def test_the_lowest_cosine_counts_and_nan_is_low() -> None:
    one = np.eye(3, dtype=np.float32)
    other = one.copy()
    assert yardstick.cosine(one, other) == 1
    other[1] = [0, 3, 4]
    assert yardstick.cosine(one, other) == pytest.approx(0.6)
    other[1] = np.nan
    part = export.Part("fp16", yardstick.cosine(one, other), 1.0, None, 1)
    with pytest.raises(UserError, match="a cosine of nan"):
        export._refuse_mismatch(part, "onnx", type("Held", (), {"where": "3 pairs"})())


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_each_precision_has_a_least_cosine(name: str) -> None:
    assert export.COSINE.keys() == set(export_onnx.PRECISIONS)
    held: Any = type("Held", (), {"where": "3 pairs"})()
    export._refuse_mismatch(export.Part(name, export.COSINE[name], 1.0, 0.5, 1), "onnx", held)
    with pytest.raises(UserError, match=f"onnx {name} gives other embeddings"):
        export._refuse_mismatch(export.Part(name, 1.0, export.COSINE[name] - 1e-4, None, 1), "onnx", held)
