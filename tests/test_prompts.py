"""Templates and names of classes: what is read for each label, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cytoclip import prompts
from cytoclip.errors import UserError
from cytoclip.prompts import Templates


def write(folder: Path, text: str) -> Path:
    (folder / "my.yaml").write_text(text, encoding="utf-8")
    return folder / "my.yaml"


def refusal(work: object) -> UserError:
    with pytest.raises(UserError) as refused:
        work()  # type: ignore[operator]
    return refused.value


def test_the_package_has_general_and_microscopy_templates() -> None:
    found = prompts.read(None)
    assert "a photo of {}." in found.templates
    assert "a photomicrograph of {}." in found.templates
    assert len(set(found.templates)) == len(found.templates) >= 6
    assert found.classes == {}


def test_every_name_goes_into_every_template(tmp_path: Path) -> None:
    file = write(
        tmp_path, 'templates: ["a {}.", "{}, a kind of {}"]\nclasses: {NEU: [neutrophil, granulocyte], 7: cell}'
    )
    found = prompts.read(file)
    classes = prompts.classes(found, ["NEU", "NEU"])
    assert classes == ["NEU", "7"], "a class without pictures stays one to choose, in the order of the file"
    assert prompts.prompts(found, classes) == [
        ["a neutrophil.", "neutrophil, a kind of neutrophil", "a granulocyte.", "granulocyte, a kind of granulocyte"],
        ["a cell.", "cell, a kind of cell"],
    ]


def test_without_classes_labels_are_their_own_names() -> None:
    found = Templates(["a {}"])
    assert prompts.classes(found, ["b", "basal_cell", "b"]) == ["b", "basal_cell"]
    assert prompts.prompts(found, ["b", "basal_cell"]) == [["a b"], ["a basal cell"]]


def test_a_label_without_an_entry_is_named_with_the_nearest() -> None:
    asked = Templates(["{}"], {"Neutrophil": ["a"], "Monocyte": ["b"]})
    error = refusal(lambda: prompts.classes(asked, ["neutrophils", "Monocyte"]))
    assert "classes has no entry for the label 'neutrophils'" in error.message
    assert error.hint == "add it, or spell 'Neutrophil' as the labels do"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("templates: [a photo]", "template 1 of"),
        ('templates: ["a {}", 3]', "template 2 of"),
        ("templates: []", "is no list of sentences"),
        ("templates: a {}", "is no list of sentences"),
        ("[1]", "holds a list"),
        ("", "holds null"),
        ('templates: ["{}"]\nclass: {a: b}', "'class', which is neither"),
        ('templates: ["{}"]\nclasses: {a: b}', "fewer than two classes"),
        ('templates: ["{}"]\nclasses: {a: b, c: []}', "class 'c' of"),
        ('templates: ["{}"]\nclasses: {a: b, c: [" "]}', "class 'c' of"),
        ('templates: ["{}"]\nclasses: {a: b, yes: c}', "is true or false"),
        ('templates: ["{}"]\nclasses: {a: b, c: d, a: e}', "has 'a' twice"),
        ('templates: ["{}"]\ntemplates: ["a {}"]', "has 'templates' twice"),
        ("templates: [", "is not YAML"),
        ("templates: !!python/object/apply:os.system [exit]", "is not YAML"),
        ("{" * 2000, "is not YAML"),
    ],
)
def test_what_is_no_list_of_templates_is_refused(tmp_path: Path, text: str, said: str) -> None:
    error = refusal(lambda: prompts.read(write(tmp_path, text)))
    assert said in error.message
    assert len(error.lines().splitlines()) == 2
    assert len(error.message) < 2000


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "bytes" in refusal(lambda: prompts.read(write(tmp_path, "#" * (2**20 + 1)))).message
    monkeypatch.setattr(prompts, "_MAX_PROMPTS", 5)
    assert refusal(lambda: prompts.prompts(Templates(["{}", "a {}"]), ["a", "b", "c"])).message.startswith("6 prompts")
    bomb = "a: &a [{}]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
    )
    assert "neither" in refusal(lambda: prompts.read(write(tmp_path, bomb))).message
    (tmp_path / "my.yaml").write_bytes(b"templates: ['\xff {}']")
    assert "is not UTF-8" in refusal(lambda: prompts.read(tmp_path / "my.yaml")).message
    assert "cannot be read" in refusal(lambda: prompts.read(tmp_path / "mine.yaml")).message
