"""The whole command on tiny models: against transformers' own features, and what is left out and said."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cytoclip import captions, checkpoint, class_table, classify, demo, encode, evaluation
from cytoclip.classification import METRICS
from cytoclip.classify import Asked
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.errors import ExitCode, UserError
from tests import tiny

QUIET = Console(quiet=True)
DATA = Path(__file__).parents[2] / "shared" / "data" / "wbcatt_demo"
FEW = Asked(shots=(1, 2), seeds=2)


def entries(folder: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads((folder / "img_text_pair.json").read_text())
    return found


@pytest.fixture(scope="module")
def result(root: Path, base: Path) -> dict[str, Any]:
    return classify.classify(str(base), root, FEW, QUIET, batch_size=7, workers=0)


def test_zero_shot_equals_transformers_own_features(
    root: Path, base: Path, tmp_path: Path, result: dict[str, Any]
) -> None:
    """Each class: mean of unit features of its prompts, at length 1; each picture: the nearest."""
    clip, tokenizer = CLIPModel.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    some = entries(root / "val")
    pictures = [Image.open(root / "val" / "imgs" / entry["img"]).convert("RGB") for entry in some]
    pixels = CLIPImageProcessorPil.from_pretrained(base)(pictures, return_tensors="pt")["pixel_values"]
    classes = sorted({entry["label"] for entry in some})
    rows = []
    with torch.no_grad():
        image = torch.nn.functional.normalize(clip.get_image_features(pixel_values=pixels).pooler_output)
        for name in classes:
            words = tokenizer(
                [template.replace("{}", name.replace("_", " ")) for template in result["templates"]],
                padding="max_length", max_length=77, truncation=True, return_tensors="pt",
            )  # fmt: skip
            each = torch.nn.functional.normalize(clip.get_text_features(**words).pooler_output)
            rows.append(torch.nn.functional.normalize(each.mean(dim=0), dim=0))
    scores = image @ torch.stack(rows).T
    guesses = [classes[i] for i in scores.argmax(dim=1)]
    twice = scores.topk(2, dim=1).values
    assert float((twice[:, 0] - twice[:, 1]).min()) > 1e-6, "no guess hangs on rounding"
    right = [guess == entry["label"] for guess, entry in zip(guesses, some, strict=True)]
    assert result["classes"] == classes
    assert result["pictures"] == len(some) == 20
    assert result["zero_shot"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    confusion = np.zeros((len(classes), len(classes)))
    for guess, entry in zip(guesses, some, strict=True):
        confusion[classes.index(entry["label"]), classes.index(guess)] += 1
    assert result["confusion"] == confusion.tolist()


def test_the_document_has_its_shape(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result) == {
        "schema", "model", "split", "pictures", "classes", "without_pictures", "clusters", "majority", "templates",
        "names", "zero_shot", "confusion", "confusion_interval", "by_class", "probe", "knn", "few_shot",
    }  # fmt: skip
    assert result["schema"] == 1
    for way in ("zero_shot", "probe", "knn"):
        for name in METRICS:
            one = result[way][name]
            assert one["interval"][0] <= one["value"] <= one["interval"][1]
            assert one["chance"] == result["zero_shot"][name]["chance"]
    assert result["zero_shot"]["accuracy"]["chance"] == pytest.approx(1 / len(result["classes"]))
    assert result["clusters"] == {"by": "source", "count": 4}
    assert list(result["few_shot"]) == ["1", "2"]
    assert set(result["few_shot"]["1"]) == {*METRICS, "fewer"}
    assert set(result["few_shot"]["1"]["auroc"]) == {"mean", "sd", "interval", "chance"}


def test_the_table_shows_the_same_numbers(result: dict[str, Any]) -> None:
    text = class_table.text(result)
    accuracy = next(line for line in text.splitlines() if line.startswith("  accuracy"))
    for way in ("zero_shot", "probe", "knn"):
        one = result[way]["accuracy"]
        assert f"{one['value']:.4f} [{one['interval'][0]:.4f}, {one['interval'][1]:.4f}]" in accuracy
    assert accuracy.endswith(f"{result['zero_shot']['accuracy']['chance']:.4f}")
    assert "20 pictures of val in" in text
    assert "95 % of resamples of 4 sources" in text
    one = result["few_shot"]["2"]["macro_f1"]
    assert f"{one['mean']:.4f} ± {one['sd']:.4f}" in text
    assert all(len(line) <= 120 for line in text.splitlines())
    alone = {**result, "zero_shot": {**result["zero_shot"], "auroc": {"value": None, "interval": None, "chance": None,
             "why": "only one class has pictures"}}}  # fmt: skip
    assert "AUROC is undefined: only one class has pictures" in class_table.text(alone)


def test_a_model_that_knows_nothing_has_chance(root: Path, base: Path, tmp_path: Path) -> None:
    """Every prompt and every picture the same: exactly the chance that stands beside it."""
    opened = checkpoint.open_model(str(base))
    with torch.no_grad():
        opened.encoder.clip.text_projection.weight.zero_()
    shutil.copytree(base, tmp_path / "blank")
    opened.encoder.clip.save_pretrained(tmp_path / "blank")
    found = classify.classify(str(tmp_path / "blank"), root, Asked(probe=False), QUIET, workers=0)["zero_shot"]
    assert {name: found[name]["value"] for name in METRICS} == {name: found[name]["chance"] for name in METRICS}


def test_a_table_of_labels_and_names_of_classes(
    root: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{entry['img']},{'even' if i % 2 else 'odd'}" for i, entry in enumerate(entries(root / "val")[:18])]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *rows, "nowhere.png,odd"]))
    (tmp_path / "my.yaml").write_text('templates: ["a {}."]\nclasses: {odd: [cell, cells], even: nucleus, third: x}')
    asked = Asked(label_files=[tmp_path / "labels.csv"], templates=tmp_path / "my.yaml", probe=False)
    found = classify.classify(str(base), root, asked, Console(), workers=0)
    said = capsys.readouterr().err
    assert "1 row of the labels name no picture of val: 'nowhere.png'" in said
    assert "2 pictures of 20 in val have no label and are left out" in said
    assert found["classes"] == ["odd", "even", "third"]
    assert found["without_pictures"] == ["third"]
    assert found["pictures"] == 18
    assert found["names"]["odd"] == ["cell", "cells"]
    assert "probe" not in found
    assert "classes without a picture here, left out of the means: third" in class_table.text(found)


def test_what_cannot_be_learned_from_is_said(
    root: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = classify.classify(str(base), root, Asked(split="train"), Console(), workers=0)
    assert "they would be tried on what they learned from" in capsys.readouterr().err
    assert "probe" not in found
    shutil.copytree(root / "val", tmp_path / "data" / "val")
    found = classify.classify(str(base), tmp_path / "data", FEW, Console(), workers=0)
    assert "has no train to learn from" in capsys.readouterr().err
    assert "probe" not in found
    shutil.copytree(root / "val", tmp_path / "data" / "train")
    some = entries(tmp_path / "data" / "train")
    kept = sorted({entry["label"] for entry in some})[0]
    for entry in some:
        entry["label"] = entry["label"] if entry["label"] == kept else "another"
    (tmp_path / "data" / "train" / "img_text_pair.json").write_text(json.dumps(some))
    found = classify.classify(str(base), tmp_path / "data", FEW, Console(), workers=0)
    said = capsys.readouterr().err
    assert "whose label is none of the classes: another" in said
    assert "has pictures of fewer than two of the classes" in said
    assert "in two splits, byte for byte: 20 of 20 pairs in val and train" in said
    assert "probe" not in found


def test_pairs_without_labels_are_refused(root: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "val", tmp_path / "val")
    some = entries(tmp_path / "val")
    for label in (None, "one"):
        for entry in some:
            entry.pop("label", None)
            entry.update({"label": label} if label else {})
        (tmp_path / "val" / "img_text_pair.json").write_text(json.dumps(some))
        with pytest.raises(UserError) as refused:
            classify.classify(str(base), tmp_path, Asked(), QUIET, workers=0)
        assert refused.value.code == ExitCode.DATA
        assert ("1 class to choose from" if label else "no picture of val") in refused.value.message


def test_labels_under_another_key_are_named(root: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "val", tmp_path / "val")
    some = [{k: v for k, v in entry.items() if k != "label"} | {"class": "one"} for entry in entries(tmp_path / "val")]
    (tmp_path / "val" / "img_text_pair.json").write_text(json.dumps(some))
    with pytest.raises(UserError, match="no picture of val") as refused:
        classify.classify(str(base), tmp_path, Asked(), QUIET, workers=0)
    assert refused.value.hint == "call their key 'class' label, or a table: --labels labels.csv"


def test_more_of_a_class_than_there_is_is_named(root: Path, base: Path) -> None:
    found = classify.classify(str(base), root, Asked(shots=(40,), seeds=1), QUIET, workers=0)
    assert found["few_shot"]["40"]["fewer"] == found["classes"]
    assert found["few_shot"]["40"]["accuracy"]["sd"] is None
    assert "classes with fewer pictures than that, all of which are taken: 40: " in class_table.text(found)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real image-caption pairs are not beside this checkout")
@pytest.mark.slow  # trains nothing but embeds 1,124 pictures: about 20 s
def test_real_cells_are_told_apart_by_a_probe_of_a_small_model(tmp_path: Path) -> None:
    demo.write_base(tmp_path, [entry["caption"] for entry in entries(DATA / "train")], demo.Shape(), seed=0)
    files = [DATA / split / "attributes.json" for split in ("train", "val")]
    found = classify.classify(str(tmp_path), DATA, Asked(label_files=files, shots=(4,), seeds=2), QUIET)
    assert found["pictures"] == 252
    assert len(found["classes"]) == 5
    assert found["clusters"]["by"] == "picture"
    assert found["probe"]["balanced_accuracy"]["interval"][0] > 0.3, "untrained features of colour and size are enough"
    low, high = found["zero_shot"]["auroc"]["interval"]
    assert low - 0.1 < 0.5 < high + 0.1


def test_pictures_and_captions_alone_are_embedded_as_both_are(root: Path, base: Path) -> None:
    from cytoclip import batches, evaluation
    from cytoclip.device import World

    opened, pairs = checkpoint.open_model(str(base)), batches.open_split(root / "val", QUIET)
    how, alone = evaluation.reading(opened, pairs, 7, 0), World(torch.device("cpu"))
    opened.encoder.train()
    image, text = encode.encode(opened.encoder, pairs, how, alone, QUIET)
    assert opened.encoder.training
    assert torch.equal(image, encode.encode_pictures(opened.encoder, pairs, how, alone, QUIET))
    assert torch.equal(text, encode.encode_captions(opened.encoder, pairs.captions, how, alone, QUIET))


def test_a_label_cannot_break_its_line() -> None:
    result = {"classes": ["a\nb", "c\u202ed"], "confusion": [[1, 0], [0, 1]]}
    lines = class_table._confusion(result)
    assert len(lines) == 3
    assert lines[1].split()[:2] == ["1", "a�b"]
    assert "\u202e" not in "".join(lines)


@pytest.mark.parametrize("kind", ["siglip", "siglip2", "chinese_clip"])
def test_classes_are_embedded_as_captions_of_the_family_are(kind: str, bases: dict[str, Path]) -> None:
    """Traps 16 and 18: SigLIP reads lower case, and its padding too."""
    opened = checkpoint.open_model(str(bases[kind]))
    tokens = captions.tokenise(opened.tokenizer, tiny.CAPTIONS, opened.context, opened.encoder.family)
    reading = evaluation.Reading(tokens, opened.pixels, 4, 0)
    sentences = tiny.CAPTIONS[:1], tiny.CAPTIONS[1:]
    found = classify.embed_classes(opened, sentences, reading, World(torch.device("cpu")), QUIET)
    with torch.no_grad():
        each = opened.encoder.eval().texts(tokens.batch(range(4)))
    expected = torch.nn.functional.normalize(torch.stack([each[0], each[1:].mean(0)]))
    assert torch.allclose(found, expected, atol=1e-6)


def test_predictions_are_what_was_measured(root: Path, base: Path, tmp_path: Path, result: dict[str, Any]) -> None:
    path = tmp_path / "new" / "predictions.csv"
    asked = Asked(shots=(1, 2), seeds=2, predictions=path)
    assert classify.classify(str(base), root, asked, QUIET, batch_size=7, workers=0) == result
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    some, classes = entries(root / "val"), result["classes"]
    assert [(row["image"], row["label"]) for row in rows] == [(entry["img"], entry["label"]) for entry in some]
    for way, measured in (("zero_shot", result), ("probe", result["probe"]), ("knn", result["knn"])):
        confusion = np.zeros((len(classes), len(classes)))
        for row in rows:
            shares = [float(row[f"{way}: {name}"]) for name in classes]
            assert sum(shares) == pytest.approx(1, abs=1e-4)
            assert max(shares) == float(row[f"{way} share"]) == shares[classes.index(row[way])]
            confusion[classes.index(row["label"]), classes.index(row[way])] += 1
        assert confusion.tolist() == measured["confusion"], way
